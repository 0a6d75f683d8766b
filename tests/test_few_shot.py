import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sva
from sva.adaptation import few_shot
from sva.adaptation.few_shot import FewShotConfig, Shots
from sva.generation import chat
from sva.generation.testing import NameAColour, toy_lm
from sva.spectral.expert import Expert
from sva.training.search import CEM
from sva.utils.errors import UserError

TASK = NameAColour()
CFG = FewShotConfig(rows=20)
KEY = jax.random.key(0)


def experts(spectra):
    """Three experts that change what the toy model says."""
    found = []
    for seed in (1, 2, 3):
        rng = np.random.default_rng(seed)
        found.append(Expert({name: rng.uniform(0.2, 1.8, len(x.s)).astype("f4") for name, x in spectra.items()}))
    return found


# Scanned, a batch of members and shots is that of tests/test_population.py, which runs every time.
@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.long)], ids=["unrolled", "scanned"])
def setting(request, toy):
    lm = toy_lm(scan_layers=request.param)
    pool = few_shot.pool(lm, experts(sva.decompose(lm, "mlp", progress=False)), progress=False)
    source = TASK.source("validation")
    return lm, pool, Shots(TASK, tuple(source[i] for i in range(6)))


def alone(lm, shots):
    """A model's answers by itself: (right [S], mean log-probs [S])."""
    encoded = chat.encode(lm, [chat.render(lm, TASK.question(example)) for example in shots.examples])
    out = lm.generate(*encoded, TASK.max_new_tokens, chat.end_tokens(lm))
    right = shots.right(chat.decode(lm, out.tokens, out.lengths), range(len(shots.examples)))
    return right, out.logprobs.sum(axis=1) / out.lengths


@pytest.fixture(scope="module")
def reference(toy):
    """The toy model and a pool mixed as the public code does."""
    spectra = sva.decompose(toy, "mlp", progress=False)
    made = [Expert({name: x * 2 for name, x in one.raw.items()}, "sigmoid_nuclear") for one in experts(spectra)]
    return toy, few_shot.pool(toy, made, reference=True, progress=False)


@pytest.mark.parametrize("per_matrix", [False, True])
def test_a_population_in_one_batch_scores_as_its_members_do_one_by_one(setting, per_matrix):
    lm, pool, shots = setting
    alphas = CEM(population=5, elite_ratio=0.4).ask(
        CEM(population=5, elite_ratio=0.4).init(pool.start(per_matrix=per_matrix)), KEY
    )
    assert alphas.shape == ((5, len(pool.names), 3) if per_matrix else (5, 3))
    scores = few_shot.score(lm, pool, alphas, shots, CFG, KEY)
    right, means = map(np.stack, zip(*(alone(few_shot.mixed(lm, pool, row), shots) for row in alphas), strict=True))
    np.testing.assert_array_equal(scores.right, right)
    np.testing.assert_allclose(scores.mean_logprobs, means, atol=3e-4)
    assert 0 < scores.right.sum() < scores.right.size


def test_a_batch_goes_on_without_the_rows_that_have_ended(setting):
    lm, pool, _ = setting
    ends = (1, *range(5, 10))  # every colour ends an answer, so that most are short
    lm = dataclasses.replace(lm, model=lm.model.clone(cfg=dataclasses.replace(lm.model.cfg, eos_token_ids=ends)))
    shots = Shots(TASK, tuple(TASK.source("validation")[:8]))
    alphas = np.random.default_rng(0).uniform(-0.5, 1.5, (6, 3)).astype(np.float32)
    scores = few_shot.score(lm, pool, alphas, shots, FewShotConfig(24, temperature=1.0, rows=64), KEY)
    encoded = chat.encode(lm, [chat.render(lm, TASK.question(example)) for example in shots.examples])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(8))
    lengths = []
    for row, means in zip(alphas, scores.mean_logprobs, strict=True):
        merged = few_shot.mixed(lm, pool, row)
        out = merged.generate(*encoded, 24, ends, sva.Temperature(1.0), keys)
        np.testing.assert_allclose(means, out.logprobs.sum(axis=1) / out.lengths, atol=3e-4)
        lengths += out.lengths.tolist()
    assert scores.tokens == sum(lengths)
    assert np.median(lengths) < 8 < max(lengths)  # more than half of the rows end early, and some do not


def test_the_public_codes_mixture_is_rescaled_raw_values(reference):
    lm, pool = reference
    shots = Shots(TASK, tuple(TASK.source("validation")[:4]))
    alphas = np.asarray([[0.3, 0.1, 0.9], [0.6, 0.2, 1.8], [0, 0, 0], [1, 0, 0]], np.float32)
    scores = few_shot.score(lm, pool, alphas, shots, CFG, KEY)
    np.testing.assert_allclose(scores.mean_logprobs[0], scores.mean_logprobs[1], atol=3e-4)  # proportions alone count
    for row, found in zip(alphas, scores.mean_logprobs, strict=True):
        z = {}
        for name, (_, s, _) in pool.spectra.items():
            m = sum(a * np.asarray(raw[name], np.float64) for a, raw in zip(row, pool.vectors, strict=True))
            z[name] = (m * np.sum(s) / np.sum(s * m) if row.any() else np.ones_like(m)).astype(np.float32)
        merged = sva.merge(lm, pool.spectra, z)
        np.testing.assert_allclose(found, alone(merged, shots)[1], atol=3e-4)
        np.testing.assert_allclose(found, alone(few_shot.mixed(lm, pool, row), shots)[1], atol=3e-4)


def test_members_draw_with_the_same_random_numbers(setting):
    lm, pool, shots = setting
    alphas = jnp.asarray([[0.5, 0.2, 0.1], [0.5, 0.2, 0.1], [0, 0, 0]])
    scores = few_shot.score(lm, pool, alphas, shots, FewShotConfig(rows=20, temperature=1.0), KEY)
    np.testing.assert_array_equal(scores.mean_logprobs[0], scores.mean_logprobs[1])
    assert (scores.mean_logprobs[0] != scores.mean_logprobs[2]).any()


def test_a_search_finds_a_mixture_that_answers_more_shots_and_goes_on_bit_for_bit(setting):
    lm, pool, shots = setting
    search = CEM(population=12, elite_ratio=0.25)

    def run(state, done, generations):
        return list(
            few_shot.adapt(lm, pool, shots, search, CFG, KEY, state=state, generations=range(done + 1, generations + 1))
        )

    base = jnp.zeros(3)
    whole = run(search.init(base), 0, 4)
    assert [generation.number for generation in whole] == [1, 2, 3, 4]
    rest = run(whole[1].state, 2, 4)
    np.testing.assert_array_equal(search.solution(rest[-1].state), search.solution(whole[-1].state))
    ends = jnp.stack([base, search.solution(whole[-1].state)])
    before, after = few_shot.score(lm, pool, ends, shots, CFG, KEY).right.mean(axis=1)
    assert after > before


@pytest.mark.parametrize("shape", [(3,), (6, 3)])
def test_the_reference_search_is_the_public_codes_given_its_noise_and_scores(shape):
    """A port of SakanaAI/self-adaptive-llms, commit 03a41ae: 32 members, int(0.2 * 32) elites, clamped to [0, 1]."""
    search, size = CEM(low=0.0, high=1.0, reference=True), int(np.prod(shape))
    state = search.init(jnp.full(shape, 1 / 3))
    mean, std, best = np.full(size, 1 / 3), np.full(size, 0.5), np.full(size, 1 / 3)
    pull = np.linspace(-1, 1, size)
    for step in range(8):
        key = jax.random.fold_in(KEY, step)
        members = np.clip(mean + np.asarray(jax.random.normal(key, (32, size))) * std, 0, 1)
        members[0] = best
        right = np.clip(np.round(5 + 4 * members @ pull / size), 0, 10) / 10  # of 10 shots: many are equal
        ties = -np.abs(members - 0.4).sum(axis=1)
        ours = search.ask(state, key)
        np.testing.assert_allclose(np.reshape(ours, (32, size)), members, atol=1e-5)
        state = search.tell(state, ours, jnp.asarray(right, jnp.float32), jnp.asarray(ties, jnp.float32))
        elite = members[np.argsort(-right, kind="stable")[:6]]
        equal = np.flatnonzero(right == right.max())
        mean, std, best = elite.mean(axis=0), elite.std(axis=0, ddof=1), members[equal[ties[equal].argmax()]]
        np.testing.assert_allclose(np.ravel(search.solution(state)), best, atol=1e-5)
    np.testing.assert_allclose(np.ravel(state.mean), mean, atol=1e-5)


@pytest.mark.parametrize("reference", [False, True])
def test_racing_drops_members_and_changes_no_elite(setting, reference):
    lm, pool, _ = setting
    source = TASK.source("validation")
    shots = Shots(TASK, tuple(source[i] for i in range(10)))
    search = CEM(population=16, elite_ratio=0.25, sigma=1.0, reference=reference)
    start = search.init(jnp.zeros(3))

    def run(block):
        cfg = FewShotConfig(rows=20, block=block)
        return list(few_shot.adapt(lm, pool, shots, search, cfg, KEY, state=start, generations=range(1, 4)))

    every, raced = run(None), run(2)
    assert sum(step.row["dropped"] for step in raced) > 0 == sum(step.row["dropped"] for step in every)
    assert sum(step.row["tokens"] for step in raced) < sum(step.row["tokens"] for step in every)
    for one, other in zip(every, raced, strict=True):
        chex.assert_trees_all_equal(one.state, other.state)


def test_a_member_is_dropped_only_when_enough_others_are_sure_to_beat_it():
    rng = np.random.default_rng(0)
    for _ in range(200):
        right = rng.random((8, 6)) < rng.random((8, 1))
        elites, done = int(rng.integers(1, 5)), int(rng.integers(1, 6))
        kept = few_shot.can_be_elite(right[:, :done].sum(axis=1), 6 - done, elites)
        order = np.argsort(-right.sum(axis=1), kind="stable")
        assert kept[order[:elites]].all()
    np.testing.assert_array_equal(few_shot.can_be_elite(np.array([5, 4, 3, 2]), 1, 2), [True, True, True, False])


def test_shots_that_nobody_answers_leave_the_state_as_it_was(setting):
    lm, pool, _ = setting

    class Never(NameAColour):
        def grade(self, completion, example):
            return super().grade("none", example)

    shots = Shots(Never(), tuple(TASK.source("validation")[:2]))
    search = CEM(population=4, elite_ratio=0.5)
    state = search.init(pool.start())
    (last,) = few_shot.adapt(lm, pool, shots, search, CFG, KEY, state=state, generations=range(1, 2))
    assert last.row["best"] == 0
    np.testing.assert_array_equal(last.state.mean, state.mean)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda lm, pool: few_shot.pool(lm, []), "nothing to mix"),
        (lambda lm, pool: few_shot.pool(dataclasses.replace(lm, z={}), experts(pool.spectra)), "loaded without its ta"),
        (lambda lm, pool: few_shot.pool(lm, experts(pool.spectra)[:1], reference=True), "name another one"),
        (lambda lm, pool: few_shot.pool(lm, experts(pool.spectra), reference=True), "expert 1 .* this one is linear"),
        (lambda lm, pool: Shots(TASK, ()), "shots=0 must be at least 1"),
        (lambda lm, pool: few_shot.mixed(lm, pool, np.ones(2)), r"shape \[2\]; 3 experts on 6 matrices need \[3\], or"),
        (lambda lm, pool: few_shot.mixed(lm, pool, [np.nan, 0, 0]), "NaN"),
        (lambda lm, pool: FewShotConfig(rows=0), "rows=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line(setting, make, words):
    lm, pool, _ = setting
    with pytest.raises(UserError, match=words) as caught:
        make(lm, pool)
    assert "\n" not in str(caught.value)
