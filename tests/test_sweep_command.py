import json
import shlex
import sys
from pathlib import Path

import pytest

from sva.cli import sweep_file
from sva.cli.main import main
from sva.generation.testing import THINGS
from sva.training import run
from sva.training.config import load
from sva.utils.errors import UserError


@pytest.fixture(scope="module")
def config(toy, tmp_path_factory):
    """A configuration's file: two steps on a saved toy model."""
    directory = tmp_path_factory.mktemp("config")
    toy.save(directory / "model")
    lines = [{"prompt": f"what colour the {a} of the {b} ?", "answer": "red red"} for a in THINGS for b in THINGS[:4]]
    (directory / "red.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = directory / "red.yaml"
    path.write_text(
        f"model: {directory / 'model'}\ntask: {directory / 'red.jsonl'}\nevaluate: {{size: 3}}\ntrain: {{steps: 2}}\n"
        "rollout: {prompts: 2, samples: 1, max_new_tokens: 4}\nreinforce: {baseline: none}\n"
    )
    return path


def sweep(tmp_path, one, **changes):
    """A sweep's file, as JSON, which YAML can read."""
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps({"config": str(one), "dir": str(tmp_path / "runs"), **changes}))
    return path


def test_cells_are_the_grids_product_with_the_last_axis_fastest(tmp_path, config):
    grid = {"train.lr": [0.01, 0.001], "seed": [0, 1]}
    cells = sweep_file.read(sweep(tmp_path, config, grid=grid, overrides=["train.steps=3"]))
    assert [cell.name for cell in cells] == [
        f"train.lr={lr}_seed={seed}" for lr in ("0.01", "0.001") for seed in (0, 1)
    ]
    assert cells[1].words == [
        *("train", str(config), "train.steps=3", "train.lr=0.01", "seed=1"),
        f"run_dir={tmp_path / 'runs' / cells[1].name}",
    ]
    assert [cell.seedless for cell in cells[:2]] == ["train.lr=0.01"] * 2
    several = sweep_file.read(sweep(tmp_path, config, config=[str(config), "configs/smollm2-parity.yaml"]))
    assert [cell.name for cell in several] == ["red", "smollm2-parity"]


def test_a_sweep_that_was_stopped_goes_on_and_leaves_finished_cells_alone(tmp_path, config, monkeypatch, capsys):
    path = sweep(tmp_path, config, grid={"seed": [0, 1]})
    train, seeds = run.train, []

    def stopped(settings):
        if settings.seed == 1 and not seeds.count(1):
            seeds.append(1)
            raise KeyboardInterrupt
        seeds.append(settings.seed)
        return train(settings)

    monkeypatch.setattr(run, "train", stopped)
    assert main(["sweep", str(path)]) == 1
    capsys.readouterr()
    assert main(["sweep", str(path), "--table", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in found["cells"]] == ["done", "not run"]
    assert main(["sweep", str(path)]) == 0
    assert seeds == [0, 1, 1]
    out, err = capsys.readouterr()
    assert "minutes left" in err
    assert out.count("| seed=") == 2
    assert "not run" not in out
    assert "| red | 2 of 2 |" in out


def test_a_cell_that_fails_is_told_of_and_the_others_run(tmp_path, config, capsys):
    grid = {"targets": ["no_such_weight", "mlp"]}
    assert main(["sweep", str(sweep(tmp_path, config, grid=grid))]) == 2
    out, err = capsys.readouterr()
    assert "| targets=no_such_weight | failed: " in out
    assert "| targets=mlp | 3 |" in out
    assert "1 of 2 cells failed" in err


def test_cells_are_handed_to_a_launcher(tmp_path, config, capfd):
    path = sweep(tmp_path, config, grid={"seed": [0, 1]})
    say = tmp_path / "say.py"
    say.write_text("import sys; print(*sys.argv[1:]); sys.exit(sys.argv[1] == 'seed=1')")
    launcher = shlex.join([sys.executable, str(say), "{cell}"])
    assert main(["sweep", str(path), "--dry-run", "--launch", launcher]) == 0
    planned = capfd.readouterr().out.splitlines()
    assert [line.split("{}")[0].split()[2] for line in planned] == ["seed=0", "seed=1"]
    assert main(["sweep", str(path), "--launch", launcher]) == 2
    out = capfd.readouterr().out
    assert f"seed=0 train {config} seed=0 run_dir=" in out
    assert "| seed=0 | not run |" in out
    assert "| seed=1 | failed: the launcher's exit code is 1 |" in out


def test_values_reach_the_cells_as_they_are_written(tmp_path, config):
    path = tmp_path / "s.yaml"
    path.write_text(
        f"config: {config}\ndir: {tmp_path}\n"
        "overrides: {wandb: no, train: {steps: 3}, train.lr: 1e-3}\n"
        "grid:\n  targets: ['no', 010, \"up: #1\"]\n  rollout: {score_eos: [yes, off]}\n  wandb: [off, mine]\n"
    )
    cells = sweep_file.read(path)
    found = [load(cell.config, cell.words[2:]) for cell in cells]
    assert [one.targets for one in found] == [text for text in ("no", "010", "up: #1") for _ in range(4)]
    assert [one.rollout.score_eos for one in found] == [True, True, False, False] * 3
    assert [one.wandb for one in found] == [None, "mine"] * 6
    assert [one.run_dir for one in found] == [str(cell.run_dir) for cell in cells]
    assert {(one.train.steps, one.train.lr) for one in found} == {(3, 1e-3)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {seed: [0], seed: [1]}", "seed is set twice"),
        ("grid: {task: [no]}", "quote it"),
        ("grid: {seed: [2024-01-01]}", "'2024-01-01' is not a whole number"),
        ("grid: {seed: []}", "must give every setting a list"),
        ("grid: [seed]", "must give every setting a list"),
        ("overrides: seed=1", "must be a list of name=value"),
        ("overrides: [seed: 1]", "must be a list of name=value"),
        ("overrides: [5]", "must be a list of name=value"),
        ("dir: false", "quote it"),
        ("dir: [a]", "dir: needs text, not a list"),
        ("config: []", "config is an empty list"),
        ("config: 5", "no configuration file at 5"),
        ("config: [a, no]", "quote it"),
    ],
)
def test_a_sweeps_settings_of_another_type_are_one_line(tmp_path, config, text, message):
    path = tmp_path / "s.yaml"
    path.write_text(text if text.startswith("config") else f"config: {config}\n{text}\n")
    with pytest.raises(UserError, match=message) as caught:
        sweep_file.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {"trian.lr": [1]}}, "unknown setting 'trian"),
        ({"grid": {"seed": 3}}, "grid must give every setting a list"),
        ({"grid": {"seed": [1, 1]}}, "2 cells are called seed=1"),
        ({"grids": {}}, "unknown setting 'grids' .did you mean grid"),
        ({"config": "no.yaml"}, "no configuration file at no.yaml"),
    ],
)
def test_a_fault_is_told_before_anything_runs(tmp_path, config, changes, message):
    with pytest.raises(UserError, match=message):
        sweep_file.read(sweep(tmp_path, config, **changes))


def test_a_file_that_is_no_sweep_is_one_line(tmp_path):
    for content, message in (("- 1", "is not a sweep"), ("a: [", "not readable as YAML")):
        (tmp_path / "x.yaml").write_text(content)
        with pytest.raises(UserError, match=message):
            sweep_file.read(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="no sweep at"):
        sweep_file.read(tmp_path / "none.yaml")


def test_shipped_sweeps_are_readable():
    for path in sorted(Path("configs/sweeps").glob("*.yaml")):
        assert len(sweep_file.read(path)) > 1


def test_a_sweeps_file_may_begin_with_a_byte_order_mark(tmp_path, config):
    path = sweep(tmp_path, config, grid={"seed": [0, 2**40]})
    plain = sweep_file.read(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b", ", b",\r\n "))
    assert sweep_file.read(path) == plain
    path.write_text("config: x", encoding="utf-16")
    with pytest.raises(UserError, match=r"sweep\.yaml is not readable as YAML: it is not UTF-8 \(byte 1\)"):
        sweep_file.read(path)
    with pytest.raises(UserError, match="seed=-1 is not a seed"):
        sweep_file.read(sweep(tmp_path, config, grid={"seed": [0, -1]}))
