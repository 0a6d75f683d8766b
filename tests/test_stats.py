import numpy as np
import pytest

from sva.evaluation.stats import accuracy, paired_difference


def test_wilsons_interval_has_its_known_values():
    interval = accuracy(np.array([True] * 8 + [False] * 2))
    assert interval.mean == 0.8
    assert interval.low == pytest.approx(0.4902, abs=1e-4)
    assert interval.high == pytest.approx(0.9433, abs=1e-4)


def test_an_interval_holds_its_mean_also_at_the_ends():
    for correct in (np.zeros(3, bool), np.ones(3, bool), np.ones(1, bool)):
        interval = accuracy(correct)
        assert 0 <= interval.low <= interval.mean <= interval.high <= 1
    assert accuracy(np.zeros(10, bool)).high == pytest.approx(0.2775, abs=1e-4)


def test_the_paired_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        base = rng.random(60) < 0.4
        better = base | (rng.random(60) < 0.3)  # true gain 0.6 * 0.3
        interval = paired_difference(better, base, seed=seed, draws=400)
        covered += interval.low <= 0.18 <= interval.high
    assert 0.90 < covered / 200 < 0.99  # 95 %, less what a percentile interval loses at n = 60


def test_paired_difference_is_narrower_than_the_items_spread():
    a = np.tile([1, 1, 0, 1], 50)
    b = np.tile([1, 0, 0, 1], 50)
    interval = paired_difference(a, b)
    assert interval.mean == 0.25
    assert 0.15 < interval.low < 0.25 < interval.high < 0.35
    assert paired_difference(a, a) == (0, 0, 0)


def test_a_seed_gives_the_same_interval_and_one_item_is_its_own():
    rng = np.random.default_rng(1)
    a, b = rng.random(1319) < 0.6, rng.random(1319) < 0.4
    assert paired_difference(a, b, seed=3) == paired_difference(a, b, seed=3)
    draws = np.random.default_rng(3)  # the resamples by hand, in the order of the generator
    items = a.astype(float) - b
    means = [items[draws.integers(0, 1319, 1319)].mean() for _ in range(300)]
    assert paired_difference(a, b, seed=3, draws=300)[1:] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1e-12)
    assert paired_difference(a[:1], b[:1]) == (items[0], items[0], items[0])
