"""Cells and studies on the toy model: what is trained, filed and measured for real."""

import dataclasses

import pytest

from experiments.paper import plan, scales
from experiments.paper.cells import Cell
from experiments.paper.draws import COUNT
from experiments.paper.queue import Queue
from experiments.paper.records import Failure, Store, rights
from experiments.paper.studies import Study
from experiments.paper.training import Trainer

TASKS = ("last_letter", "product")
SETTINGS = (
    ("rollout.prompts", 2),
    ("rollout.samples", 2),
    ("rollout.max_new_tokens", 8),
    ("train.steps", 1),
    ("train.micro_batch", 2),
    ("train.remat", False),
    ("evaluate.batch_size", 8),
)
SCALE = dataclasses.replace(scales.TOY, settings=SETTINGS, held_out=8, other_model="copy")


def _cell(method, task, seed=0, stage="main"):
    return plan.cell(SCALE, stage, method, task, examples=8, seed=seed, lr=1e-2)


def _study(method, needs, **settings):
    return Study(SCALE, method, tuple(settings.items()), needs)


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A trainer of toy cells, with a cache of its own."""
    monkeypatch.setenv("SVA_CACHE", str(tmp_path / "cache"))
    return Trainer(SCALE, tmp_path / "cells")


def _filed(trainer, cells):
    """The records of cells and studies that a queue trained."""
    store = Store(trainer.directory)
    Queue(lambda: cells, store).work(trainer)
    found = [store.get(cell) for cell in cells]
    assert [each for each in found if isinstance(each, Failure)] == []
    return found


def test_a_cell_is_trained_and_its_record_holds_every_answer(trainer, compilations):
    first, second = _filed(trainer, [_cell("svf", "last_letter"), _cell("svf", "last_letter", seed=1)])
    assert (first["n"], first["method"], first["device"]) == (8, "svf", "cpu")
    assert len(first["held_out"]["before"]) == len(first["held_out"]["after"]) == 8
    assert rights(first).mean() == pytest.approx(first["after"]["mean"])
    assert len(first["curve"]) == 1
    assert first["config"]["train.lr"] == 1e-2
    assert len(first["sampled"]["after"]["rights"][0]) == COUNT
    assert "sampled" not in second
    assert first["held_out"]["before"] == second["held_out"]["before"]
    assert not list((trainer.directory / "runs").iterdir())
    compilations.clear()
    _filed(trainer, [_cell("svf", "last_letter", seed=2)])
    assert compilations == []


@pytest.mark.slow
def test_studies_measure_the_experts_of_cells(trainer):
    experts = tuple(_cell("svf", task) for task in TASKS)
    judge = Cell(SCALE, "studies", "svf", "routing", 8, 0, 1e-2, "test", TASKS)
    tuning = plan.cell(SCALE, "studies", "full_next", SCALE.other_model, examples=8, seed=0, lr=1e-4)
    asked = {"trained": TASKS, "tasks": (*TASKS, "other"), "first": plan.FIRST, "size": 2}
    studies = [
        _study("dispatch", (*experts, judge), **asked),
        _study("search", experts, task="sum2", shots=2, generations=1, seed=0, size=4),
        _study("moved", (*experts, tuning), trained=TASKS, tasks=("last_letter", "sum2"), seed=0, size=4),
        _study("many", experts, tasks=TASKS, size=2),
        _study("classified", (*experts, judge), tasks=TASKS, size=2),
    ]
    dispatch, search, moved, many, classified = _filed(trainer, [*experts, judge, *studies])[3:]
    assert dispatch["n"] == 6
    assert dispatch["rights"]["oracle"][0] == dispatch["rights"]["letters everywhere"][0]
    assert set(dispatch["chosen"]) == {*plan.FIRST, "oracle"}
    assert set(dispatch["costs"]) == {*TASKS, "other"}
    assert len(search["alphas"]) == 2
    assert len(search["rights"]["few-shot"]) == 4
    assert set(moved["rights"]) == {
        *(f"{how}/last_letter/last_letter" for how in ("ordered", "shuffled")),
        *(f"{how}/sum2/{trained}" for how in ("ordered", "shuffled") for trained in TASKS),
        "base/last_letter",
        "base/sum2",
    }
    assert (classified["tasks"], len(classified["chosen"])) == (many["tasks"], 4)
    assert set(many["seen"]) == {"embedding", "task embedding", "prompt"}
    assert many["unseen"]["embedding"] == [
        "product" if name == "last_letter" else "last_letter" for name in many["tasks"]
    ]
