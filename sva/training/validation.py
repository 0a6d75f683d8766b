"""Which of a run's steps to keep: accuracy on a small fixed subset, and when to stop looking for better ones."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sva.training.config.evaluation import ValidationConfig


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
    """Whether the state after `step` steps is validated, of a run of `last`; the base, step 0, is unless cfg.first."""
    is_turn = cfg.every and step >= cfg.first and (step - cfg.first) % cfg.every == 0
    return bool(cfg.every) and (is_turn or step == last)


def is_over(best: Best | None, step: int, cfg: ValidationConfig) -> bool:
    """Whether the run stops before its next step: `patience` validations without a better one, after the first."""
    if best is None or cfg.patience is None or float(best.accuracy) == -math.inf:
        return False
    return step - int(best.step) >= cfg.patience * cfg.every
