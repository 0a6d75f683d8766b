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

from sva.training.reinforce import Batch, ReinforceConfig
from sva.utils.errors import UserError
from sva.utils.files import save_tensors, write_atomically, write_json


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Settings of the guards; a bound of null is not watched."""

    not_finite: str = (
        "stop"  # what a loss, gradient or reward that is NaN or infinite does; "skip": leaves its step out
    )
    on_alarm: str = "tell"  # or "stop"
    min_reward: float | None = None  # mean of a step
    max_kl: float | None = None  # nats a completion
    min_entropy: float | None = None  # nats a token: a policy that stopped exploring
    min_length: float | None = None  # mean tokens of a completion
    max_length: float | None = None
    max_logprob_gap: float | None = 0.5  # nats, the largest of a step; in float32 it stays under 1e-3

    def __post_init__(self) -> None:
        if self.not_finite not in ("stop", "skip"):
            raise UserError(f"guards.not_finite={self.not_finite!r} is not known; use stop or skip")
        if self.on_alarm not in ("tell", "stop"):
            raise UserError(f"guards.on_alarm={self.on_alarm!r} is not known; use tell or stop")
        for setting, _, _ in _BOUNDS:
            if math.isnan(getattr(self, setting) or 0):
                raise UserError(f"guards.{setting}=nan is no bound; write a number, or null to watch none")


_BOUNDS = (  # setting, metric, unit
    ("min_reward", "reward", ""),
    ("max_kl", "kl", " nats a completion"),
    ("min_entropy", "entropy", " nats a token"),
    ("min_length", "mean_length", " tokens"),
    ("max_length", "mean_length", " tokens"),
    ("max_logprob_gap", "logprob_gap", " nats"),
)


def check_kl_guard(cfg: GuardConfig, loss: ReinforceConfig) -> None:
    """Raises UserError where an alarm is asked for a KL that nobody computes."""
    if cfg.max_kl is not None and not loss.has_kl:
        raise UserError(f"guards.max_kl={cfg.max_kl} needs a KL: set reinforce.kl_coef or reinforce.measure_kl=true")


def alarms(row: Mapping[str, Any], cfg: GuardConfig) -> list[str]:
    """One line a bound that this step's row of metrics breaks; metrics that the row lacks break none."""
    lines = []
    for setting, metric, unit in _BOUNDS:
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

    With the run's last state, which is that before the step, `load_batch` lets the update be repeated exactly.
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
