"""Comparisons over items and seeds, corrections, and the scores of sampled answers."""

import itertools

import numpy as np
import pytest

from sva.evaluation.significance import (
    detectable_difference,
    holm,
    majority_at_k,
    paired_bootstrap,
    pass_at_k,
)


def _rights(seed, share, shape):
    return np.random.default_rng(seed).random(shape) < share


def test_one_seed_agrees_with_the_normal_interval():
    a, b = _rights(0, 0.7, 400), _rights(1, 0.5, 400)
    found = paired_bootstrap(a, b)
    differences = a.astype(float) - b
    error = differences.std() / 20
    assert found.mean == pytest.approx(differences.mean())
    assert found.error == pytest.approx(error, rel=0.05)
    assert (found.low, found.high) == pytest.approx((found.mean - 1.96 * error, found.mean + 1.96 * error), abs=0.006)
    assert found.p == pytest.approx(0.001, abs=0.001)  # a z of 3.3
    assert found.detectable == pytest.approx(2.8016 * found.error, rel=1e-4)


def test_spread_between_seeds_widens_the_interval():
    base = np.zeros(200)
    alike = np.repeat(_rights(0, 0.5, 200)[None], 3, axis=0)
    apart = np.stack([_rights(0, share, 200) for share in (0.2, 0.5, 0.8)])
    assert paired_bootstrap(apart, base).error > 3 * paired_bootstrap(alike, base).error


def test_equal_models_have_a_p_of_one_and_no_width():
    a = _rights(0, 0.5, (3, 50))
    found = paired_bootstrap(a, a)
    assert found[:5] == (0, 0, 0, 1, 0)


def test_intervals_hold_what_is_true_about_as_often_as_they_say():
    held = 0
    for trial in range(200):
        a, b = _rights(trial, 0.6, 150), _rights(trial + 1000, 0.5, 150)
        found = paired_bootstrap(a, b, draws=400)
        held += found.low <= 0.1 <= found.high
    assert 180 <= held <= 199


def test_a_detectable_difference_is_found_four_times_in_five():
    rng = np.random.default_rng(0)
    estimates = rng.normal(detectable_difference(0.02), 0.02, 20_000)
    assert (np.abs(estimates) > 1.96 * 0.02).mean() == pytest.approx(0.8, abs=0.01)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="same n"):
        paired_bootstrap(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="seeds"):
        paired_bootstrap(np.ones((2, 4)), np.ones((3, 4)))


def test_holm_is_the_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(("samples", "right", "k"), [(8, 3, 1), (8, 3, 4), (5, 0, 5), (6, 4, 3), (4, 4, 1)])
def test_pass_at_k_counts_all_choices(samples, right, k):
    choices = list(itertools.combinations(range(samples), k))
    assert pass_at_k(samples, right, k) == pytest.approx(np.mean([min(choice) < right for choice in choices]))


def test_pass_at_k_refuses_more_than_there_are():
    with pytest.raises(ValueError, match="pass@9"):
        pass_at_k(8, 3, 9)


def test_majority_takes_the_commonest_answer_and_splits_ties():
    assert majority_at_k(["a", "b", "b", None], [True, False, False, False], 4) == 0
    assert majority_at_k(["a", "b", "a", "b"], [True, False, True, False], 4) == 0.5
    assert majority_at_k([None, None], [False, False], 2) == 0
    assert majority_at_k(["a", "b", "b"], [True, False, False], 1) == pytest.approx(1 / 3, abs=0.05)
