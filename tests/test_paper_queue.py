"""The queue of cells: order, claims, records, what is refused."""

import dataclasses
import json
import multiprocessing
import shlex
import time

import pytest
from paper_cells import Made, campaign

from experiments.paper import costs, plan, run_cells, scales, tasks
from experiments.paper import records as paper_records
from experiments.paper.cells import digest_of_flat, flat
from experiments.paper.methods import MAIN, METHODS
from experiments.paper.queue import Queue, state
from experiments.paper.records import Failure, Store, rights
from experiments.paper.regraded import regrade
from experiments.paper.studies import Study
from experiments.paper.tasks import Scouted, chosen
from sva.tasks import procedural
from sva.tasks.sources import kinds
from sva.training import config
from sva.utils.errors import UserError

TOY = scales.TOY
RATES = {"svf": 1e-2, "full_next": 1e-4}


def _cell(method="svf", lr=1e-2, seed=0, stage="main"):
    return plan.cell(TOY, stage, method, "name_a_colour", examples=8, seed=seed, lr=lr)


def _queue(store, cells, **settings):
    return Queue(lambda: cells, store, **settings)


def test_a_key_is_of_what_changes_results_and_of_nothing_else():
    cell = _cell()
    assert dataclasses.replace(cell, stage="variants").key == cell.key
    others = [dataclasses.replace(cell, **change) for change in ({"lr": 2e-2}, {"seed": 1}, {"method": "svf_all"})]
    assert len({cell.digest, *(other.digest for other in others)}) == 4
    assert not any(name.startswith(("run_dir", "mesh", "wandb", "checkpoint")) for name in flat(cell.config))


def test_the_main_list_is_81_cells_with_the_first_seed_first():
    known = plan.Decided(("last_letter", "sum3", "count"), dict.fromkeys(MAIN, 1e-2))
    cells = list(plan.main(scales.SMOL, known))
    assert len({cell.key for cell in cells}) == 81
    assert [cell.seed for cell in cells] == [0] * 27 + [1] * 27 + [2] * 27
    assert [cell.method for cell in cells[:3]] == list(MAIN)


def test_every_method_of_the_full_list_makes_a_configuration():
    for method in METHODS:
        assert _cell(method).config.parametrisation == METHODS[method].parametrisation


def test_cells_of_later_stages_are_named_once_the_earlier_ones_decide(tmp_path):
    store, runs = Store(tmp_path), Made()
    Queue(lambda: plan.every(TOY, store.get), store).work(runs)
    stages = [cell.stage for cell in runs.ran]
    assert stages == sorted(stages, key=plan.STAGES.index)
    assert {"rates", "main", "more_rates", "variants", "fidelity"} == set(stages)
    known = plan.decided(TOY, store.get)
    assert set(known.rates) == set(METHODS)
    scores = {lr: store.get(_rate("lora", lr))["after"]["mean"] for lr in METHODS["lora"].rates}
    best = max(scores.values())
    assert known.rates["lora"] == min(lr for lr, score in scores.items() if score == best)


def _rate(method, lr):
    at = {"examples": TOY.tuning_examples, "seed": TOY.tuning_seed, "lr": lr}
    return plan.cell(TOY, "rates", method, "name_a_colour", **at)


def test_a_second_campaign_trains_nothing(tmp_path):
    campaign(tmp_path, TOY, ("rates", "main"))
    assert campaign(tmp_path, TOY, ("rates", "main"))[1].ran == []


def test_a_failed_cell_is_told_and_stops_nothing(tmp_path):
    class Failing(Made):
        def run(self, cell):
            if cell.method == "svf":
                raise FloatingPointError("step 3: loss nan\nmore")
            return super().run(cell)

    cells, store = [_cell(), _cell("linear")], Store(tmp_path)
    assert _queue(store, cells).work(Failing()) == 2
    assert store.get(cells[0]) == Failure("FloatingPointError: step 3: loss nan")
    assert state(cells[0], store) == "failed: FloatingPointError: step 3: loss nan"
    assert state(cells[1], store) == "done"
    store.put(cells[0], Made().run(cells[0]))
    assert state(cells[0], store) == "done"


def test_a_record_is_whole_and_the_same_bytes_again(tmp_path):
    cell, store = _cell(), Store(tmp_path)
    store.put(cell, Made().run(cell))
    first = store.path(cell).read_bytes()
    store.put(cell, Made().run(cell))
    assert store.path(cell).read_bytes() == first
    assert rights(Store(tmp_path).get(cell)).shape == (40,)
    store.path(cell).write_bytes(first[:100])
    with pytest.raises(UserError, match="is damaged"):
        Store(tmp_path).get(cell)


def test_records_of_another_revision_are_refused_until_recomputed(tmp_path, monkeypatch):
    cell, store = _cell(), Store(tmp_path)
    store.put(cell, Made().run(cell))
    new = paper_records.CURRENT._replace(training=99)
    for module in ("records", "cells"):
        monkeypatch.setattr(f"experiments.paper.{module}.CURRENT", new)
    with pytest.raises(UserError, match=r"training 1, grading 1; now training 99.*--recompute"):
        Store(tmp_path).get(cell)
    of_paper = plan.cell(scales.PAPER[0], "main", "svf", "gsm8k", examples=None, seed=0, lr=2e-3)
    filed = tmp_path / "cells" / f"{of_paper.digest}-1-1.json.gz"
    paper_records.write_record(filed, Made().run(of_paper) | {"scale": "paper"})
    run_cells.forget(TOY, Store(tmp_path))
    assert list((tmp_path / "cells").iterdir()) == [filed]  # which nothing here could train again
    filed.unlink()
    store.put(cell, Made().run(cell))
    assert [path.name for path in (tmp_path / "cells").iterdir()] == [f"{cell.digest}-99-1.json.gz"]


def test_a_raised_grading_grades_the_stored_answers_anew(tmp_path, monkeypatch):
    cell, store = plan.cell(LISTED, "main", "svf", "last_letter", examples=64, seed=0, lr=1e-2), Store(tmp_path)
    store.put(cell, Made(store).run(cell))  # every completion is "a", right at random
    store.expert_path(cell).touch()
    study = Study(TOY, "search", (("seed", 0), ("size", 4)), (cell,))
    store.put(study, Made().run(study))
    new = paper_records.CURRENT._replace(grading=2)
    for module in ("records", "cells", "studies", "regraded"):
        monkeypatch.setattr(f"experiments.paper.{module}.CURRENT", new)
    assert regrade(Store(tmp_path)) == (1, 1)
    found = Store(tmp_path).get(cell)
    ends_in_a = [row["answer"] == "a" for row in kinds.rows("last_letter", "test")[: found["n"]]]
    assert rights(found).tolist() == rights(found, "before").tolist() == ends_in_a
    assert found["after"]["mean"] == pytest.approx(sum(ends_in_a) / len(ends_in_a))
    assert (found["key"], found["revisions"]["grading"]) == (cell.key, 2)
    assert Store(tmp_path).expert_path(cell).exists()


def test_a_record_trained_under_another_default_is_refused(tmp_path):
    cell, store = _cell(), Store(tmp_path)
    record = Made().run(cell)
    record["config"]["train.clip_norm"] = 0.5
    store.put(cell, record)
    with pytest.raises(UserError, match=r"train.clip_norm"):
        Store(tmp_path).get(cell)
    assert not store.is_current(store.path(cell))


def _claim(directory, seconds, done):
    class Slow(Made):
        def run(self, cell):
            done.put(cell.key)
            time.sleep(seconds)
            return super().run(cell)

    _queue(Store(directory), [_cell(seed=seed) for seed in range(4)]).work(Slow())


def test_processes_share_the_cells_and_a_killed_one_gives_its_cell_back(tmp_path):
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    killed = context.Process(target=_claim, args=(tmp_path, 600, done))
    killed.start()
    taken = done.get(timeout=200)
    other = context.Process(target=_claim, args=(tmp_path, 0, done))
    other.start()
    others = {done.get(timeout=200) for _ in range(3)}
    assert taken not in others
    killed.kill()
    assert done.get(timeout=200) == taken
    other.join(200)
    assert other.exitcode == 0
    assert len(list((tmp_path / "cells").glob("*.json.gz"))) == 4
    assert not list((tmp_path / "cells").glob(".*"))


def test_no_cell_is_started_that_would_not_end_in_time(tmp_path, capsys):
    store, runs = Store(tmp_path), Made()
    assert _queue(store, [_cell(), _cell(seed=1)]).work(runs, deadline=time.time() + 0.5) == 0
    assert "2 cells would not end in time" in capsys.readouterr().err
    assert _queue(store, [_cell(), _cell(seed=1)]).work(runs, deadline=time.time() + 60) == 2


def test_predicted_seconds_are_from_the_methods_cells_on_this_device():
    records = [{"device": "cpu", "method": "svf", "seconds": x} for x in (4.0, 60.0, 4.0)]
    measured = costs.measured([*records, {"device": "H100", "method": "svf", "seconds": 99.0}], "cpu")
    assert costs.predicted(_cell(), "cpu", measured).seconds == 6.0
    assert costs.predicted(_cell("linear"), "cpu", measured).seconds == 6.0
    assert costs.predicted(_cell("linear"), "H100", costs.measured([], "H100")).seconds == 1.0


def test_a_gpu_is_any_accelerator_that_records_name():
    record = {"device": "NVIDIA H100 80GB HBM3", "method": "svf", "seconds": 4.0}
    assert costs.measured([record], "gpu") == {"svf": 6.0, costs.ANY: 6.0}
    assert costs.measured([record], "cpu") == {}


def test_later_stages_wait_until_the_main_rates_are_decided(tmp_path):
    store = Store(tmp_path)
    assert {cell.stage for cell in plan.every(TOY, store.get)} == {"rates"}
    campaign(tmp_path, TOY, ("rates",))
    store.look()
    assert {"main", "more_rates"} <= {cell.stage for cell in plan.every(TOY, store.get)}


LISTED = dataclasses.replace(
    scales.SMOL,
    candidates=("sort3", "next_number", "last_letter", "count"),
    seeds=(0,),
    more_examples=(64,),
)


def _decided(cell):
    return {"before": {"mean": 0.1}, "after": {"mean": 0.5}} if cell.stage in plan.DECIDING else None


def test_every_expert_that_a_study_reads_is_kept():
    listed = plan.every(LISTED, _decided)
    trained = {each.key: each for each in listed if not isinstance(each, Study)}
    studies = [each for each in listed if isinstance(each, Study)]
    assert {study.method for study in studies} == {"dispatch", "search", "moved", "many", "classified"}
    assert all(trained[need.key].is_kept for study in studies for need in study.needs if need.method == "svf")
    assert not any(each.is_kept for each in trained.values() if each.stage == "rates")


def test_a_stage_lists_its_cells_though_an_earlier_one_has_the_same():
    at_32 = [x for x in plan.every(LISTED, _decided, ("prompts",)) if (x.method, x.examples) == ("full", 32)]
    assert [cell.task for cell in at_32] == list(plan.decided(LISTED, _decided).tasks)
    of_kinds = plan.every(LISTED, _decided, ("kinds",))
    assert [each.task for each in of_kinds if not isinstance(each, Study)] == [*kinds.KINDS, "routing"]


def test_dry_run_lists_what_is_to_do(tmp_path, capsys):
    run_cells.main(["--scale", "toy", "--out", str(tmp_path), "--dry-run", "--on", "cpu"])
    printed = capsys.readouterr().out
    assert "rates/svf/name_a_colour/8/seed 100/lr 0.01" in printed
    assert "not run" in printed
    assert "main, variants, kinds: named when" in printed


def test_an_archive_brings_the_records_elsewhere(tmp_path, capsys):
    store, _ = campaign(tmp_path / "there", TOY, ("rates",))
    run_cells.pack(tmp_path / "there", tmp_path / "cells.tar")
    run_cells.main(["--adopt", str(tmp_path / "cells.tar"), "--out", str(tmp_path / "here")])
    assert "'rates': 9" in capsys.readouterr().out
    cell = _rate("svf", 1e-2)
    assert Store(tmp_path / "here").get(cell) == store.get(cell)
    with pytest.raises(UserError, match="no archive"):
        run_cells.main(["--adopt", str(tmp_path / "none.tar")])


def test_a_study_is_adopted_and_current_under_its_own_key(tmp_path):
    settings = {"task": "sum2", "shots": 2, "generations": 1, "seed": 0, "size": 4}  # seed 0 is a cell's default
    study, there = Study(TOY, "search", tuple(settings.items()), (_cell(),)), Store(tmp_path / "there")
    there.put(study, Made().run(study))
    assert there.is_current(there.path(study))
    run_cells.pack(tmp_path / "there", tmp_path / "cells.tar")
    run_cells.adopt(tmp_path / "cells.tar", tmp_path / "here")
    assert Store(tmp_path / "here").get(study) == there.get(study)


def test_lost_experts_are_named_with_the_command_that_trains_them_again(tmp_path, capsys):
    cell, store = _cell(), Store(tmp_path)
    study = Study(TOY, "search", (("task", "sum2"), ("seed", 0), ("size", 4)), (cell,))
    store.put(cell, Made().run(cell))  # its record is here, its expert is not
    assert _queue(store, [cell, study]).work(Made(store)) == 0
    said = capsys.readouterr().err
    assert f"studies that wait: 1, for experts that are not in {tmp_path / 'experts'}: {cell.name}; train them" in said
    assert f"--scale toy --out {tmp_path} --only main studies --recompute" in said
    with pytest.raises(UserError, match="are lost; add to --only: main"):
        run_cells.forget_lost([study], store)
    run_cells.forget_lost([cell, study], store)
    assert _queue(store, [cell, study]).work(Made(store)) == 2
    run_cells.forget_lost([cell, study], store)
    assert store.path(cell).exists()
    assert "that wait" not in capsys.readouterr().err


def test_the_papers_scale_is_listed_from_its_configs(tmp_path, capsys):
    run_cells.main(["--scale", "paper", "--out", str(tmp_path), "--dry-run", "--only", "main", "studies"])
    printed = capsys.readouterr().out
    for model in ("Meta-Llama-3-8B-Instruct", "Mistral-7B-Instruct-v0.3", "Meta-Llama-3-70B-Instruct"):
        assert model in printed
    for name in ("main/svf/gsm8k/all/seed 0", "main/lora/mbpp/all/seed 2", "studies/dispatch/", "studies/svf/routing"):
        assert printed.count(f"  {name}") >= 3
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="--scale paper lists its cells and their `sva train` commands"):
        scales.scale("paper")


def test_the_listed_command_of_a_cell_trains_the_cell():
    of = scales.PAPER[0]
    cells = [plan.cell(of, "main", name, "mbpp", examples=None, seed=2, lr=3e-3) for name in ("lora", "svf_bfloat16")]
    cells += [plan.rates(of, "gsm8k")[1], next(plan.studies(of, plan.Decided(("gsm8k",), RATES, ("math",))))]
    for cell in cells:
        start, train, file, *words = shlex.split(cell.command)
        assert (start, train) == ("sva", "train")
        assert digest_of_flat(flat(config.load(scales.CONFIGS.parents[1] / file, words))) == cell.digest


def test_a_cell_at_the_papers_scale_has_the_settings_of_its_file():
    large = next(each for each in scales.PAPER if each.files == "llama3-70b")
    svf, lora = (plan.cell(large, "main", name, "mbpp", examples=None, seed=0, lr=2e-3) for name in ("svf", "lora"))
    file = config.load(scales.CONFIGS / "llama3-70b-mbpp.yaml")
    assert dataclasses.replace(svf.config, run_dir=file.run_dir) == file
    assert (lora.config.parametrisation, lora.config.rollout.form) == ("lora:r=16,alpha=32", "dense")
    assert (lora.config.layers, lora.config.train.optimizer) == ("0-39", "adamw")
    exact = plan.cell(large, "fidelity", "svf_bfloat16", "gsm8k", examples=None, seed=0, lr=2e-3)
    assert (exact.config.train.param_dtype, exact.config.train.optimizer) == ("bfloat16", "adam")


def test_tasks_in_memory_are_those_of_sva():
    made = tasks.task("last_letter")
    theirs = procedural.task("last_letter")
    example = kinds.rows("last_letter", "test")[0]
    assert made.source("test")[0] == example
    assert (made.name, made.label, made.max_new_tokens) == (theirs.name, theirs.label, theirs.max_new_tokens)
    assert made.grade(example["answer"], example).correct


def test_tasks_that_share_a_label_are_told_apart_by_their_names():
    apart = tasks.telling_apart(["last_letter", "second_letter", "product"])
    assert [label.name for label in apart.labels] == ["lastletter", "secondletter", "product", "other"]
    assert apart.source("train")[1]["label"] == "secondletter"
    assert [label.name for label in tasks.telling_apart(["last_letter", "product"]).labels][0] == "letters"


def test_the_rule_takes_tasks_with_room_one_a_label_first():
    scouted = {
        "last_letter": Scouted(0.05, {"svf": 0.30, "lora": 0.20}),
        "second_letter": Scouted(0.05, {"svf": 0.80, "lora": 0.60}),
        "count": Scouted(0.20, {"svf": 0.95, "lora": 0.60}),  # saturates
        "sum3": Scouted(0.70, {"svf": 0.80, "lora": 0.85}),  # knows it
        "sort3": Scouted(0.10, {"svf": 0.30, "lora": 0.30}),
        "alphabetical": Scouted(0.30, {"svf": 0.32, "lora": 0.31}),  # gains nothing
    }
    assert chosen(scouted, 3) == ("second_letter", "sort3", "last_letter")
    assert chosen(scouted, 2) == ("second_letter", "sort3")
    assert json.dumps(scouted["last_letter"].gain)[:4] == "0.2"
