import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sva.generation.row_sampling import PerRow, row_settings
from sva.generation.sampling import Greedy, MinP, Temperature, TopK, TopP

ROWS = {
    Greedy(): row_settings(),
    Temperature(0.7): row_settings(0.7),
    TopK(5, 1.3): row_settings(1.3, top_k=5),
    TopP(0.6, 0.9): row_settings(0.9, top_p=0.6),
    MinP(0.2): row_settings(1.0, min_p=0.2),
}


@pytest.fixture(scope="module")
def logits():
    return jax.random.normal(jax.random.key(0), (len(ROWS), 300)) * 2


def _together(*settings):
    return jax.tree.map(lambda *x: np.concatenate(x), *settings)


def test_every_row_draws_what_its_strategy_draws_alone(logits):
    draw = jax.jit(PerRow())
    for seed in range(20):
        keys = jax.random.split(jax.random.key(seed), len(ROWS))
        found = draw(logits, keys, _together(*ROWS.values()))
        for row, strategy in enumerate(ROWS):
            assert found[row] == strategy(logits[row : row + 1], keys[row : row + 1])[0]


def test_rows_that_are_all_greedy_draw_no_noise(logits):
    keys = jax.random.split(jax.random.key(0), len(ROWS))
    found = PerRow()(logits, keys, _together(*[row_settings()] * len(ROWS)))
    np.testing.assert_array_equal(found, jnp.argmax(logits, axis=-1))


def test_a_token_must_pass_all_cuts(logits):
    cut = _together(*[row_settings(1.0, top_k=3, top_p=0.05)] * len(ROWS))
    keys = jax.random.split(jax.random.key(1), len(ROWS))
    assert (PerRow()(logits, keys, cut) == jnp.argmax(logits, axis=-1)).all()


def test_a_bias_moves_its_own_row_and_needs_the_rich_strategy(logits):
    keys = jax.random.split(jax.random.key(0), len(ROWS))
    settings = _together(row_settings(bias=((7, 100.0),)), *[row_settings()] * (len(ROWS) - 1))
    best = jnp.argmax(logits, axis=-1)
    assert PerRow(is_rich=True)(logits, keys, settings).tolist() == [7, *best[1:].tolist()]
    assert PerRow()(logits, keys, settings).tolist() == best.tolist()
