"""Settings of the training loop and the optimiser."""

import dataclasses
import math

from sva.utils.errors import UserError, above, at_least

METHODS = ("policy_gradient", "next_token", "evolution")
PARAM_DTYPES = ("float32", "bfloat16")
OPTIMIZERS = ("adam", "adamw")
SCHEDULES = ("constant", "cosine")
DRAWS = ("passes", "independent")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of the loop and the optimiser."""

    method: str = "policy_gradient"  # next_token: on given answers; evolution: `training.search`, without a gradient
    steps: int = 12  # updates of a whole run
    examples: int | None = None  # different training prompts, drawn by the seed; null: the whole split
    draws: str = "passes"  # every row once before any twice; "independent": as the public code, see `drawn_indices`
    init_noise: float = 0.0  # standard deviation around the start; 0.01 as the public code, near the base and not at it
    lr: float = 1e-2  # for z; LoRA takes a tenth to a hundredth of it
    optimizer: str = "adam"  # or "adamw"
    weight_decay: float = 0.0  # of adamw, towards 0 and times the learning rate
    schedule: str = "constant"  # or "cosine": the learning rate falls to 0 over train.steps
    clip_norm: float = 1e-3  # of the joint gradient, before Adam; the paper's (table 6)
    micro_batch: int = 2  # prompts whose completions' activations are held at once
    remat: bool = True  # recompute each layer in the backward pass: a third more work, a fraction of the memory
    param_dtype: str = "float32"  # of raw values and Adam's state; "bfloat16" as the public code, see `optimizers`
    bound: float | None = None  # raw values are held this near to their family's centre, see `update.apply_gradient`

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"train.method={self.method!r} is not known; use {', '.join(METHODS)}")
        at_least("train.steps", self.steps, 0)
        if self.examples is not None:
            at_least("train.examples", self.examples, 1)
        if self.draws not in DRAWS:
            raise UserError(f"train.draws={self.draws!r} is not known; use {' or '.join(DRAWS)}")
        at_least("train.init_noise", self.init_noise, 0)
        above("train.lr", self.lr, 0)
        if not math.isfinite(self.lr):
            raise UserError(f"train.lr={self.lr} is not finite; write a number such as 1e-2")
        if self.optimizer not in OPTIMIZERS:
            raise UserError(f"train.optimizer={self.optimizer!r} is not known; use {' or '.join(OPTIMIZERS)}")
        at_least("train.weight_decay", self.weight_decay, 0)
        if self.weight_decay and self.optimizer != "adamw":
            raise UserError(f"train.weight_decay={self.weight_decay} needs train.optimizer=adamw")
        if self.schedule not in SCHEDULES:
            raise UserError(f"train.schedule={self.schedule!r} is not known; use {' or '.join(SCHEDULES)}")
        above("train.clip_norm", self.clip_norm, 0)
        at_least("train.micro_batch", self.micro_batch, 1)
        if self.param_dtype not in PARAM_DTYPES:
            raise UserError(f"train.param_dtype={self.param_dtype!r} is not known; use {' or '.join(PARAM_DTYPES)}")
        if self.optimizer == "adamw" and self.param_dtype != "float32":
            raise UserError(f"train.optimizer=adamw is float32 only; leave out train.param_dtype={self.param_dtype}")
        if self.bound is not None:
            above("train.bound", self.bound, 0)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step."""
        if self.schedule == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * step / max(self.steps, 1))) / 2
