"""Trains cells in one process: the model is loaded once, and what cells share is computed once.

Cells of one task and method have the same shapes whatever their number of prompts, so that the second compiles nothing.
The base answers a task's held-out prompts once a process. On a GPU products of float32 are taken in float32 (by
default they would be TF32, whose rounding differs between the forms that sample and that train).
"""

import functools
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.paper import draws
from experiments.paper.cells import Cell
from experiments.paper.records import Store, answers
from experiments.paper.revisions import CURRENT
from experiments.paper.scales import Scale
from experiments.paper.studies import Study
from experiments.paper.tasks import task as task_of
from experiments.paper.tasks import telling_apart
from sva.evaluation import evaluate as evaluation
from sva.evaluation.evaluate import Record
from sva.generation.frozen import merge_expert
from sva.generation.lm import LM
from sva.generation.load import load
from sva.generation.testing import toy_lm
from sva.tasks.base import Task
from sva.training import metrics
from sva.training.run import train
from sva.utils.provenance import command, versions

CURVE = ("reward", "accuracy", "loss", "kl", "entropy", "grad_norm", "z_spread", "logprob_gap", "mean_length")


class Trainer:
    """A loaded model and what its cells share."""

    def __init__(self, scale: Scale, directory: Path) -> None:
        """Runs are worked on under directory/runs, one a cell, from where a killed one resumes."""
        jax.config.update("jax_default_matmul_precision", "highest")
        self.scale, self.directory, self.store = scale, directory, Store(directory)

    @functools.cached_property
    def lm(self) -> LM:
        """The base model."""
        if self.scale.model == "toy":
            return toy_lm()
        # One compiled layer for all on an accelerator, where cells are shorter than what compiling thirty would take.
        return load(self.scale.model, scan_layers=device() != "cpu", progress=False)

    def run(self, cell: Cell | Study) -> dict[str, Any]:
        """The record of a cell, trained from the start or from where a killed process left it, or of a study."""
        if isinstance(cell, Study):
            return self._measured(cell)
        started = time.time()
        run_dir = self.directory / "runs" / cell.key
        task = telling_apart(cell.routes) if cell.routes else task_of(cell.task)
        config = cell.started_in(run_dir)
        held_out = evaluation.items(task, config.evaluate.split, config.evaluate.size)
        before = self._before(task, config.evaluate.split, config.evaluate.size, config.evaluate.batch_size)
        run_dir.mkdir(parents=True, exist_ok=True)
        evaluation.kept(run_dir / "before.jsonl", held_out, lambda: list(before))
        expert, result = train(config, lm=self.lm, task=task, progress=False)
        after = evaluation.kept(run_dir / "after.jsonl", held_out, _never)
        rows = metrics.read(run_dir / "metrics.jsonl")
        if cell.is_kept:
            expert.save(self.store.expert_path(cell))
        shutil.rmtree(run_dir)
        sampled = {}
        if cell.is_sampled:
            adapted = merge_expert(self.lm, expert, progress=False)
            drawn = self._drawn_before(task, config.evaluate.split, config.evaluate.size)
            sampled = {"sampled": {"before": drawn, "after": draws.drawn(adapted, held_out)}}
        return {**record_of(cell, result, rows, made_with(started), before, after), **sampled}

    def tuned(self, cell: Cell) -> LM:
        """The base with what this cell trains merged into it; nothing of it is kept on disk."""
        run_dir = self.directory / "runs" / f"tuned-{cell.key}"
        expert, _ = train(cell.started_in(run_dir), lm=self.lm, task=task_of(cell.task), progress=False)
        shutil.rmtree(run_dir)
        return merge_expert(self.lm, expert, progress=False)

    def _measured(self, study: Study) -> dict[str, Any]:
        """The record of a study of experts that are trained already."""
        # What cells do not need is imported here.
        from experiments.paper import measure, measure_many

        started = time.time()
        found = {**measure.MEASURES, **measure_many.MEASURES}[study.method](self, study)
        return {**identity(study), "config": study.flat, **found, **made_with(started)}

    @functools.cache  # noqa: B019, a trainer lives as long as its process
    def _before(self, task: Task, split: str, size: int, batch_size: int) -> tuple[Record, ...]:
        """The base's answers to a task's held-out prompts."""
        items = evaluation.items(task, split, size)
        return tuple(evaluation.evaluate(self.lm, items, batch_size=batch_size, progress=False))

    @functools.cache  # noqa: B019, as above
    def _drawn_before(self, task: Task, split: str, size: int) -> dict[str, Any]:
        """The answers that are drawn from the base to a task's held-out prompts."""
        return draws.drawn(self.lm, evaluation.items(task, split, size))


def record_of(
    cell: Cell,
    result: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    made: Mapping[str, Any],
    before: Iterable[Record],
    after: Iterable[Record],
) -> dict[str, Any]:
    """The record of a trained cell.

    Args:
      result: of its run, as in result.json.
      rows: of its metrics.
      made: as `made_with` has it.
      before, after: the held-out answers of the base and of the trained model.
    """
    return {
        **identity(cell),
        **{name: getattr(cell, name) for name in ("task", "examples", "seed", "lr", "split")},
        **{name: result[name] for name in ("n", "before", "after", "gain", "parameters", "fingerprint", "warnings")},
        **made,
        "step_seconds": sorted(row["step_seconds"] for row in rows)[len(rows) // 2] if rows else 0.0,
        "tokens": sum(row.get("tokens", 0) for row in rows),
        "config": cell.flat,
        "curve": [{name: _short(row[name]) for name in CURVE if row.get(name) is not None} for row in rows],
        "held_out": {"before": answers(before), "after": answers(after)},
    }


def identity(cell: Cell | Study) -> dict[str, Any]:
    """What a record says of which cell it is."""
    about = {"cell": cell.name, "stage": cell.stage, "method": cell.method, "scale": cell.scale.name, "key": cell.key}
    return about | {"revisions": CURRENT._asdict()}


def made_with(started: float) -> dict[str, Any]:
    """What a record says of how it was made."""
    seconds = round(time.time() - started, 2)
    return {"device": device(), "versions": versions(), "command": command(), "seconds": seconds}


def _never() -> list[Record]:
    raise AssertionError("sva.train has kept the answers of the trained model")


def _short(value: float) -> float:
    """Seven digits, which is what float32 has."""
    return float(f"{value:.7g}")


def device() -> str:
    """What the cells of this process are computed on."""
    first = jax.devices()[0]
    return "cpu" if first.platform == "cpu" else first.device_kind
