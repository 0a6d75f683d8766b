import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sva.generation import sampling
from sva.generation.sampling import Greedy, MinP, Temperature, TopK, TopP
from sva.utils.errors import UserError


def _chi_squared(drawn, probs):
    counts, expected = np.bincount(np.asarray(drawn), minlength=len(probs)), len(drawn) * np.asarray(probs)
    assert not counts[expected == 0].any()
    kept = expected > 0
    return ((counts - expected)[kept] ** 2 / expected[kept]).sum()


def _nucleus(logits, p):
    """[V] probabilities of the smallest set of likeliest tokens whose probability reaches p."""
    probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    kept, mass = np.zeros_like(probs), 0.0
    for token in np.argsort(-probs):
        if mass >= p:
            break
        kept[token] = probs[token]
        mass += probs[token]
    return kept / kept.sum()


def test_greedy_takes_the_lower_id_among_equals():
    logits = jnp.asarray([[0.0, 2, 2, 1], [5, -1, 5, 5]])
    np.testing.assert_array_equal(Greedy()(logits, jax.random.split(jax.random.key(0), 2)), [1, 0])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_softmax_at_the_temperature(temperature):
    logits = jnp.asarray([2.0, 1.0, 0.0, -1.0])
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = Temperature(temperature)(jnp.tile(logits, (4000, 1)), keys)
    assert _chi_squared(drawn, jax.nn.softmax(logits / temperature)) < 16.3  # 3 degrees, p = 0.001


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_a_plain_loop_keeps(p, monkeypatch):
    monkeypatch.setattr(sampling, "gumbel_draw", lambda logits, keys: logits)
    logits = np.random.default_rng(0).normal(0, 2, (20, 50)).astype(np.float32)
    kept = np.asarray(TopP(p, temperature=0.7)(jnp.asarray(logits), jnp.zeros(20)))
    for row, scaled in enumerate(logits.astype(np.float64) / 0.7):
        np.testing.assert_array_equal(kept[row] > -np.inf, _nucleus(scaled, p) > 0)


def test_top_p_draws_follow_the_cut_distribution():
    logits = np.log([0.4, 0.3, 0.2, 0.06, 0.04])
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = TopP(0.85)(jnp.tile(jnp.asarray(logits, jnp.float32), (4000, 1)), keys)
    assert _chi_squared(drawn, _nucleus(logits, 0.85)) < 13.8  # 2 degrees, p = 0.001


def test_top_p_of_logits_of_all_magnitudes_and_signs_is_exact(monkeypatch):
    monkeypatch.setattr(sampling, "gumbel_draw", lambda logits, keys: logits)
    logits = np.asarray([[-1e-30, 0.0, 1e-30, -np.inf, 3.0, -80.0, 2.5]], np.float32)
    kept = np.asarray(TopP(0.97)(jnp.asarray(logits), jnp.zeros(1)))
    np.testing.assert_array_equal(kept[0] > -np.inf, [False, True, True, False, True, False, True])


@pytest.mark.parametrize("k", [1, 3, 50, 99])
def test_top_k_keeps_the_k_largest(k, monkeypatch):
    monkeypatch.setattr(sampling, "gumbel_draw", lambda logits, keys: logits)
    logits = np.random.default_rng(1).normal(0, 2, (20, 50)).astype(np.float32)
    kept = np.asarray(TopK(k)(jnp.asarray(logits), jnp.zeros(20)))
    for row, given in zip(kept, logits, strict=True):
        assert set(np.flatnonzero(row > -np.inf)) == set(np.argsort(-given)[:k])


@pytest.mark.parametrize("p", [0.02, 0.3, 1.0])
def test_min_p_keeps_what_is_not_too_far_from_the_likeliest(p, monkeypatch):
    monkeypatch.setattr(sampling, "gumbel_draw", lambda logits, keys: logits)
    logits = np.random.default_rng(2).normal(0, 2, (20, 50)).astype(np.float32)
    kept = np.asarray(MinP(p, temperature=0.7)(jnp.asarray(logits), jnp.zeros(20)))
    probs = np.exp(logits.astype(np.float64) / 0.7)
    np.testing.assert_array_equal(kept > -np.inf, probs >= (1 - 1e-9) * p * probs.max(axis=1, keepdims=True))


def test_top_p_of_one_keeps_every_token(monkeypatch):
    monkeypatch.setattr(sampling, "gumbel_draw", lambda logits, keys: logits)
    logits = jnp.asarray([[40.0] + [0.0] * 9])  # the first token's probability rounds to 1
    np.testing.assert_array_equal(TopP(1.0)(logits, jnp.zeros(1)), logits)


@pytest.mark.parametrize("strategy", [Greedy(), Temperature(0.8), TopP(0.7), TopK(3), MinP(0.1)])
def test_a_rows_token_is_its_own_affair_and_strategies_are_static(strategy):
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1, (6, 30)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 6)
    together = strategy(logits, keys)
    assert together.dtype == jnp.int32
    order = np.array([4, 1, 0])
    np.testing.assert_array_equal(strategy(logits[order], keys[order]), together[order])
    assert hash(strategy) == hash(type(strategy)(**vars(strategy)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Temperature(0), "temperature=0 must be above 0"),
        (lambda: Temperature(float("nan")), "temperature=nan"),
        (lambda: TopP(0), "top_p=0 is outside"),
        (lambda: TopP(1.1), "top_p=1.1 is outside"),
        (lambda: TopP(0.5, temperature=-1), "temperature=-1"),
        (lambda: TopK(0), "top_k=0 must be at least 1"),
        (lambda: MinP(0.0), "min_p=0.0 is outside"),
    ],
)
def test_values_out_of_range_are_named(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_a_draw_is_the_librarys_own_of_each_row():
    logits = jax.random.normal(jax.random.key(0), (5, 1000))
    keys = jax.random.split(jax.random.key(1), 5)
    expected = jax.vmap(jax.random.categorical)(keys, logits)
    np.testing.assert_array_equal(Temperature()(logits, keys), expected)
