"""Settings of the training state on disk."""

import dataclasses

from sva.utils.errors import at_least


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often the state is saved; a run that was killed does the steps after the last one again, the same way.

    A run of one process that is interrupted or fails saves the state of its last finished step as well.
    """

    every: int = 1  # steps; more for `full`, whose state is three times the size of the weights it changes

    def __post_init__(self) -> None:
        at_least("checkpoint.every", self.every, 1)
