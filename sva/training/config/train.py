"""Settings of the training loop and the optimiser."""

import dataclasses
import math

from sva.utils.errors import UserError, above, at_least

METHODS = ("policy_gradient", "next_token", "evolution")
PARAM_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of the loop and the optimiser."""

    method: str = "policy_gradient"  # next_token: on given answers; evolution: `training.search`, without a gradient
    steps: int = 12
    examples: int | None = None  # different training prompts, drawn by the seed; null: the whole split
    lr: float = 1e-2
    clip_norm: float = 1e-3  # of the joint gradient, before Adam; the paper's (table 6)
    micro_batch: int = 2  # prompts whose completions' activations are held at once
    remat: bool = True  # recompute each layer in the backward pass: a third more work, a fraction of the memory
    param_dtype: str = "float32"  # of raw values and Adam's state; "bfloat16" as the public code, see `optimizers`
    bound: float | None = None  # raw values are held this near to their family's centre, see `apply_gradient`

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"train.method={self.method!r} is not known; use {', '.join(METHODS)}")
        at_least("train.steps", self.steps, 0)
        if self.examples is not None:
            at_least("train.examples", self.examples, 1)
        above("train.lr", self.lr, 0)
        if not math.isfinite(self.lr):
            raise UserError(f"train.lr={self.lr} is not finite; write a number such as 1e-2")
        above("train.clip_norm", self.clip_norm, 0)
        at_least("train.micro_batch", self.micro_batch, 1)
        if self.param_dtype not in PARAM_DTYPES:
            raise UserError(f"train.param_dtype={self.param_dtype!r} is not known; use {' or '.join(PARAM_DTYPES)}")
        if self.bound is not None:
            above("train.bound", self.bound, 0)
