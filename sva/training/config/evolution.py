"""Settings of evolution, and which of them a search can have."""

import dataclasses

from sva.utils.errors import UserError, above, at_least


@dataclasses.dataclass(frozen=True)
class EvolutionConfig:
    """Settings of `train.method=evolution`; the step size of `es` is train.lr, the bounds of `cem` are train.bound."""

    strategy: str = "es"  # evolution strategies; or "cem", the cross-entropy method
    population: int = 16  # members a step
    sigma: float = 0.1  # standard deviation of the members, of cem at the start
    elite_ratio: float = 0.25  # of cem: the share of members that the next mean and deviation are of
    smoothing: float = 0.0  # of cem: the share that the old ones keep

    def __post_init__(self) -> None:
        if self.strategy not in ("es", "cem"):
            raise UserError(f"evolution.strategy={self.strategy!r} is not known; use es or cem")
        if self.strategy == "es":
            check_es(self.population, self.sigma)
        else:
            check_cem(self.population, self.elite_ratio, self.sigma, self.smoothing)


def check_es(population: int, sigma: float) -> None:
    """Raises UserError for settings that evolution strategies cannot have."""
    at_least("evolution.population", population, 2)
    above("evolution.sigma", sigma, 0)
    if population % 2:
        raise UserError(f"evolution.population={population} must be even: es draws its noise in pairs")


def check_cem(population: int, elite_ratio: float, sigma: float, smoothing: float, *, fewest: int = 2) -> None:
    """Raises UserError for settings that the cross-entropy method cannot have; `fewest` elites are enough."""
    at_least("evolution.population", population, 2)
    above("evolution.sigma", sigma, 0)
    if not 0 < elite_ratio <= 1:
        raise UserError(f"evolution.elite_ratio={elite_ratio} must be above 0 and at most 1")
    if not 0 <= smoothing < 1:
        raise UserError(f"evolution.smoothing={smoothing} must be at least 0 and below 1")
    elites = int(elite_ratio * population)
    if elites < fewest:
        raise UserError(
            f"evolution.elite_ratio={elite_ratio} of a population of {population} makes {elites} "
            f"elites, and a spread needs at least 2; raise one to {2 / population:.3g} or "
            f"{_least(population, elite_ratio)}"
        )


def _least(population: int, elite_ratio: float) -> int:
    """The smallest population that has two elites."""
    while int(elite_ratio * population) < 2:
        population += 1
    return population
