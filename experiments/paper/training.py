"""Trains cells in one process: the model is loaded once, and what cells share is computed once.

Cells of one task and method have the same shapes whatever their number of prompts, so that the second compiles nothing.
The base answers a task's held-out prompts once a process. On a GPU products of float32 are taken in float32 (by
default they would be TF32, whose rounding differs between the forms that sample and that train).
"""

import functools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax

from experiments.paper.cells import Cell, flat
from experiments.paper.records import answers
from experiments.paper.revisions import CURRENT
from experiments.paper.scales import Scale
from experiments.paper.tasks import task as task_of
from sva.evaluation import evaluate as evaluation
from sva.evaluation.evaluate import Record
from sva.generation.lm import LM
from sva.generation.load import load
from sva.generation.testing import toy_lm
from sva.training import metrics
from sva.training.run import train
from sva.utils.provenance import command, versions

CURVE = ("reward", "accuracy", "loss", "kl", "entropy", "grad_norm", "z_spread", "logprob_gap", "mean_length")
SMALL = 400_000  # parameters up to which a trained adapter is kept


class Trainer:
    """A loaded model and what its cells share."""

    def __init__(self, scale: Scale, directory: Path) -> None:
        """Runs are worked on under directory/runs, one a cell, from where a killed one resumes."""
        jax.config.update("jax_default_matmul_precision", "highest")
        self._scale, self._runs, self._experts = scale, directory / "runs", directory / "experts"

    @functools.cached_property
    def lm(self) -> LM:
        """The base model."""
        return toy_lm() if self._scale.model == "toy" else load(self._scale.model, progress=False)

    def run(self, cell: Cell) -> dict[str, Any]:
        """The record of a cell, trained from the start or from where a killed process left it."""
        started = time.time()
        run_dir = self._runs / cell.key
        task = task_of(cell.task)
        config = cell.started_in(run_dir)
        held_out = evaluation.items(task, config.evaluate.split, config.evaluate.size)
        before = self._before(cell.task, config.evaluate.split, config.evaluate.size, config.evaluate.batch_size)
        run_dir.mkdir(parents=True, exist_ok=True)
        evaluation.kept(run_dir / "before.jsonl", held_out, lambda: list(before))
        expert, result = train(config, lm=self.lm, task=task, progress=False)
        after = evaluation.kept(run_dir / "after.jsonl", held_out, _never)
        rows = metrics.read(run_dir / "metrics.jsonl")
        if result["parameters"] <= SMALL:
            expert.save(self._experts / f"{cell.key}.safetensors")
        shutil.rmtree(run_dir)
        return {
            "cell": cell.name,
            **{name: getattr(cell, name) for name in ("stage", "method", "task", "examples", "seed", "lr", "split")},
            "scale": cell.scale.name,
            "key": cell.key,
            "revisions": CURRENT._asdict(),
            **{
                name: result[name] for name in ("n", "before", "after", "gain", "parameters", "fingerprint", "warnings")
            },
            "device": device(),
            "versions": versions(),
            "command": command(),
            "seconds": round(time.time() - started, 2),
            "step_seconds": sorted(row["step_seconds"] for row in rows)[len(rows) // 2] if rows else 0.0,
            "tokens": sum(row.get("tokens", 0) for row in rows),
            "config": json.loads(json.dumps(flat(config))),
            "curve": [{name: _short(row[name]) for name in CURVE if row.get(name) is not None} for row in rows],
            "held_out": {"before": answers(before), "after": answers(after)},
        }

    @functools.cache  # noqa: B019, a trainer lives as long as its process
    def _before(self, name: str, split: str, size: int, batch_size: int) -> tuple[Record, ...]:
        """The base's answers to a task's held-out prompts."""
        items = evaluation.items(task_of(name), split, size)
        return tuple(evaluation.evaluate(self.lm, items, batch_size=batch_size, progress=False))


def _never() -> list[Record]:
    raise AssertionError("sva.train has kept the answers of the trained model")


def _short(value: float) -> float:
    """Seven digits, which is what float32 has."""
    return float(f"{value:.7g}")


def device() -> str:
    """What the cells of this process are computed on."""
    first = jax.devices()[0]
    return "cpu" if first.platform == "cpu" else first.device_kind
