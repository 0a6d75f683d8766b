"""Tables and figures of the paper from made records: what they print, and what they say where nothing was trained."""

import dataclasses
import importlib
import itertools
import json
import shutil

import numpy as np
import pytest
from paper_cells import Made, campaign

from experiments.paper import (
    command,
    every,
    figure9,
    many,
    page,
    plan,
    render,
    run_cells,
    scales,
    scores,
    table1,
    table3,
)
from experiments.paper import records as paper_records
from experiments.paper.figure10 import shares
from experiments.paper.figure_z import principal
from experiments.paper.measure_many import ROUTERS
from experiments.paper.methods import FIDELITY
from experiments.paper.plan import Decided
from experiments.paper.records import Store
from experiments.paper.studies import Study
from sva.evaluation.significance import paired_bootstrap
from sva.tasks.sources import kinds
from sva.utils.errors import UserError

SMALL = dataclasses.replace(scales.SMOL, more_examples=(4,), seeds=(0, 1))
TABLES = (
    "table1",
    "table2",
    "table3",
    "table4",
    "table5",
    "table6",
    "table7",
    "table8",
    "table9",
    "table10",
    "many",
    "sampled",
)
OTHERS = ("figure4", "figure6", "figure7", "figure9", "axis_parameters", "axis_prompts", "fidelity")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Every cell and study of a campaign with two seeds."""
    return campaign(tmp_path_factory.mktemp("campaign"), SMALL)[0]


def _run(name, store, out, capsys, monkeypatch):
    """What a table prints."""
    monkeypatch.setitem(scales.SCALES, "smol", SMALL)
    module = importlib.import_module(f"experiments.paper.{name}")
    words = ["--records", str(store.directory), "--out", str(out)]
    command.run(module.NAME, module.__doc__, module.make, module.STAGES, words)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [*TABLES, *OTHERS])
def test_every_table_prints_from_records_and_nothing_is_missing(name, store, tmp_path, capsys, monkeypatch):
    printed = _run(name, store, tmp_path, capsys, monkeypatch)
    assert "not run" not in printed
    made = {path.suffix for path in tmp_path.iterdir()}
    assert made == ({".md", ".tex", ".json"} if name in (*TABLES, "fidelity") else {".png", ".json"})
    assert "python -m experiments.paper" in json.loads((tmp_path / f"{name}.json").read_text())["command"]


def test_table_1_has_our_scores_the_differences_and_the_papers(store, tmp_path, capsys, monkeypatch):
    printed = _run("table1", store, tmp_path, capsys, monkeypatch)
    assert "79.15 (+3.26) / 66.67 (+2.02) / 89.56 (+0.97)" in printed
    found = json.loads((tmp_path / "table1.json").read_text())
    tasks = plan.decided(SMALL, store.get).tasks
    assert set(found["methods"]["svf"]["scores"]) == set(tasks)
    cells = [plan.cell(SMALL, "main", "svf", tasks[0], examples=128, seed=s, lr=found["rates"]["svf"]) for s in (0, 1)]
    records = [store.get(cell) for cell in cells]
    mean = np.mean([record["after"]["mean"] for record in records])
    assert found["methods"]["svf"]["scores"][tasks[0]]["mean"] == pytest.approx(mean, rel=1e-5)
    assert len(found["differences"]) == len(tasks) * 5  # of base: three methods; of LoRA: two


def test_missing_seeds_and_failures_are_printed(tmp_path, capsys, monkeypatch):
    class Failing(Made):
        def run(self, cell):
            if cell.stage == "main" and cell.method == "ia3":
                raise ValueError("no such matrix")
            return super().run(cell)

    store, _ = campaign(tmp_path / "records", SMALL, ("scout", "rates", "main"), Failing())
    known = plan.decided(SMALL, store.get)
    lost = plan.cell(SMALL, "main", "svf", known.tasks[0], examples=128, seed=1, lr=known.rates["svf"])
    store.path(lost).unlink()
    printed = _run("table1", store, tmp_path / "out", capsys, monkeypatch)
    assert "(1 of 2 seeds not run)" in printed
    assert "failed: ValueError: no such matrix" in printed
    assert "run_cells --scale smol --only scout rates main" in printed


@pytest.fixture
def partly(store, tmp_path):
    """The same campaign where of every kind of study some seeds are not run or failed, and others are."""
    shutil.copytree(store.directory, tmp_path / "partly")
    found = Store(tmp_path / "partly")
    known = plan.decided(SMALL, found.get)
    for study in [each for each in plan.studies(SMALL, known) if isinstance(each, Study)]:
        if study.method == "dispatch" and study.seed == 0 and study["tasks"] == known.unseen:
            found.path(study).unlink()
        if study.method == "moved" and study.seed == 1:
            found.path(study).unlink()
            found.fail(study, "ValueError: no such matrix", "")
        if study.method == "search" and study.seed == 1 and study["shots"] == 3:
            found.path(study).unlink()
    return Store(tmp_path / "partly")


@pytest.mark.parametrize("name", ["table2", "table5", "table8", "table9", "table10"])
def test_tables_of_studies_print_what_a_partly_run_campaign_has(name, partly, tmp_path, capsys, monkeypatch):
    printed = _run(name, partly, tmp_path / "out", capsys, monkeypatch)
    whole = {"table5", "table9"}
    missing = "(failed: ValueError: no such matrix)" if name in whole else "(1 of 2 seeds not run)"
    assert missing in printed
    found = json.loads((tmp_path / "out" / f"{name}.json").read_text())["systems"]
    for system in found.values():
        compared, seeds = system["less_base"], {score["seeds"] for score in system["scores"].values()}
        assert compared is None or compared["seeds"] == min(seeds)
    assert {score["seeds"] for score in found["base"]["scores"].values()} == ({1} if name in whole else {2})


def test_tables_of_studies_list_every_system_where_nothing_was_run(partly, tmp_path, capsys, monkeypatch):
    for path in (partly.directory / "cells").iterdir():
        if "study" in paper_records.read(path)["config"]:
            path.unlink()
    printed = _run("table2", partly, tmp_path, capsys, monkeypatch)
    for system in ("base", "best expert", *plan.FIRST, "oracle", "few-shot"):
        assert f"| {system} | not run | not run | not run |" in printed
    assert "| the paper's IA3 |" in printed
    printed = _run("table5", partly, tmp_path, capsys, monkeypatch)
    assert "| ordered | failed: ValueError: no such matrix |" in printed
    assert "12.65 (-0.37) / 46.75 (+3.46) / 75.64 (+3.88)" in printed
    printed = _run("many", partly, tmp_path, capsys, monkeypatch)
    assert f"Dispatch among {len(kinds.KINDS)} experts, unseen kinds" in printed
    assert printed.count("| task embedding | not run |") == 2


def test_what_the_test_prompts_chose_has_no_p_and_is_no_result(store, tmp_path, capsys, monkeypatch):
    for name, bounds in (("table5", ("ordered", "shuffled")), ("table2", ("best expert",)), ("table9", ())):
        _run(name, store, tmp_path / "results", capsys, monkeypatch)
        found = json.loads((tmp_path / "results" / f"{name}.json").read_text())["systems"]
        without = {system for system, each in found.items() if each["p_holm"] is None}
        assert without == {"base", *bounds}
    text = page.text(SMALL, store, tmp_path / "results", tmp_path)
    assert "so bounds and no result: ordered against the base: over all" in text
    assert "ordered is" not in text


def test_the_papers_lora_stands_beside_next_token_lora_alone(store, tmp_path, capsys, monkeypatch):
    for name in ("table1", "table7"):
        rows = [line for line in _run(name, store, tmp_path, capsys, monkeypatch).splitlines() if "77.18" in line]
        assert ["LoRA, rank 16 (attention), next token" in row for row in rows] == [True]


def test_a_difference_says_how_many_seeds_it_rests_on():
    one, two = (paired_bootstrap(np.ones((seeds, 50)), np.zeros(50)) for seeds in (1, 2))
    assert (render.basis(one), render.basis(two)) == ("1 x 50", "2 x 50")
    said = page.said([page.Difference("a", "b", "x", {**each._asdict(), "p_holm": 0.001}) for each in (one, two)])
    assert [line.count("(one seed)") for line in said] == [1, 0]


def test_table_3_takes_the_seed_whose_two_passes_together_took_least(store, tmp_path, capsys, monkeypatch):
    seeds = itertools.cycle([(1.0, 9.0), (2.0, 3.0)])
    monkeypatch.setattr(table3, "_seconds", lambda record, task: next(seeds))
    assert "| 2.00 | 3.00 | 40% |" in _run("table3", store, tmp_path, capsys, monkeypatch)


def test_a_table_with_nothing_trained_names_the_command(tmp_path):
    with pytest.raises(
        SystemExit, match=r"table1 has no trained cells.*run_cells --scale smol --only scout rates main"
    ):
        command.run("table1", "", lambda context, out: "", ("scout", "rates", "main"), ["--records", str(tmp_path)])


def test_every_makes_every_table_and_figure_and_only_smol_writes_into_the_committed_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path / "cache"))
    modules = {path.stem for path in every.DOCS.parents[1].glob("experiments/paper/*.py")}
    of_them = {name for name in modules if name.startswith(("table", "figure", "axis")) and name != "figures"}
    assert of_them | {"fidelity", "many", "sampled"} == set(every.TABLES)
    campaign(tmp_path, scales.TOY, ("rates",))
    words = ["--scale", "toy", "--records", str(tmp_path)]
    with pytest.raises(UserError, match=r"--scale toy needs --out FOLDER: .*results holds the files of smol"):
        every.main(words)
    monkeypatch.setattr(every, "TABLES", ("table6", "figure10"))
    every.main([*words, "--out", str(tmp_path / "out")])
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"table6.md", "figure10.png", "figure11.png", "results.md"} < found
    assert "The largest 32 singular values of " in (tmp_path / "out" / "results.md").read_text()


def test_the_papers_scale_is_listed_and_else_refused_in_one_line(capsys):
    with pytest.raises(SystemExit, match="table1 has no filed runs at scale paper; .* --dry-run` lists their commands"):
        command.run("table1", "", lambda context, out: "", (), ["--scale", "paper"])
    command.run("table1", "", lambda context, out: "", ("main",), ["--scale", "paper", "--dry-run"])
    printed = capsys.readouterr().out
    assert printed.count("main/svf/gsm8k/all/seed 0") == 3
    assert "fidelity/" not in printed


def test_the_papers_table_1_prints_the_runs_that_were_filed(tmp_path, capsys):
    of = scales.PAPER[0]
    store, made = Store(tmp_path), Made()
    rate = next(cell for cell in plan.rates(of, "gsm8k") if cell.method == "svf")
    store.put(rate, made.run(rate))
    cell = plan.cell(of, "main", "svf", "gsm8k", examples=None, seed=1, lr=rate.lr)
    run_dir = _finished(tmp_path / "run", cell, made.run(cell))
    run_cells.main(["--scale", "paper", "--out", str(tmp_path), "--file", str(run_dir)])
    assert store.expert_path(cell).exists()
    assert f"{cell.key}.json.gz: main/svf/gsm8k/all/seed 1" in capsys.readouterr().out
    words = ["--scale", "paper", "--records", str(tmp_path), "--out", str(tmp_path / "out")]
    command.run("table1", "", table1.make, table1.STAGES, words)
    printed = capsys.readouterr().out
    assert "## meta-llama/Meta-Llama-3-8B-Instruct" in printed
    assert "(2 of 3 seeds not run)" in printed
    assert (tmp_path / "out" / "llama3-8b" / "table1.md").exists()
    shutil.copytree(run_dir, tmp_path / "other")
    other = json.loads((run_dir / "result.json").read_text())
    other["config"]["train"]["lr"] = 0.5
    (tmp_path / "other" / "result.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="other has the settings of no cell; train with a command that"):
        run_cells.main(["--scale", "paper", "--out", str(tmp_path), "--file", str(tmp_path / "other")])


def _finished(run_dir, cell, record):
    """A run directory as `sva train` leaves it, with the answers of a made record."""
    run_dir.mkdir()
    about = {name: record[name] for name in ("n", "before", "after", "parameters", "seconds")}
    about |= {"gain": 0.1, "fingerprint": "f", "warnings": [], "versions": {}, "command": "sva train"}
    (run_dir / "result.json").write_text(json.dumps(about | {"config": dataclasses.asdict(cell.config)}))
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "step_seconds": 2.0, "tokens": 9}\n')
    (run_dir / "expert.safetensors").touch()
    for when, rows in record["held_out"].items():
        named = [dict(zip(paper_records.ANSWER, row, strict=True)) for row in rows]
        lines = [{"task": cell.task, "question": "q", **row} for row in named]
        (run_dir / f"{when}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def test_a_single_score_has_no_narrower_interval_than_wilsons():
    found = scores.score_of(np.ones((3, 50), bool))
    assert found["high"] == 1
    assert found["low"] == pytest.approx(0.929, abs=0.002)


def test_latex_and_markdown_hold_every_cell():
    table = render.Table("A & B", ("x", "y %"), (("a_b", "1 < 2"),), ("note.",))
    assert "| a_b | 1 < 2 |" in table.markdown()
    assert "a\\_b & 1 $<$ 2 \\\\" in table.latex()
    assert "A \\& B" in table.latex()


def test_a_collapse_is_being_wrong_again_after_having_learnt():
    assert figure9.result([-1.0] * 8 + [0.5] * 16 + [-0.95] * 8) == "collapsed"
    assert figure9.result([-1.0] * 16 + [0.5] * 16) == "did not collapse"
    assert figure9.result([-1.0, -0.97] * 16) == "never learnt"


def test_shares_of_a_flat_spectrum_are_its_ranks():
    assert shares(np.ones(512), 1) == pytest.approx([r / 512 for r in (1, 8, 32, 128, 256)])
    assert shares(np.array([3.0, 1.0]), 2)[:2] == pytest.approx([0.9, 1.0])


def test_principal_components_find_the_line_that_points_lie_on():
    line = np.outer(np.arange(5.0), [3.0, 4.0, 0.0])
    coordinates, parts = principal(line)
    assert parts == pytest.approx([1.0, 0.0], abs=1e-9)
    assert np.abs(np.diff(coordinates[:, 0])) == pytest.approx(np.full(4, 5.0))


def test_experts_of_one_task_are_set_beside_those_of_two():
    cosines = [[1.0, 0.8, 0.1], [0.8, 1.0, 0.3], [0.1, 0.3, 1.0]]
    said = page._alike({"experts": ["copy 0", "copy 1", "sum2 0"], "cosines": cosines})
    assert "of one task's seeds +0.80 (pairs: 1), of two tasks +0.20 (pairs: 2)" in said[0]


def test_routers_find_the_kind_whose_examples_are_near():
    rng = np.random.default_rng(0)
    centres = {kind: rng.normal(size=16) for kind in ("a", "b", "c")}
    examples = {kind: centre + 0.1 * rng.normal(size=(20, 16)) for kind, centre in centres.items()}
    asking = np.stack([centres[kind] for kind in "cab"]).astype(np.float32)
    for router in ROUTERS.values():
        assert router(asking, {kind: x.astype(np.float32) for kind, x in examples.items()}) == ["c", "a", "b"]


def test_unseen_kinds_are_never_answered_by_their_own_expert():
    record = {
        "tasks": ["a", "a", "b", "b"],
        "rights": {"base": [0, 0, 0, 0], "a": [1, 1, 0, 1], "b": [0, 1, 1, 1]},
        "seen": {},
        "unseen": {},
    }
    assert many.answers(record, "seen")["oracle"].tolist() == [True, True, True, True]
    assert many.answers(record, "seen")["best single"].tolist() == [True, True, False, True]
    unseen = many.answers(record, "unseen")
    assert unseen["oracle"].tolist() == unseen["best single"].tolist() == [False, True, False, True]
    record["rights"]["base"] = [1, 1, 0, 0]
    assert many.answers(record, "unseen")["oracle"].tolist() == [True, True, False, True]
    assert set(ROUTERS) == set(many.ROUTERS["unseen"])


def test_few_shot_search_mixes_all_experts_and_on_unseen_kinds_the_others(store, tmp_path, capsys, monkeypatch):
    known = plan.decided(SMALL, store.get)
    searches = [each for each in plan.of_kinds(SMALL, known) if each.method == "search"]
    assert {(each["among"], len(each.needs)) for each in searches} == {("all", 20), ("others", 19)}
    assert not [each for each in searches if each["among"] == "others" and each["task"] in {x.task for x in each.needs}]
    _run("many", store, tmp_path, capsys, monkeypatch)
    data = json.loads((tmp_path / "many.json").read_text())
    for when, among in many.AMONG.items():
        found = [np.mean(store.get(each)["rights"]["few-shot"]) for each in searches if each["among"] == among]
        assert data[when]["systems"]["few-shot"]["scores"]["all kinds"]["mean"] == pytest.approx(
            np.mean(found), abs=1e-5
        )
    assert "Few-shot is above the best single expert on" in (tmp_path / "many.md").read_text()


def test_the_page_says_shown_only_below_five_percent(store, tmp_path, capsys, monkeypatch):
    _run("table1", store, tmp_path / "results", capsys, monkeypatch)
    text = page.text(SMALL, store, tmp_path / "results", tmp_path)
    assert "(results/table1.md)" in text
    found = json.loads((tmp_path / "results" / "table1.json").read_text())
    shown = [entry for entry in found["differences"] if entry["p_holm"] < 0.05]
    assert 0 < len(shown) < len(found["differences"])
    assert text.count(" is above ") + text.count(" is below ") == len(shown)
    assert text.count("No difference shown (differences of") == 1


def test_the_page_names_cells_that_give_one_answer_to_half_of_the_prompts_or_more():
    def record(seed, answers, stage="main"):
        rows = [[0, answer, "", 1, ""] for answer in answers]
        about = {
            "cell": f"{stage} {seed}",
            "stage": stage,
            "method": "svf",
            "task": "copy",
            "examples": 8,
            "seed": seed,
        }
        return {**about, "after": {"mean": 0.25}, "held_out": {"after": rows}}

    (text,) = page._one_answer([record(1, [None] * 4), record(0, ["e", "e", "a", "b"]), record(2, ["e"] * 4, "scout")])
    assert text.splitlines()[-2:] == [
        '- copy, 8 prompts, seed 0: SVF (mlp) answers "e" 2 times of 4; right 25.0 %.',
        "- copy, 8 prompts, seed 1: SVF (mlp) answers none 4 times of 4; right 25.0 %.",
    ]
    assert page._one_answer([record(0, ["e", "a", "b"])]) == []


def test_studies_wait_for_the_experts_that_they_read(tmp_path):
    store, runs = campaign(tmp_path, SMALL, ("scout", "rates", "more_rates", "studies"))
    assert not [each for each in runs.ran if each.method in ("dispatch", "search", "moved", "many")]
    known = plan.decided(SMALL, store.get)
    assert isinstance(known, Decided)
    assert len(known.unseen) == 3
    assert not set(known.unseen) & set(known.tasks)
    assert len(list(plan.fidelity(SMALL, known))) == len(FIDELITY) * 3 * 2
    assert Store(tmp_path).read_so_far() == []
