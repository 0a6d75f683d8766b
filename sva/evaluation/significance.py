"""What a difference between trained models is worth: over items and seeds, over a table, and with n items at all."""

import functools
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

_NORMAL_975, _NORMAL_80 = 1.959964, 0.841621  # quantiles of the normal distribution


class Comparison(NamedTuple):
    """A paired difference as a fraction, its 95 % interval, and what it is judged by."""

    mean: float
    low: float
    high: float
    p: float  # two-sided, that the difference is 0
    error: float  # standard error of the mean
    detectable: float  # the difference that would show four times in five
    seeds: int  # that it rests on; with one, the interval is over items alone
    n: int  # items


def paired_bootstrap(a: np.ndarray, b: np.ndarray, *, seed: int = 0, draws: int = 10_000) -> Comparison:
    """Mean of a - b by a bootstrap that draws items and seeds, both paired and crossed.

    Each draw takes S of the S seeds and n of the n items with replacement, the same items for every seed, as every
    seed answers the same questions (the pigeonhole bootstrap of Owen, 2007, "The pigeonhole bootstrap"). With three
    seeds the spread between them is known roughly at best, so that intervals are more often too short than too long.
    p is twice the smaller share of draws on either side of 0, each counted with one draw more (Davison and Hinkley,
    1997).

    Args:
      a, b: [S, n], rights (or scores) of S seeds on n items; [n] counts as one seed, and one seed stands against all
        of the other's, as a base model does that is not trained.
    Raises:
      ValueError: other shapes, or none of either.
    """
    first, second = (np.atleast_2d(np.asarray(x, np.float64)) for x in (a, b))
    if first.ndim != 2 or first.shape[1] != second.shape[1] or 0 in first.shape or 0 in second.shape:
        raise ValueError(f"a {np.shape(a)} and b {np.shape(b)} must be [S, n] of the same n")
    if 1 not in (first.shape[0], second.shape[0]) and first.shape[0] != second.shape[0]:
        raise ValueError(f"a has {first.shape[0]} seeds and b {second.shape[0]}; give the same seeds, or one")
    differences = first - second
    seeds, n = differences.shape
    # Whole numbers until the end, so that a draw whose differences cancel is 0 and no rounding of it.
    of_items, of_seeds = _counts(n, draws, seed), _counts(seeds, draws, seed + 1)
    means = np.einsum("DS,DS->D", of_seeds, of_items @ differences.T) / (n * seeds)
    low, high = np.percentile(means, [2.5, 97.5])
    side = min((means <= 0).sum(), (means >= 0).sum())
    error = float(means.std())
    return Comparison(
        float(differences.mean()),
        float(low),
        float(high),
        float(min(1.0, 2 * (side + 1) / (draws + 1))),
        error,
        detectable_difference(error),
        seeds,
        n,
    )


@functools.lru_cache(maxsize=4)
def _counts(n: int, draws: int, seed: int) -> np.ndarray:
    """[draws, n] float32, how often each of n things is drawn in n draws with replacement.

    Kept, because a table makes dozens of comparisons over the same number of items.
    """
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws).astype(np.float32)


def detectable_difference(error: float) -> float:
    """The true difference that a two-sided test at 5 % finds in 80 % of experiments with this standard error.

    (1.96 + 0.84) times the error; the normal approximation, which the hundreds of items here allow.
    """
    return (_NORMAL_975 + _NORMAL_80) * error


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for the number of them, in their order (Holm, 1979): compare with 0.05 as if there were one.

    The k-th smallest of m is multiplied by m - k + 1, and is no smaller than the one before it; at most 1.
    """
    corrected = [0.0] * len(p)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - place) * p[index]))
        corrected[index] = largest
    return corrected


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that k of the samples, drawn without replacement, hold a right one: 1 - C(n - c, k) / C(n, k).

    The unbiased estimator of arXiv 2107.03374 (section 2.1).

    Raises:
      ValueError: k is not between 1 and `samples`, or `right` not between 0 and `samples`.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"pass@{k} of {samples} samples with {right} right does not exist")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_at_k(
    answers: Sequence[Hashable | None], right: Sequence[bool], k: int, *, seed: int = 0, draws: int = 1_000
) -> float:
    """The chance that the commonest answer among k of the samples is right; of equally common ones each counts alike.

    Self-consistency (arXiv 2203.11171). Samples without an answer (None) do not vote; where nobody does, the vote is
    wrong. With k below the number of samples, the mean over `draws` choices of k of them.

    Raises:
      ValueError: k is not between 1 and the number of samples, or `right` is of another number.
    """
    if not 1 <= k <= len(answers) or len(right) != len(answers):
        raise ValueError(f"a majority of {k} of {len(answers)} answers and {len(right)} verdicts does not exist")
    if k == len(answers):
        return _vote(answers, right, range(k))
    rng = np.random.default_rng(seed)
    return float(np.mean([_vote(answers, right, rng.permutation(len(answers))[:k]) for _ in range(draws)]))


def _vote(answers: Sequence[Hashable | None], right: Sequence[bool], chosen: Sequence[int] | np.ndarray) -> float:
    """The share of right ones among the commonest answers of the chosen samples."""
    votes = Counter(answers[i] for i in chosen if answers[i] is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    leading = [answer for answer, count in votes.items() if count == most]
    verdicts = {answers[i]: bool(right[i]) for i in chosen}
    return sum(verdicts[answer] for answer in leading) / len(leading)
