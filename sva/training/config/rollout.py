"""Settings of the rollout."""

import dataclasses

from sva.generation.temperature import check_temperature
from sva.utils.errors import UserError, at_least

_ROWS = 64  # at a time, on each device: many more decode hardly faster


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Settings of one step's rollout.

    At a temperature T the policy is softmax(logits / T), in the rollout and in the update alike: in the loss, the
    clipped ratio, the KL (the base's log-probs take the same T), the entropy and the gap of log-probs; see `Batch`.
    There is no top-k, top-p or min-p here, because a policy that gives a token no chance has no log-prob of it.
    Deviation at T = 0: greedy answers are no draw of any policy; as in the public code of Transformer-Squared, which
    samples so, the update takes log-probs at T = 1.
    """

    prompts: int = 8  # different prompts a step
    samples: int = 8  # completions of each
    max_new_tokens: int | None = None  # the task's own budget by default
    temperature: float = 1.0  # 0: the likeliest token, as the public code
    score_eos: bool = True  # train the end token too; the public code never does
    rows: int | None = None  # completions drawn at a time, which sets the peak memory; by default all, 64 a device
    form: str = (
        "dense"  # merged once a step, beside the base; "factored": on the spectra alone, which spares the weights
    )

    def __post_init__(self) -> None:
        at_least("rollout.prompts", self.prompts, 1)
        at_least("rollout.samples", self.samples, 1)
        if self.max_new_tokens is not None:
            at_least("rollout.max_new_tokens", self.max_new_tokens, 1)
        if self.rows is not None:
            at_least("rollout.rows", self.rows, 1)
        at_least("rollout.temperature", self.temperature, 0)
        if self.temperature > 0:
            check_temperature("rollout.temperature", self.temperature)
        if self.temperature == 0 and self.samples > 1:
            raise UserError(
                f"rollout.samples={self.samples} greedy completions of one prompt are all the same; set "
                "rollout.samples=1 or a temperature above 0"
            )
        if self.form not in ("dense", "factored"):
            raise UserError(f"rollout.form={self.form!r} is not known; use dense or factored")

    def rows_at_work(self, shards: int = 1) -> int:
        """Completions drawn at a time on a mesh that divides rows into so many shards."""
        return min(self.prompts * self.samples, self.rows or _ROWS * shards)

    @property
    def is_tempered(self) -> bool:
        """Whether the update divides logits at all; greedy answers are taken at a temperature of 1."""
        return self.temperature not in (0, 1)
