"""Grouped products: each row with the matrix of its group, whichever way a machine takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sva.utils import grouped
from sva.utils.grouped import collect, grouped_dot, lay_out, of_rows, spread
from sva.utils.matmul import quantise_weight

COUNT, OUT, INTO = 5, 6, 8
ROWS = {"few": 7, "some": 40, "many": 300}
WAYS = {"machine's own": None, "ragged or gathered": "other"}


def _data(rows, seed=0):
    rng = np.random.default_rng(seed)
    group = rng.integers(0, COUNT, rows)
    group[group == 2] = 3  # nothing goes to group 2
    x, w = rng.standard_normal((rows, INTO)), rng.standard_normal((COUNT, OUT, INTO))
    return jnp.asarray(group, jnp.int32), jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


def _product(group, x, w):
    layout = lay_out(group, COUNT)
    return collect(grouped_dot(spread(x, layout), w, layout.groups), layout)


@pytest.fixture(params=WAYS)
def _way(request, monkeypatch):
    """Takes the products of other machines than a CPU as well: they run anywhere."""
    if WAYS[request.param]:

        def elsewhere(x, w, groups, axis):
            is_sorted = len(x) > len(groups.group)
            return (grouped._ragged if is_sorted else grouped._gathered)(x, w, groups, axis)

        monkeypatch.setattr(grouped, "_either", elsewhere)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_each_row_meets_its_groups_matrix_in_value_and_gradient(rows):
    group, x, w = _data(rows)
    g = jnp.asarray(np.random.default_rng(1).standard_normal((rows, OUT)), jnp.float32)

    def loss(x, w):
        y = _product(group, x, w)
        return jnp.sum(y * g), y

    # A jit of its own: the other way is chosen while tracing.
    (of_x, of_w), y = jax.jit(lambda x, w: jax.grad(loss, (0, 1), has_aux=True)(x, w))(x, w)
    own = np.asarray(w)[np.asarray(group)]
    np.testing.assert_allclose(y, np.einsum("ROI,RI->RO", own, x), atol=2e-5)
    np.testing.assert_allclose(of_x, np.einsum("ROI,RO->RI", own, g), atol=2e-5)
    truth = np.zeros(w.shape)
    np.add.at(truth, np.asarray(group), np.einsum("RO,RI->ROI", g, x))
    np.testing.assert_allclose(of_w, truth, atol=2e-4)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_row_without_a_group_gets_zeros_where_rows_are_sorted(rows):
    group, x, w = _data(rows)
    group = group.at[3].set(COUNT)
    y = np.asarray(_product(group, x, w))
    assert np.isfinite(y).all()
    assert not y[3].any() or rows <= grouped._FEW
    np.testing.assert_allclose(y[4], np.asarray(w)[int(group[4])] @ np.asarray(x)[4], atol=2e-5)


def test_all_rows_of_one_group_and_a_count_above_the_rows_are_laid_out():
    for rows, count in ((64, 3), (20, 50), (1, 4)):
        group = jnp.full(rows, count - 1, jnp.int32)
        layout = lay_out(group, count)
        x = jnp.arange(rows, dtype=jnp.float32)[:, None] + 1
        np.testing.assert_array_equal(collect(spread(x, layout), layout), x)
        assert layout.block * len(layout.groups.group) == len(layout.source)
        assert int(layout.groups.sizes.sum()) == int(layout.groups.used) * layout.block


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_of_rows_gives_each_row_its_groups_values_and_sums_their_gradients(rows):
    group, x, _ = _data(rows)
    values = jnp.asarray(np.random.default_rng(2).standard_normal((COUNT, INTO)), jnp.float32)
    layout = lay_out(group, COUNT)
    np.testing.assert_array_equal(collect(of_rows(values, layout), layout), values[group])
    slope = jax.grad(lambda values: jnp.sum(of_rows(values, layout) * spread(x, layout)))(values)
    truth = np.zeros(values.shape)
    np.add.at(truth, np.asarray(group), np.asarray(x))
    np.testing.assert_allclose(slope, truth, atol=1e-4)


def test_int8_matrices_pass_values_and_gradients_of_the_rows():
    group, x, w = _data(40)
    q = quantise_weight(w)
    rounded = q.q.astype(jnp.float32) * q.scale[..., None]
    run = jax.jit(lambda x, w: jax.value_and_grad(lambda x: jnp.sum(_product(group, x, w) ** 2))(x))
    for ours, theirs in zip(run(x, q), run(x, rounded), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_frozen_matrices_get_no_gradient_and_no_rows_are_kept_for_one():
    group, x, w = _data(300)
    _, back = jax.vjp(lambda x: _product(group, x, w), x)
    assert (len(lay_out(group, COUNT).source), INTO) not in {leaf.shape for leaf in jax.tree.leaves(back)}
    _, back = jax.vjp(lambda x, w: _product(group, x, w), x, w)
    assert (len(lay_out(group, COUNT).source), INTO) in {leaf.shape for leaf in jax.tree.leaves(back)}
