"""Settings of the training state on disk."""

import dataclasses

from sva.utils.errors import at_least


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often the state is saved; a run resumes at the last one, and does the steps after it again, the same way."""

    every: int = 1  # steps; more for `full`, whose state is three times the size of the weights it changes

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 1)
