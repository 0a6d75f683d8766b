"""What dropping components costs: the bound, k, bytes, and the form that follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sva.spectral.forms import Delta, Spectrum, delta, merge
from sva.spectral.mixing import DeltaSlots, FactoredSlots, bank, mix, mixture, slots
from sva.spectral.serving_plan import bucket, plan, summary
from sva.spectral.svd import svd
from sva.utils.errors import UserError


def _spectrum(out, into, seed=0):
    return svd(np.random.default_rng(seed).standard_normal((out, into)))


def _change(spectrum, z, components=None):
    """The delta form's change of W, in float64."""
    form = delta(Spectrum(*map(np.asarray, spectrum)), np.asarray(z), components)
    return (np.asarray(form.u, np.float64) * np.asarray(form.d, np.float64)) @ np.asarray(form.vt, np.float64)


def _experts(spectrum, count, seed):
    rng = np.random.default_rng(seed)
    rank = len(spectrum.s)
    spread = 10.0 ** rng.uniform(-4, 0, rank)
    return [(1 + spread * rng.standard_normal(rank)).astype(np.float32) for _ in range(count)]


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 60),
    into=st.integers(1, 60),
    tolerance=st.sampled_from([0.0, 1e-3, 1e-2, 1e-1, 1.0]),
    seed=st.integers(0, 999),
)
def test_the_bound_is_the_spectral_norm_of_what_is_left_out(out, into, tolerance, seed):
    spectrum = _spectrum(out, into, seed)
    zs = _experts(spectrum, 3, seed)
    found = plan({"w": spectrum}, [{"w": z} for z in zs], tolerance, exact_base=True)["w"]
    slack = 1e-5 * spectrum.s[0] * (1 + max(np.abs(z - 1).max() for z in zs))  # U and V are orthonormal to 1e-6
    lost = [_change(spectrum, z) - _change(spectrum, z, found.components) for z in zs]
    for expert, difference in enumerate(lost):
        norm = np.linalg.norm(difference, 2)
        assert abs(norm - found.losses[expert]) <= slack  # of one expert attained
        assert found.bound(np.eye(3)[expert]) == pytest.approx(found.losses[expert])
        assert found.losses[expert] <= tolerance * spectrum.s[0] * (1 + 1e-6)
    for alphas in np.random.default_rng(seed).uniform(-2, 2, (4, 3)):
        z = np.asarray(mix([{"w": z} for z in zs], alphas)["w"])
        mixed = _change(spectrum, z) - _change(spectrum, z, found.components)
        assert np.linalg.norm(mixed, 2) <= found.bound(alphas) + 4 * slack


def test_the_bound_of_a_mixture_is_attained_where_experts_agree():
    spectrum = _spectrum(20, 12)
    z = 1 + np.linspace(0.5, 0.01, 12, dtype=np.float32)
    found = plan({"w": spectrum}, [{"w": z}, {"w": z}], 0.2, exact_base=True)["w"]
    assert 0 < len(found.components) < 12
    mixed = np.asarray(mix([{"w": z}, {"w": z}], [0.5, 2.0])["w"])
    lost = _change(spectrum, mixed) - _change(spectrum, mixed, found.components)
    assert np.linalg.norm(lost, 2) == pytest.approx(found.bound([0.5, 2.0]), rel=1e-4)


def test_bfloat16_factors_lose_no_more_than_their_norms_allow():
    spectrum = _spectrum(96, 64)
    z = _experts(spectrum, 1, 5)[0]
    half = Spectrum(*(np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (spectrum.u, spectrum.s)), None)
    half = Spectrum(half.u, spectrum.s, np.asarray(jnp.asarray(spectrum.vt, jnp.bfloat16), np.float32))
    found = plan({"w": spectrum}, [{"w": z}], 0.05, exact_base=True)["w"]
    lost = _change(half, z) - _change(half, z, found.components)
    assert np.linalg.norm(lost, 2) <= found.losses[0] * (1 + 5e-3)


def test_components_are_the_most_moved_of_any_expert_and_fill_their_bucket():
    spectrum = Spectrum(np.eye(32, dtype=np.float32), np.full(32, 2, np.float32), np.eye(32, dtype=np.float32))
    zs = np.ones((2, 32), np.float32)
    zs[0, [3, 9]] = 1.5, 0.5
    zs[1, [9, 20]] = 1.2, 0.2
    zs[1, 11] = 1.001
    found = plan({"w": spectrum}, [{"w": z} for z in zs], 0.01)["w"]
    assert len(found.components) == 8
    assert {3, 9, 20, 11} <= set(found.components)
    np.testing.assert_array_equal(found.losses, [0, 0])
    # With nothing to fill the bucket, what stays under the tolerance is lost, and known.
    zs[1, 12:20] = 1.001
    zs[0, 21:27] = 1.3
    found = plan({"w": spectrum}, [{"w": z} for z in zs], 0.01)["w"]
    assert len(found.components) == 12
    np.testing.assert_allclose(found.losses, [0, 0.002], rtol=1e-3)


def test_nothing_moved_needs_no_component():
    zero = svd(np.zeros((6, 4)))
    spectra = {"zero": zero, "left out": _spectrum(6, 4)}
    found = plan(spectra, [{"zero": np.full(4, 3, np.float32)}], 0.0)
    for one in found.values():
        assert one.form == "delta"
        assert (len(one.components), one.extra_bytes) == (0, 0)
        np.testing.assert_array_equal(one.losses, [0])
    assert "k 0" in summary(found)


def test_buckets_are_few_and_hold_what_they_are_asked_for():
    sizes = [bucket(k, 576) for k in range(577)]
    assert all(size >= k for k, size in enumerate(sizes))
    assert sizes == sorted(sizes)
    assert sorted(set(sizes)) == [0, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 576]
    assert bucket(5, 4) == 4


def test_layers_of_one_kind_share_their_form_and_k():
    spectra = {name: _spectrum(40, 30, seed) for seed, name in enumerate(("0.up", "1.up", "0.down"))}
    z = {name: np.ones(30, np.float32) for name in spectra}
    z["1.up"][:10] = 2
    alone = plan(spectra, [z], 0.0)
    assert [len(alone[name].components) for name in spectra] == [0, 12, 0]
    shared = plan(spectra, [z], 0.0, kind=lambda name: name[2:])
    assert [len(shared[name].components) for name in spectra] == [12, 12, 0]
    assert {one.form for one in shared.values()} == {"delta"}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_predicted_bytes_are_those_of_the_arrays(dtype):
    u, s, vt = (jnp.asarray(x) for x in _spectrum(40, 30))
    spectrum = Spectrum(u.astype(dtype), s, vt.astype(dtype))
    z = np.ones(30, np.float32)
    z[:10] = 2
    found = plan({"w": spectrum}, [{"w": z}], 0.0)["w"]
    w = merge(spectrum, jnp.asarray(z))
    form = delta(spectrum, jnp.asarray(z), found.components)
    assert isinstance(form, Delta)
    held = sum(x.size * w.dtype.itemsize for x in (w, *jax.tree.leaves(form)))
    assert found.form == "delta"
    assert found.token_bytes["delta"] == held
    assert found.token_bytes["dense"] == w.nbytes
    assert found.extra_bytes == held - w.nbytes
    assert found.token_bytes["factored"] == (u.size + s.size + vt.size) * w.dtype.itemsize


def test_the_form_is_the_one_of_fewer_bytes_and_factored_loses_nothing():
    spectrum = _spectrum(96, 96)
    for moved, form in ((30, "delta"), (70, "factored")):
        z = np.full(96, 1 + 1e-5, np.float32)
        z[:moved] = 2
        found = plan({"w": spectrum}, [{"w": z}], 1e-3)["w"]
        assert found.form == form
        assert found.token_bytes[form] == min(found.token_bytes["delta"], found.token_bytes["factored"])
        assert (found.bound([1.0]) > 0) == (form == "delta")
        assert form in summary({"w": found}) or "dense + delta" in summary({"w": found})


def test_slots_mix_by_row_in_either_form_and_stacked():
    spectrum = Spectrum(*map(jnp.asarray, _spectrum(9, 6)))
    w = merge(spectrum, jnp.ones(6))
    zs = [{"w": z} for z in _experts(spectrum, 2, 1)]
    table = bank(zs, {"w": spectrum}, 4)
    alphas = jnp.asarray([[7.0, 0, 0, 0], [0, 1, 0, 0], [0, 0.5, -1, 0]])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 6)), jnp.float32)
    expected = jnp.stack([delta(spectrum, mix(zs, row[1:3])["w"])(x[i : i + 1], w)[0] for i, row in enumerate(alphas)])
    for exact_base, kind in ((False, FactoredSlots), (True, DeltaSlots)):
        made = slots({"w": spectrum}, table, plan({"w": spectrum}, zs, 0.0, exact_base=exact_base))
        assert isinstance(made["w"], kind)
        adapter = mixture(made, alphas)["w"]
        np.testing.assert_allclose(adapter(x, w), expected, atol=1e-4)
        stacked = mixture(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), made), alphas)["w"]
        for layer in range(2):
            one = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
            np.testing.assert_allclose(one(x, w), expected, atol=1e-4)


@pytest.mark.parametrize("tolerance", [-1.0, -1e-9, float("nan"), float("inf")])
def test_a_tolerance_that_no_k_meets_is_one_line(tolerance):
    with pytest.raises(UserError, match=f"tolerance={tolerance} is met by no number of components") as caught:
        plan({"w": _spectrum(4, 4)}, [], tolerance)
    assert "\n" not in str(caught.value)
