"""Settings of the policy gradient's loss; `sva.training.reinforce` has the table of algorithms."""

import dataclasses
from typing import NamedTuple

from sva.utils.errors import UserError, above, at_least

BASELINES = ("none", "leave_one_out", "mean", "group", "batch")  # see `sva.training.advantages`
GROUPED = ("leave_one_out", "mean", "group")  # compare samples of one prompt: of a single one nothing is left
PENALTIES = ("base_adapted", "adapted_base", "k1", "k2", "k3")  # see `sva.training.losses`


class Algorithm(NamedTuple):
    """One line of the table of `sva.training.reinforce`."""

    baseline: str
    is_clipped: bool = False
    is_averaged: bool = False


ALGORITHMS = {
    "reinforce": Algorithm("group"),
    "rloo": Algorithm("leave_one_out"),
    "grpo": Algorithm("group", is_clipped=True, is_averaged=True),
    "dr_grpo": Algorithm("mean", is_clipped=True),
}


@dataclasses.dataclass(frozen=True)
class ReinforceConfig:
    """Settings of the loss."""

    algorithm: str = "reinforce"  # or rloo, grpo, dr_grpo: see `sva.training.reinforce`
    baseline: str | None = None  # of `reinforce`, "group" by default; the other algorithms have their own
    kl_coef: float = 0.0  # lambda of arXiv 2501.06252; the paper tries 0, 0.1, 0.2, 0.3
    kl: str = "base_adapted"  # what lambda weighs, see `sva.training.losses`
    measure_kl: bool = False  # tell the KL even where lambda is 0, at the price of the base's own pass
    clip_low: float = 0.2  # how far a clipped ratio may fall below 1 (grpo, dr_grpo)
    clip_high: float = 0.2  # how far it may rise above 1
    epochs: int = 1  # updates a batch; more than one needs a clipped ratio

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise UserError(f"reinforce.algorithm={self.algorithm!r} is not known; use {', '.join(ALGORITHMS)}")
        known = ALGORITHMS[self.algorithm]
        if self.baseline is not None and self.baseline not in BASELINES:
            raise UserError(f"reinforce.baseline={self.baseline!r} is not known; use {', '.join(BASELINES)}")
        if self.algorithm != "reinforce" and self.baseline not in (None, known.baseline):
            raise UserError(
                f"reinforce.baseline={self.baseline} does not go with algorithm {self.algorithm}, whose baseline is "
                f"{known.baseline}; leave it out"
            )
        if self.kl not in PENALTIES:
            raise UserError(f"reinforce.kl={self.kl!r} is not known; use {', '.join(PENALTIES)}")
        at_least("reinforce.kl_coef", self.kl_coef, 0)
        above("reinforce.clip_low", self.clip_low, 0)
        above("reinforce.clip_high", self.clip_high, 0)
        at_least("reinforce.epochs", self.epochs, 1)
        if self.epochs > 1 and not known.is_clipped:
            raise UserError(
                f"reinforce.epochs={self.epochs}: {self.algorithm} is for fresh completions only; use grpo or dr_grpo"
            )

    @property
    def baseline_name(self) -> str:
        """The baseline set, or the algorithm's own."""
        return self.baseline or ALGORITHMS[self.algorithm].baseline

    @property
    def has_kl(self) -> bool:
        """Whether the base model is run at all."""
        return self.kl_coef > 0 or self.measure_kl


def check_samples(samples: int, cfg: ReinforceConfig) -> None:
    """Raises UserError where a baseline compares the samples of a prompt and there is only one."""
    name = cfg.baseline_name
    if samples < 2 and name in GROUPED:
        raise UserError(
            f"rollout.samples={samples}: baseline {name} of algorithm {cfg.algorithm} compares the samples of a prompt "
            "and needs at least 2; or use reinforce.algorithm=reinforce with baseline none or batch"
        )
