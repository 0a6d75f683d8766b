import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sva.spectral.forms import Spectrum
from sva.spectral.lowrank import low_rank
from sva.spectral.movement import movement
from sva.spectral.svd import svd


def problem(out, into, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((out, into)).astype(np.float32)
    spectrum = svd(w)
    z = rng.uniform(0.3, 1.7, len(spectrum.s)).astype(np.float32)
    u, s, vt = (np.asarray(x, np.float64) for x in spectrum)
    return spectrum, z, (u * (s * (z - 1.0))) @ vt


@settings(max_examples=30, deadline=None)
@given(
    out=st.integers(1, 16),
    into=st.integers(1, 16),
    rank=st.one_of(st.none(), st.integers(1, 16)),
    tolerance=st.sampled_from([0.0, 0.05, 0.3]),
    seed=st.integers(0, 99),
)
def test_the_stated_error_is_the_spectral_norm_of_what_is_left_out(out, into, rank, tolerance, seed):
    spectrum, z, change = problem(out, into, seed)
    b, a, error = low_rank(spectrum, z, rank=rank, tolerance=tolerance)
    left = np.linalg.norm(change - b.astype(np.float64) @ a, 2) / spectrum.s[0]
    assert left == pytest.approx(error, abs=3e-6)
    assert b.shape[1] == a.shape[0] <= (rank or 16)
    if rank is None:
        assert error <= tolerance


def test_the_largest_changes_are_kept_not_the_largest_singular_values():
    spectrum = Spectrum(np.eye(4, dtype="f4"), np.array([4, 3, 2, 1], "f4"), np.eye(4, dtype="f4"))
    b, a, error = low_rank(spectrum, [1.0, 0.9, 2.0, 3.5], rank=2)
    np.testing.assert_allclose(b @ a, np.diag([0, 0, 2, 2.5]), atol=1e-6)
    assert error == pytest.approx(0.3 / 4)
    assert low_rank(spectrum, np.ones(4)).a.shape == (0, 4)
    assert low_rank(spectrum, [1, 1, 1, 0.5], rank=3).a.shape == (1, 4)  # nothing is stored for what does not move
    zero = Spectrum(np.zeros((2, 2), "f4"), np.zeros(2, "f4"), np.zeros((2, 2), "f4"))
    assert low_rank(zero, [2.0, 2.0]).error == 0


def test_movement_is_that_of_the_weight():
    spectrum, z, change = problem(9, 6)
    w = np.asarray(spectrum.u, np.float64) * spectrum.s @ spectrum.vt
    moved = movement(z, spectrum.s)
    assert moved.frobenius == pytest.approx(np.linalg.norm(change) / np.linalg.norm(w), rel=1e-5)
    assert moved.spectral == pytest.approx(np.linalg.norm(change, 2) / np.linalg.norm(w, 2), rel=1e-5)
    assert moved.mean_abs == pytest.approx(np.abs(z - 1).mean())
    assert moved.max_abs == pytest.approx(np.abs(z - 1).max())
    assert sum(moved.shares) == pytest.approx(1)
    assert movement([1, 1, 3], [3, 2, 1]).shares == (0, 0, 1)
    assert movement([1, 1, 1], [3, 2, 1]) == (0, 0, 0, 0, (0, 0, 0))
    assert movement([2, 2], [0, 0]) == (1, 1, 0, 0, (0, 0, 0))
