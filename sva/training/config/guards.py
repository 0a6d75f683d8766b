"""Settings of the guards: what a run watches for."""

import dataclasses
import math

from sva.utils.errors import UserError

BOUNDS = (  # setting, metric, unit
    ("min_reward", "reward", ""),
    ("max_kl", "kl", " nats a completion"),
    ("min_entropy", "entropy", " nats a token"),
    ("min_length", "mean_length", " tokens"),
    ("max_length", "mean_length", " tokens"),
    ("max_logprob_gap", "logprob_gap", " nats"),
)


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Settings of the guards; a bound of null is not watched."""

    not_finite: str = "stop"  # at a loss, gradient or reward that is NaN or infinite; "skip": leave its step out
    on_alarm: str = "tell"  # where a bound below is crossed; or "stop"
    min_reward: float | None = None  # mean of a step
    max_kl: float | None = None  # nats a completion, to the base
    min_entropy: float | None = None  # nats a token: a policy that stopped exploring
    min_length: float | None = None  # mean tokens of a completion
    max_length: float | None = None  # mean tokens of a completion
    max_logprob_gap: float | None = (
        0.5  # nats, between sampler and trainer, the largest of a step; in float32 it stays under 1e-3
    )

    def __post_init__(self) -> None:
        if self.not_finite not in ("stop", "skip"):
            raise UserError(f"guards.not_finite={self.not_finite!r} is not known; use stop or skip")
        if self.on_alarm not in ("tell", "stop"):
            raise UserError(f"guards.on_alarm={self.on_alarm!r} is not known; use tell or stop")
        for setting, _, _ in BOUNDS:
            if math.isnan(getattr(self, setting) or 0):
                raise UserError(f"guards.{setting}=nan is no bound; write a number, or null to watch none")
