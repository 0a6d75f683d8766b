"""Intervals for accuracies and for paired differences."""

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate and its 95 % interval, as fractions."""

    mean: float
    low: float
    high: float


def accuracy(correct: np.ndarray) -> Interval:
    """Share of right answers with Wilson's 95 % interval (Wilson 1927), from [n] booleans."""
    from scipy import stats  # here, because its import takes a second

    n = len(correct)
    if n == 0:
        return Interval(float("nan"), 0.0, 1.0)
    low, high = stats.binomtest(int(np.sum(correct)), n).proportion_ci(0.95, method="wilson")
    mean = float(np.mean(correct))
    return Interval(mean, min(mean, float(low)), max(mean, float(high)))  # rounding can put an end beside the mean


def paired_difference(a: np.ndarray, b: np.ndarray, *, seed: int = 0, draws: int = 10_000) -> Interval:
    """Mean of a - b over the same items with a paired bootstrap's 95 % percentile interval; a, b [n]."""
    from scipy import stats

    differences = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    mean, n = float(differences.mean()), len(differences)
    if n == 1:
        return Interval(mean, mean, mean)
    low, high = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=draws,
        batch=max(1, 1_000_000 // n),  # draws at once: bounds the memory and changes no number
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(low), float(high))


def percent(interval: dict[str, float]) -> str:
    """'72.0 % [65.3, 77.9]'."""
    return f"{interval['mean']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"
