"""Which of a run's steps to keep: accuracy on a small fixed subset, and when to stop looking for better ones."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sva.utils.errors import UserError, at_least


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Settings of the validation while training.

    The public code of Transformer-Squared evaluates two whole splits every few steps, 77 % of what it generates on
    GSM8K; a few dozen fixed prompts tell the same better and worse apart.
    """

    every: int = 0  # steps; 0: never, and the last state is the result
    size: int = 32  # the first rows of the split
    split: str = "validation"
    batch_size: int = 32
    patience: int | None = None  # validations without a better one before the run stops; null: it never does

    def __post_init__(self) -> None:
        at_least("validation.every", self.every, 0)
        at_least("validation.size", self.size, 1)
        at_least("validation.batch_size", self.batch_size, 1)
        if self.patience is not None:
            at_least("validation.patience", self.patience, 1)
            if not self.every:
                raise UserError("validation.patience needs validation.every above 0")


@struct.dataclass
class Best:
    """The best state so far."""

    raw: Any
    accuracy: jax.Array  # [] float32
    step: jax.Array  # [] int32, updates done before it


def nothing_yet(raw: Any) -> Best:
    """What the first validation improves on."""
    return Best(raw, jnp.full((), -jnp.inf, jnp.float32), jnp.zeros((), jnp.int32))


def better(best: Best, raw: Any, accuracy: float, step: int) -> Best:
    """The better of both; of equals the earlier."""
    if accuracy > float(best.accuracy):
        return Best(raw, jnp.asarray(accuracy, jnp.float32), jnp.asarray(step, jnp.int32))
    return best


def is_due(step: int, last: int, cfg: ValidationConfig) -> bool:
    """Whether the state after `step` steps is validated, of a run of `last`; the base, step 0, is."""
    return bool(cfg.every) and (step % cfg.every == 0 or step == last)


def is_over(best: Best | None, step: int, cfg: ValidationConfig) -> bool:
    """Whether the run stops before its next step: `patience` validations without a better one."""
    if best is None or cfg.patience is None:
        return False
    return step - int(best.step) >= cfg.patience * cfg.every
