"""The product of every layer, and int8 weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sva
from sva.generation.testing import toy_lm
from sva.models.export import save_checkpoint
from sva.utils.errors import UserError
from sva.utils.matmul import Int8, dot, dots, floats, quantise_weight


def _x_w(rows, out=48, into=256, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((1, rows, into), (out, into)))


def _error(found, expected):
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("rows", [1, 3, 300])  # sums in lanes, the integer product, the converted weight
def test_int8_product_is_that_of_the_floats_it_stands_for(rows):
    x, w = _x_w(rows)
    q = quantise_weight(w)
    assert q.q.dtype == jnp.int8
    exact = np.asarray(x, np.float64) @ np.asarray(floats(q, jnp.float32), np.float64).T
    y = jax.jit(dot)(x, q)
    assert y.dtype == x.dtype
    assert _error(y, exact) < 1e-4
    np.testing.assert_array_equal(y, jax.jit(dot)(x, q))


def test_int8_rounds_by_half_a_step_at_most_and_keeps_a_row_of_zeros():
    _, w = _x_w(1)
    w = w.at[3].set(0)
    q = quantise_weight(w)
    assert (np.abs(floats(q, jnp.float32) - w) <= 0.501 * np.asarray(q.scale)[:, None]).all()
    assert not np.asarray(dot(jnp.ones((2, 256)), q))[:, 3].any()


@pytest.mark.parametrize("rows", [1, 3])
def test_gradient_passes_through_an_int8_weight(rows):
    x, w = _x_w(rows)
    q = quantise_weight(w)
    found = jax.grad(lambda x: jnp.sum(jnp.sin(dot(x, q) / 16)))(x)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(dot(x, floats(q, jnp.float32)) / 16)))(x)
    assert _error(found, np.asarray(expected)) < 1e-3


@pytest.mark.parametrize("into", [256, 320, 1536])
def test_one_bfloat16_row_sums_in_float32(into):
    x, w = _x_w(1, into=into, dtype=jnp.bfloat16)
    y = jax.jit(dot)(x, w)
    assert y.dtype == jnp.bfloat16
    assert _error(y, np.asarray(x, np.float64) @ np.asarray(w, np.float64).T) < 2**-8


def test_gradient_of_one_bfloat16_row_is_that_of_the_plain_product():
    x, w = _x_w(1, dtype=jnp.bfloat16)
    found = jax.grad(lambda x, w: jnp.sum(jnp.sin(dot(x, w) / 16)), (0, 1))(x, w)
    expected = jax.grad(lambda x, w: jnp.sum(jnp.sin(x @ w.T / 16)), (0, 1))(x.astype(float), w.astype(float))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        assert _error(one, np.asarray(other)) < 2**-6


def test_one_row_meets_small_weights_in_one_product():
    x, ws = _x_w(1)[0], [_x_w(1, out=out)[1] for out in (48, 16, 16)]
    found = jax.jit(dots)(x, ws)
    for y, w in zip(found, ws, strict=True):
        assert _error(y, np.asarray(x, np.float64) @ np.asarray(w, np.float64).T) < 1e-6
    products = [jax.jit(dots).lower(_x_w(rows)[0], ws).as_text().count("dot_general") for rows in (1, 3)]
    assert products == [1 if jax.default_backend() == "cpu" else 3, 3]


@pytest.mark.parametrize("scan", [False, pytest.param(True, marks=pytest.mark.long)])
def test_quantised_model_has_int8_matrices_and_the_logits_of_what_they_stand_for(scan):
    lm = toy_lm(scan_layers=scan)
    small = sva.quantise(lm)
    kinds = [type(x) for x in jax.tree.leaves(small.params, is_leaf=lambda x: isinstance(x, Int8))]
    assert kinds.count(Int8) == (9 if scan else 16)  # 7 a layer, the embeddings, the head
    ids, mask = np.arange(12).reshape(2, 6), np.ones((2, 6), int)
    plain = sva.LM(lm.model, lm.model.nest(small.named_params()), None, "rounded")
    assert _error(small.logits(ids, mask), np.asarray(plain.logits(ids, mask))) < 1e-3
    assert _error(small.logits(ids, mask), np.asarray(lm.logits(ids, mask))) < 5e-2
    assert sva.quantise(small).quantisation == "int8"
    tokens = small.generate(ids, mask, 5)
    np.testing.assert_array_equal(tokens.tokens[:1].shape, (1, 5))


def test_a_model_on_a_mesh_is_not_quantised():
    lm = toy_lm()
    with pytest.raises(UserError, match="int8 weights are for one device; on a mesh load float32 or bfloat16"):
        sva.quantise(sva.LM(lm.model, lm.params, None, "toy", mesh=jax.make_mesh((1,), ("data",))))


def test_loading_as_int8_is_loading_and_quantising(tmp_path):
    lm = toy_lm()
    save_checkpoint(tmp_path / "m", lm.model.cfg, ((n, np.asarray(w)) for n, w in lm.named_params().items()), None)
    loaded = sva.load(str(tmp_path / "m"), dtype="int8", progress=False)
    assert loaded.fingerprint == lm.fingerprint
    jax.tree.map(np.testing.assert_array_equal, dict(loaded.params), dict(sva.quantise(lm).params))
    with pytest.raises(UserError, match="use one of float32, bfloat16, int8"):
        sva.load(str(tmp_path / "m"), dtype="int4")


def test_merging_into_int8_rounds_the_merged_weight(monkeypatch, tmp_path):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path))
    small = sva.quantise(toy_lm())
    spectra = sva.decompose(small, "mlp", progress=False)
    z = {name: np.linspace(0.5, 1.5, len(s.s), dtype=np.float32) for name, s in spectra.items()}
    merged = sva.merge(small, spectra, z).named_params()
    wanted = sva.merge(sva.LM(small.model, small.model.nest(small.named_params()), None, "f"), spectra, z)
    for name, weight in wanted.named_params().items():
        assert _error(merged[name], np.asarray(weight)) < 1e-2
    ids, mask = np.arange(6)[None], np.ones((1, 6), int)
    adapter = sva.factored(spectra, z)
    found = sva.logits(small.model, small.params, ids, mask, adapter)
    assert _error(found, np.asarray(sva.merge(small, spectra, z).logits(ids, mask))) < 5e-2
