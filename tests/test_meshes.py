"""Every command that takes a mesh gives on 8 devices, and on two processes, what it gives on one device."""

import contextlib
import functools
import json

import jax
import numpy as np
import pytest
from commands_worker import COMMANDS, RUNS
from test_sharding import ROOT, finish, pair, run

import sva
from sva.adaptation.few_shot import is_found
from sva.cli.main import main
from sva.generation.testing import THINGS, toy_lm
from sva.models.weights import expected
from sva.parallel import mesh_config
from sva.parallel.mesh_config import MeshConfig
from sva.utils.trees import select

WORKER = ROOT / "tests" / "commands_worker.py"
TASK = """
from dataclasses import dataclass
from sva.generation.testing import COLOURS, NameAColour
from sva.tasks.base import Options

@dataclass(frozen=True, kw_only=True)
class Colours(NameAColour):
    def options(self, example):
        return Options(self.question(example), COLOURS, COLOURS, 1)

    def _rows(self, split):
        return [row | {"answer": COLOURS[len(row["thing"]) % 5]} for row in super()._rows(split)]

TASK = Colours(name="colours")
"""
ISLANDS = f"""{TASK}
@dataclass(frozen=True, kw_only=True)
class Islands(Colours):
    def question(self, example):
        return " ".join(reversed(super().question(example).split()))

TASK = Islands(name="islands")
"""
SETTINGS = """
rollout: {prompts: 8, samples: 2, max_new_tokens: 4}
train: {steps: 2, micro_batch: 8}
evaluate: {size: 8, batch_size: 8}
"""


def furnish(folder):
    """A model, a task, three experts, settings and prompts, as the worker's commands name them."""
    lm = toy_lm(9)  # one whose answers end, at different lengths
    lm.save(folder / "toy")
    (folder / "colours.py").write_text(TASK)
    (folder / "islands.py").write_text(ISLANDS)
    (folder / "train.yaml").write_text(SETTINGS)
    (folder / "prompts.txt").write_text("\n".join(f"what colour the {thing} of the red lamp ?" for thing in THINGS))
    weights = expected(lm.model.cfg)
    labels = {"labels": {name: f"a {name}" for name in ("thing", "other", "island")}}
    for seed, label in ((2, "island"), (3, "thing"), (4, "classifier")):
        rng = np.random.default_rng(seed)
        raw = {name: rng.uniform(0.6, 1.4, min(weights[name].shape)).astype("f4") for name in select(weights, "mlp")}
        about = {"fingerprint": lm.fingerprint, "base": "toy", "label": label, "description": f"a {label}"}
        about |= labels | {"task": "islands.py" if label == "island" else "colours.py"}
        sva.Expert(raw, "linear", about).save(folder / f"{label}.safetensors")
    return folder


def results(folder, what, mesh="", processes=1):
    """The folder, once a worker has run its commands or its runs on a mesh."""
    arguments = (folder, what, *([mesh] if mesh else []))
    if processes > 1:
        started = pair(folder, *arguments, worker=WORKER)
    else:
        started = [run(WORKER, *arguments, devices=8 if mesh else 1, SVA_CACHE=str(folder / "cache"))]
    for process in started:
        finish(process)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Gives what one device makes of the commands or of the runs, made once."""

    @functools.cache
    def made(what):
        return results(furnish(tmp_path_factory.mktemp(what)), what)

    return made


def read(path):
    """A JSON or JSONL file of results, its lines in order, without what differs from one run to the next."""
    if path.suffix == ".json":
        found = json.loads(path.read_text())
        return {name: found[name] for name in ("alphas", "history", "state", "settings", "experts")}
    header, *rows = map(json.loads, path.read_text().splitlines())
    if "settings" not in header:  # a run's own records
        header, rows = {}, [header, *rows]
    rows.sort(key=lambda row: (row.get("index", row.get("line", 0)), row.get("sample", 0)))
    for cost in [row[name] for row in rows for name in ("first", "second") if row.get(name)]:
        del cost["seconds"]
    return [header.get("settings"), *rows]


def assert_same(found, wanted, tolerance=1e-4):
    """Words and whole numbers are equal (no step of the toy is near a tie, so all tokens are), floats are close."""
    leaves, form = jax.tree.flatten(found)
    theirs, other = jax.tree.flatten(wanted)
    assert form == other
    for ours, their in zip(leaves, theirs, strict=True):
        if isinstance(ours, float):
            assert ours == pytest.approx(their, rel=tolerance, abs=tolerance)
        else:
            assert ours == their


# Two processes do all that one process of 8 devices does, and more.
MESHES = [("data=2,fsdp=2,tensor=2", 2), pytest.param("data=4,tensor=2", 1, marks=pytest.mark.long)]


@pytest.mark.parametrize(("mesh", "processes"), MESHES)
def test_every_command_gives_on_a_mesh_what_it_gives_on_one_device(alone, tmp_path, mesh, processes):
    want, folder = alone("commands"), results(furnish(tmp_path), "commands", mesh, processes)
    for name in COMMANDS:
        # The router over embeddings is fitted in 500 steps, which make more of what rounding changes.
        assert_same(read(folder / name), read(want / name), 1e-2 if name == "embedding.jsonl" else 1e-4)
    assert is_found(read(want / "cem.json")["history"])
    answered = read(want / "two_pass.jsonl")[1:]
    assert {row["label"] for row in answered} == {"island", "thing", "other"}
    assert {row["correct"] for row in answered} == {False, True}


@pytest.mark.long  # four runs, each with programs of its own; two processes train in tests/test_sharding.py
@pytest.mark.parametrize(("mesh", "processes"), MESHES)
def test_dense_and_factored_runs_with_and_without_kl_train_on_a_mesh_as_on_one_device(alone, tmp_path, mesh, processes):
    want, folder = alone("runs"), results(furnish(tmp_path), "runs", mesh, processes)
    for run_dir in RUNS:
        for name in ("before.jsonl", "after.jsonl"):
            assert_same(read(folder / run_dir / name), read(want / run_dir / name))
        losses, change = trained(folder / run_dir)
        wanted, wanted_change = trained(want / run_dir)
        np.testing.assert_allclose(losses, wanted, rtol=1e-4, atol=1e-5)
        # Adam divides by the gradient's size: where a gradient is rounding, so is the sign of its step.
        assert np.linalg.norm(change - wanted_change) < 1e-2 * np.linalg.norm(wanted_change)


def test_what_one_of_two_processes_sees_of_a_run_is_told_by_both(tmp_path):
    for folder, text in ((tmp_path, TASK), (tmp_path / "elsewhere", TASK.replace("% 5", "% 4"))):
        folder.mkdir(exist_ok=True)
        (folder / "colours.py").write_text(text)
        (folder / "train.yaml").write_text(SETTINGS)
    results(tmp_path, "refused", processes=2)


def trained(run_dir):
    """(losses of all steps, change of the raw values from where they began)."""
    losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    expert = sva.Expert.load(run_dir / "expert.safetensors")
    return losses, np.concatenate([expert.raw[name] - 0.1 for name in sorted(expert.raw)])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("date=2", "has no axis 'date' (did you mean data?)"),
        ("", "has no axis ''"),
        ("data=2,data=4", "names the axis data twice"),
        ("data", "data= is not a whole number of devices"),
        ("data=two", "data=two is not a whole number"),
        ("data=0", "mesh.data=0 must be at least 1, or -1"),
        ("data=-1,fsdp=-1", "more than one axis open"),
        ("data=3", "makes 3 devices, but there are 1; their product must be that"),
    ],
)
def test_a_mesh_that_cannot_be_is_one_line(text, told, monkeypatch, capsys):
    monkeypatch.setattr("sva.parallel.compile_cache.start", lambda: None)
    monkeypatch.setattr("sva.generation.load.load", lambda *_, **__: pytest.fail("a model was loaded"))
    with contextlib.suppress(SystemExit):
        assert main(["generate", "hello", "--mesh", text]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


def test_a_mesh_is_written_as_the_settings_of_a_run_name_its_axes():
    assert mesh_config.parse("data=4, tensor=2") == MeshConfig(4, 1, 2)
    assert mesh_config.parse("fsdp=-1") == MeshConfig(fsdp=-1)
