"""What the three views are made of: whole models, experts and the mixture's router, trained by next-token prediction.

A trained part is a **cell**: a method on a task with a learning rate and a seed. Its record (settings, device, seconds,
learning curve) is committed under results/three_views/cells; its weights lie under runs/, and are trained anew where a
view that is not measured yet wants them and they are gone.
"""

import functools
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.paper.cells import flat
from experiments.paper.three_views.sizes import Size, in_turn
from experiments.paper.training import made_with
from sva.ensembles.upcycle import upcycle
from sva.evaluation import evaluate as evaluation
from sva.generation.frozen import merge_expert
from sva.generation.lm import LM
from sva.generation.load import load
from sva.generation.testing import toy_lm
from sva.spectral.expert import Expert
from sva.tasks.base import Task
from sva.training import metrics
from sva.training.config import Config
from sva.training.config import load as load_config
from sva.training.run import train
from sva.utils.errors import UserError
from sva.utils.files import read_json, write_json
from sva.utils.settings import override

ALL = "all"  # the three tasks in turn: what a router is trained on, and what learning rates are tried on
METHODS: Mapping[str, Mapping[str, str]] = {
    "full": {"parametrisation": "full", "targets": "all"},
    "svf": {"parametrisation": "sigmoid_nuclear", "targets": "all"},
    "router": {"parametrisation": "full", "targets": "router"},
}
CURVE = ("loss", "grad_norm")


class Cell(NamedTuple):
    """One training run."""

    method: str
    task: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.method}-{self.task}-lr{self.lr:g}-seed{self.seed}"


class Shop:
    """Where cells are trained and kept; the base model is loaded once."""

    def __init__(self, size: Size, results: Path, weights: Path) -> None:
        """Records go to results/three_views, weights and unfinished runs to `weights`."""
        self.size, self.results, self.weights = size, results / "three_views", weights
        self.tasks = {task.name: task for task in size.made()}

    @functools.cached_property
    def base(self) -> LM:
        """The base model of everything here."""
        return toy_lm() if self.size.model == "toy" else load(self.size.model, progress=False)

    def task(self, name: str) -> Task:
        """A task by its name, or all of them in turn."""
        return in_turn(list(self.tasks.values())) if name == ALL else self.tasks[name]

    def record_path(self, cell: Cell) -> Path:
        """Where the record of a cell is, or would be."""
        return self.results / "cells" / f"{cell.name}.json"

    def record(self, cell: Cell) -> dict[str, Any] | None:
        """The record of a cell; None where it was not trained.

        Raises:
          UserError: it was trained with other settings.
        """
        path = self.record_path(cell)
        if not path.exists():
            return None
        found = read_json(path)
        if found["config"] != flat(self.config(cell)):
            raise UserError(f"{path} was trained with other settings; delete {self.results} and run the command again")
        return found

    def place(self, cell: Cell) -> Path:
        """Where its weights are: a checkpoint of a whole model, else an expert's file."""
        return self.weights / (cell.name if cell.method == "full" else f"{cell.name}.safetensors")

    def mixture(self, seed: int) -> Path:
        """Where the mixture of a seed's whole models is, its router untrained."""
        return self.weights / f"mixture-seed{seed}"

    def config(self, cell: Cell) -> Config:
        """The settings of its run."""
        size = self.size
        settings = {
            **METHODS[cell.method],
            "model": size.model,
            "task": cell.task,
            "seed": cell.seed,
            "run_dir": str(self.weights / "runs" / cell.name),
            "rollout.prompts": size.prompts,
            "train.method": "next_token",
            "train.steps": size.steps,
            "train.lr": cell.lr,
            "train.micro_batch": size.prompts,
            "train.remat": False,
            "checkpoint.every": size.steps,  # the state of a whole model is 1.3 GB
            "evaluate.split": "validation",
            "evaluate.size": size.validation * (len(size.tasks) if cell.task == ALL else 1),
        }
        return load_config(None, [override(name, value) for name, value in settings.items()])

    def train(self, cell: Cell) -> None:
        """Trains a cell, and keeps its record and its weights, but for a whole model that only tries a rate."""
        started, task, config = time.time(), self.task(cell.task), self.config(cell)
        run_dir = Path(config.run_dir)
        lm = self.base
        if cell.method == "router":
            lm = load(str(self.mixture(cell.seed)), progress=False)
        else:
            held_out = evaluation.items(task, "validation", config.evaluate.size)
            run_dir.mkdir(parents=True, exist_ok=True)
            evaluation.kept(run_dir / "before.jsonl", held_out, lambda: self._before(cell.task))
        expert, result = train(config, lm=lm, task=task, progress=False)
        rows = metrics.read(run_dir / "metrics.jsonl")
        if cell.method != "full":
            expert.save(self.place(cell))
        elif cell.task != ALL:
            shutil.rmtree(self.place(cell), ignore_errors=True)
            merge_expert(lm, expert, progress=False).save(self.place(cell))
        record = {
            **cell._asdict(),
            **{name: result[name] for name in ("n", "before", "after", "gain", "parameters", "warnings")},
            "updates": len(rows),
            "prompts": len(rows) * config.rollout.prompts,
            "answer_tokens": int(sum(row["tokens"] for row in rows)),
            "train_seconds": round(sum(row["step_seconds"] for row in rows), 2),
            "curve": [{name: float(f"{row[name]:.5g}") for name in CURVE} for row in rows],
            "config": flat(config),
            **made_with(started),
        }
        write_json(self.record_path(cell), record)
        shutil.rmtree(run_dir)

    def upcycle(self, seed: int, full: list[Cell]) -> None:
        """Writes the mixture of a seed's whole models; what is not in their mlps is their mean."""
        specialists = [load(str(self.place(cell)), progress=False) for cell in full]
        upcycle(self.base, specialists, self.mixture(seed), shared="average", seed=seed)

    def expert(self, cell: Cell) -> Expert:
        """The trained expert, or router, of a cell."""
        return Expert.load(self.place(cell))

    @functools.cache  # noqa: B019, a shop lives as long as its process
    def _before(self, name: str) -> list[evaluation.Record]:
        """The base's answers to a task's validation prompts."""
        count = self.size.validation * (len(self.tasks) if name == ALL else 1)
        todo = evaluation.items(self.task(name), "validation", count)
        return evaluation.evaluate(self.base, todo, progress=False)


def chosen_rate(shop: Shop, method: str) -> float:
    """The learning rate with the best validation accuracy of the first seed's tries, of equals the lowest.

    Raises:
      UserError: a try is missing.
    """
    best: tuple[float, float] | None = None
    for lr in shop.size.rates_of(method):
        record = shop.record(Cell(method, ALL, lr, shop.size.seeds[0]))
        if record is None:
            raise UserError(
                f"the learning rate {lr:g} of {method} was not tried yet; run experiments.paper.three_views"
            )
        if best is None or record["after"]["mean"] > best[0]:
            best = record["after"]["mean"], lr
    assert best is not None
    return best[1]
