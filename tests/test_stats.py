import numpy as np
import pytest

from sva.stats import accuracy, paired_difference


def test_wilsons_interval_has_its_known_values():
    interval = accuracy(np.array([True] * 8 + [False] * 2))
    assert interval.mean == 0.8
    assert interval.low == pytest.approx(0.4902, abs=1e-4)
    assert interval.high == pytest.approx(0.9433, abs=1e-4)


def test_paired_difference_is_narrower_than_the_items_spread():
    a = np.tile([1, 1, 0, 1], 50)
    b = np.tile([1, 0, 0, 1], 50)
    interval = paired_difference(a, b)
    assert interval.mean == 0.25
    assert 0.15 < interval.low < 0.25 < interval.high < 0.35
    assert paired_difference(a, a) == (0, 0, 0)
