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
    n, z = len(correct), 1.959964
    if n == 0:
        return Interval(float("nan"), 0.0, 1.0)
    p = float(np.mean(correct))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = float(z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def paired_difference(a: np.ndarray, b: np.ndarray, *, seed: int = 0, draws: int = 10_000) -> Interval:
    """Mean of a - b over the same items with a paired bootstrap's 95 % percentile interval; a, b [n]."""
    differences = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    rng = np.random.default_rng(seed)
    n = len(differences)
    means = np.array([differences[rng.integers(0, n, n)].mean() for _ in range(draws)])
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(differences.mean()), float(low), float(high))


def percent(interval: dict[str, float]) -> str:
    """'72.0 % [65.3, 77.9]'."""
    return f"{interval['mean']:.1%} [{interval['low']:.1%}, {interval['high']:.1%}]"
