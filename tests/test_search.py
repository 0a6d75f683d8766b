import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sva.training.search import CEM, OpenAIES, ranks
from sva.utils.errors import UserError

TREE = {"a": jnp.zeros(3), "b": jnp.ones((2, 2))}
PULL = np.array([0.5, -1.0, 2.0, 0.3], np.float32)


def test_ranks_by_hand():
    np.testing.assert_allclose(ranks(jnp.asarray([3.0, 1.0, 2.0])), [0.5, -0.5, 0])
    np.testing.assert_allclose(ranks(jnp.asarray([1.0, 1.0, 2.0, jnp.nan, 2.0])), [-0.125, -0.125, 0.375, -0.5, 0.375])
    np.testing.assert_array_equal(ranks(jnp.ones(6)), np.zeros(6))


@pytest.mark.parametrize("search", [OpenAIES(population=6), CEM(population=10)])
def test_a_population_has_the_shape_of_the_tree_and_depends_on_the_key_alone(search):
    state = search.init(TREE)
    one, again, other = (search.ask(state, jax.random.key(seed)) for seed in (0, 0, 1))
    assert {name: x.shape for name, x in one.items()} == {
        "a": (search.population, 3),
        "b": (search.population, 2, 2),
    }
    chex.assert_trees_all_equal(one, again)
    assert all((x != y).any() for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_es_draws_mirrored_pairs_and_its_gradient_is_that_of_its_definition():
    search = OpenAIES(population=8, sigma=0.25)
    state = search.init(jnp.asarray(PULL))
    members = np.asarray(search.ask(state, jax.random.key(0)), np.float64)
    np.testing.assert_allclose(members[:4] + members[4:], np.broadcast_to(2 * PULL, (4, 4)), atol=1e-6)
    noise = (members - PULL) / 0.25
    fitness = jnp.asarray(members @ np.array([1.0, 2.0, -1.0, 0.5]), jnp.float32)
    shaped = np.asarray(ranks(fitness), np.float64)
    expected = (shaped[:, None] * noise).sum(axis=0) / (8 * 0.25)
    np.testing.assert_allclose(search.gradient(state, jnp.asarray(members, jnp.float32), fitness), expected, rtol=1e-4)


def test_es_points_where_the_expected_reward_of_a_bandit_rises():
    search = OpenAIES(population=4096, sigma=0.02)
    theta, rewards = np.array([0.3, -0.5, 0.9, 0.1]), np.array([1.0, -1.0, 0.5, 2.0])
    state = search.init(jnp.asarray(theta, jnp.float32))
    members = search.ask(state, jax.random.key(0))
    found = np.asarray(search.gradient(state, members, jax.jit(jax.nn.softmax)(members) @ rewards.astype("f4")))
    pi = np.exp(theta) / np.exp(theta).sum()
    rise = pi * (rewards - pi @ rewards)
    cosine = found @ rise / np.linalg.norm(found) / np.linalg.norm(rise)
    assert cosine > 0.99


def test_a_generation_of_equals_leaves_es_where_it_is():
    search = OpenAIES(population=4)
    state = search.init(TREE)
    told = search.tell(state, search.ask(state, jax.random.key(0)), jnp.ones(4))
    chex.assert_trees_all_equal(told.mean, state.mean)
    # Once it moves, a generation of equals moves it by what Adam remembers, and adds nothing.
    moving = search.tell(state, search.ask(state, jax.random.key(0)), jnp.asarray([1.0, 0, 0, 0]))
    population = search.ask(moving, jax.random.key(1))
    nothing = search.gradient(moving, population, jnp.ones(4))
    chex.assert_trees_all_equal(nothing, jax.tree.map(jnp.zeros_like, TREE))
    on = search.tell(moving, population, jnp.ones(4))
    assert (jax.tree.leaves(on.mean)[0] != jax.tree.leaves(moving.mean)[0]).any()


@pytest.mark.parametrize(
    "search",
    [
        OpenAIES(population=32, sigma=0.1, lr=0.1),
        CEM(population=64, sigma=3.0),
        CEM(reference=True, low=-3, high=3, sigma=3.0),
    ],
)
def test_a_search_finds_the_top_of_a_hill_and_is_jitted(search):
    @jax.jit
    def generation(state, key):
        members = search.ask(state, key)
        return search.tell(state, members, -jnp.square(members - PULL[None]).sum(axis=1))

    state = search.init(jnp.zeros(4))
    for step in range(60):
        state = generation(state, jax.random.fold_in(jax.random.key(0), step))
    np.testing.assert_allclose(search.solution(state), PULL, atol=0.1)


def test_cem_fits_its_elites_and_ties_decide_between_equals():
    search = CEM(population=6, elite_ratio=0.34)
    members = jnp.asarray([[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]])
    fitness, ties = jnp.asarray([1.0, 2.0, 2.0, 2.0, 0.0, jnp.nan]), jnp.asarray([9.0, -3.0, -1.0, -2.0, 9.0, 9.0])
    state = search.tell(search.init(jnp.zeros(1)), members, fitness, ties)
    np.testing.assert_allclose((state.mean[0], state.std[0], state.best[0]), (2.5, 0.5, 2.0))
    assert search.solution(state)[0] == 2.5


def test_cem_keeps_members_within_its_bounds_and_mixes_in_the_old_distribution():
    search = CEM(population=4, elite_ratio=0.5, low=0.0, high=1.0, sigma=2.0, smoothing=0.25)
    state = search.init(jnp.full(2, 0.5))
    members = search.ask(state, jax.random.key(0))
    assert ((members >= 0) & (members <= 1)).all()
    state = search.tell(state, jnp.asarray([[0.0, 1], [1, 1], [0, 0], [0, 0]]), jnp.asarray([2.0, 1, 0, 0]))
    np.testing.assert_allclose(state.mean, [0.25 * 0.5 + 0.75 * 0.5, 0.25 * 0.5 + 0.75])
    np.testing.assert_allclose(state.std, [0.25 * 2 + 0.75 * 0.5, 0.25 * 2])


def _public_code(members, fitness, ties, ratio):
    """(mean, std, best) as the public code computes them, in numpy."""
    elites = int(ratio * len(members))
    chosen = np.argpartition(fitness, -elites)[-elites:]
    top = np.flatnonzero(fitness == fitness.max())
    best = members[top[np.argmax(ties[top])]]
    return members[chosen].mean(axis=0), members[chosen].std(axis=0, ddof=1), best


def test_the_reference_rules_are_the_public_codes():
    search = CEM(population=32, elite_ratio=0.2, low=0.0, high=1.0, reference=True)
    rng = np.random.default_rng(0)
    state = search.init(jnp.full(3, 0.3))
    for step in range(4):
        members = search.ask(state, jax.random.key(step))
        np.testing.assert_array_equal(members[0], state.best)  # the best one is tried again
        fitness, ties = rng.permutation(32).astype(np.float32), rng.normal(size=32).astype(np.float32)
        fitness[fitness >= 30] = 30  # two are the best: their ties decide
        expected = _public_code(np.asarray(members), fitness, ties, 0.2)
        state = search.tell(state, members, jnp.asarray(fitness), jnp.asarray(ties))
        for ours, theirs in zip((state.mean, state.std, state.best), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(search.solution(state), state.best)


def test_the_reference_takes_no_elites_for_everyone_and_one_for_nan():
    members = jnp.asarray([[0.0], [2.0], [4.0], [6.0]])
    fitness = jnp.arange(4.0)
    everyone = CEM(population=4, elite_ratio=0.2, reference=True)
    state = everyone.tell(everyone.init(jnp.zeros(1)), members, fitness)
    assert state.mean[0] == 3.0
    one = CEM(population=4, elite_ratio=0.25, reference=True)
    state = one.tell(one.init(jnp.zeros(1)), members, fitness)
    assert np.isnan(state.std[0])
    assert state.mean[0] == 6.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: CEM(population=4, elite_ratio=0.2), "makes 0 elites, .* needs at least 2; raise one to 0.5 or 10"),
        (lambda: CEM(population=5, elite_ratio=0.2), "makes 1 elites"),
        (lambda: CEM(elite_ratio=1.5), "at most 1"),
        (lambda: CEM(smoothing=1.0), "below 1"),
        (lambda: CEM(sigma=0), r"evolution\.sigma=0 must be above 0"),
        (lambda: OpenAIES(population=5), "must be even"),
    ],
)
def test_settings_that_make_no_search_are_refused_in_one_line(make, words):
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)
