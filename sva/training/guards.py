"""What is watched while an expert trains: steps that went wrong, kept for replay, and alarms."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from sva.training.config.guards import BOUNDS, GuardConfig
from sva.training.reinforce import Batch
from sva.utils.errors import UserError
from sva.utils.files import save_tensors, write_atomically, write_json


def alarms(row: Mapping[str, Any], cfg: GuardConfig) -> list[str]:
    """One line a bound that this step's row of metrics breaks; metrics that the row lacks break none."""
    lines = []
    for setting, metric, unit in BOUNDS:
        bound, value = getattr(cfg, setting), row.get(metric)
        if bound is None or value is None:
            continue
        is_low = setting.startswith("min")
        if value < bound if is_low else value > bound:
            side = "below" if is_low else "above"
            lines.append(f"{metric} {value:.4g}{unit} is {side} guards.{setting}={bound}")
    return lines


def is_finite(row: Mapping[str, Any]) -> bool:
    """Whether every loss, gradient and reward of a row is a number."""
    return all(math.isfinite(row[name]) for name in ("loss", "grad_norm", "reward") if name in row)


def keep_batch(directory: Path, step: int, batch: Batch | None, about: Mapping[str, Any]) -> Path:
    """The path of what is written: step-N.safetensors of the batch, or step-N.json alone where there is none.

    With the run's last state `load_batch` lets the update of a step that was not finite be repeated exactly (its first,
    where a batch is learned from several times). Where an alarm stopped the run, the last state is that after the step.
    """
    note = directory / f"step-{step:06d}.json"
    write_json(note, json.loads(json.dumps({"step": step, **about}, default=str)))
    if batch is None:
        return note
    arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    tensors = {name: np.asarray(x) for name, x in arrays.items() if x is not None}
    path = note.with_suffix(".safetensors")
    write_atomically(path, lambda path: save_tensors(path, tensors, {}))
    return path


def load_batch(path: Path) -> Batch:
    """The batch that `keep_batch` wrote.

    Raises:
      UserError: no such file.
    """
    if not path.is_file():
        raise UserError(f"no batch at {path}; a run keeps those that went wrong under failed/")
    return Batch(**{name: jnp.asarray(x) for name, x in safetensors.numpy.load_file(path).items()})
