"""Settings of what is measured on held-out prompts: while training, and before and after it."""

import dataclasses

from sva.utils.errors import UserError, at_least


@dataclasses.dataclass(frozen=True)
class ValidationConfig:
    """Settings of the validation while training.

    The public code of Transformer-Squared evaluates two whole splits every few steps, 77 % of what it generates on
    GSM8K; a few dozen fixed prompts tell the same better and worse apart.
    """

    every: int = 0  # steps; 0: never, and the last state is the result
    first: int = 0  # steps before the first one, of the base; 1 as the public code, whose next are at 11, 21, ...
    size: int | None = 32  # the first rows of the split; null: all of them, as the public code
    split: str = "validation"  # of the task
    batch_size: int = 32  # prompts answered at a time
    patience: int | None = None  # validations without a better one before the run stops; null: it never does

    def __post_init__(self) -> None:
        at_least("validation.every", self.every, 0)
        at_least("validation.first", self.first, 0)
        if self.size is not None:
            at_least("validation.size", self.size, 1)
        at_least("validation.batch_size", self.batch_size, 1)
        if self.patience is not None:
            at_least("validation.patience", self.patience, 1)
            if not self.every:
                raise UserError("validation.patience needs validation.every above 0")


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Settings of the evaluation before and after training."""

    split: str = "test"  # of the task, before and after training
    size: int = 200  # its first rows
    batch_size: int = 32  # prompts answered at a time

    def __post_init__(self) -> None:
        at_least("evaluate.size", self.size, 1)
        at_least("evaluate.batch_size", self.batch_size, 1)
