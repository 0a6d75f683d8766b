import numpy as np
import pytest
import scipy.linalg
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sva.spectral import svd as module
from sva.spectral.forms import Spectrum
from sva.spectral.svd import orthogonality_errors, reconstruction_error, require_whole, svd, truncate
from sva.utils.errors import UserError

KINDS = ("random", "condition", "deep", "rank", "exact_rank", "repeated", "zeros", "zero_rows", "identity")


def weight(out, into, kind, seed=0):
    """A weight [out, into] whose spectrum is of the kind that is named."""
    rng = np.random.default_rng(seed)
    size = min(out, into)
    s = {
        "condition": np.logspace(0, -8, size),
        "deep": np.logspace(3, -13, size),
        "rank": np.where(np.arange(size) < (size + 1) // 2, 1.0, 0.0),
        "repeated": np.array([3.0, 1e-3, 1e-6])[np.arange(size) * 3 // size],
    }.get(kind)
    if s is not None:
        u, v = (np.linalg.qr(rng.standard_normal((n, size))).Q for n in (out, into))
        return (u * s) @ v.T  # float64: in float32 the rounding would fill the small ones
    if kind == "exact_rank":
        half = (size + 1) // 2
        return (rng.integers(-3, 4, (out, half)) @ rng.integers(-3, 4, (half, into))).astype(np.float32)
    if kind == "identity":
        return np.eye(out, into, dtype=np.float32)
    w = rng.standard_normal((out, into)).astype(np.float32)
    if kind == "zeros":
        w[:] = 0
    elif kind == "zero_rows":
        w[::2] = 0
    return w


def holds(w):
    """Asserts every bound for one weight."""
    spectrum = svd(w)
    true = scipy.linalg.svdvals(w.astype(np.float64))
    assert reconstruction_error(w, spectrum) < 1e-7
    assert max(orthogonality_errors(spectrum)) < 1e-6
    assert np.abs(spectrum.s - true).max() <= 1e-7 * true[0]
    assert (np.diff(spectrum.s) <= 0).all()
    assert (spectrum.s >= 0).all()
    size = min(w.shape)
    assert [x.shape for x in spectrum] == [(w.shape[0], size), (size,), (size, w.shape[1])]
    assert all(x.dtype == np.float32 and x.flags.c_contiguous for x in spectrum)


@settings(max_examples=60, deadline=None)
@given(out=st.integers(1, 40), into=st.integers(1, 40), kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
@example(out=1, into=1, kind="zeros", seed=0)
def test_every_bound_holds_for_every_shape_and_spectrum(out, into, kind, seed):
    holds(weight(out, into, kind, seed))


@pytest.mark.parametrize("shape", [(150, 260), (260, 150), (200, 200)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_bound_holds_at_a_size_where_errors_add_up(shape, kind):
    holds(weight(*shape, kind))


@pytest.mark.parametrize("shape", [(150, 260), (260, 150)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_bound_holds_where_the_device_makes_the_first_round(shape, kind, monkeypatch):
    monkeypatch.setattr(module, "_first", module._first_on_device)
    holds(weight(*shape, kind))


def test_a_weight_that_is_not_finite_is_refused_on_the_device_too(monkeypatch):
    monkeypatch.setattr(module, "_first", module._first_on_device)
    with pytest.raises(UserError, match="NaN"):
        svd(np.full((4, 6), np.inf, np.float32))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_every_bound_holds_for_tiny_and_huge_weights(scale):
    holds((weight(30, 50, "random") * scale).astype(np.float32))


def test_blocks_change_nothing_but_rounding(monkeypatch):
    w = weight(40, 90, "condition")
    whole = svd(w)
    monkeypatch.setattr(module, "BLOCK", 40 * 7)
    holds(w)
    np.testing.assert_allclose(svd(w).s, whole.s, atol=1e-7)


def test_the_same_weight_gives_the_same_bytes():
    for kind in ("random", "exact_rank"):
        w = weight(60, 90, kind)
        for one, two in zip(svd(w), svd(w.copy()), strict=True):
            assert one.tobytes() == two.tobytes()


def test_reconstruction_and_orthogonality_errors_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    for shape in ((7, 5), (5, 7)):
        w = rng.standard_normal(shape)
        u, s, vt = (rng.standard_normal(size).astype(np.float32) for size in ((shape[0], 5), 5, (5, shape[1])))
        error = np.linalg.norm(w - (u.astype(np.float64) * s) @ vt) / np.linalg.norm(w)
        assert reconstruction_error(w, Spectrum(u, s, vt)) == pytest.approx(error, rel=1e-6)
        found = orthogonality_errors(Spectrum(u, s, vt))
        assert found == pytest.approx(
            (np.abs(u.T @ u - np.eye(5)).max(), np.abs(vt @ vt.T - np.eye(5)).max()), rel=1e-5
        )


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_truncated_spectrum_lacks_exactly_what_was_dropped_and_is_refused_where_all_is_needed(shape):
    w = weight(*shape, "random")
    whole = svd(w)
    kept, dropped = truncate(whole, 5)
    assert len(kept.s) == 5
    assert len(dropped) == 7
    lacking = w - (kept.u.astype(np.float64) * kept.s) @ kept.vt
    assert np.linalg.norm(lacking) == pytest.approx(np.linalg.norm(dropped), rel=1e-6)
    assert np.linalg.norm(lacking, 2) == pytest.approx(dropped[0], rel=1e-6)
    assert reconstruction_error(w, kept) == pytest.approx(np.linalg.norm(dropped) / np.linalg.norm(w), rel=1e-6)
    require_whole({"a": whole})
    with pytest.raises(UserError, match=r"a\.b: its spectrum keeps 5 of 12 .* delta form and merging only"):
        require_whole({"a": {"b": kept}})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(bad):
    for shape in ((3, 8), (8, 3)):
        w = weight(*shape, "random")
        w[1, 2] = bad
        with pytest.raises(UserError, match="NaN or infinite"):
            svd(w)
