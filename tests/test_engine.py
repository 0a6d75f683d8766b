import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sva import decompose
from sva.generation.engine import EngineConfig, Request, run
from sva.generation.prompts import pad_eos
from sva.generation.sampling import Greedy, Temperature
from sva.generation.testing import toy_lm
from sva.generation.weights import Weights, bank_mixture
from sva.spectral import serving_plan
from sva.spectral.mixing import slots

END = 9
FOUR = EngineConfig(rows=4, steps=8)


def _requests(count, seed=0, samples=1):
    """Prompts of two buckets with limits of their own."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            rng.integers(0, 32, rng.integers(2, 50)).tolist(),
            int(rng.integers(1, 30)),
            jax.random.split(jax.random.key(1000 * seed + i), samples),
        )
        for i in range(count)
    ]


def _weights(lm, **more):
    return Weights(lm.model, lm.params, jnp.asarray(pad_eos([END])), **more)


def _by_sample(finished):
    found = {(row.request, row.sample): row for row in finished}
    return found


def _assert_identical(one, other):
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.logprobs, other.logprobs)
    assert one.by_limit == other.by_limit


@pytest.mark.parametrize(
    ("scan", "sampling", "cfg"),
    [(False, Temperature(), FOUR), pytest.param(True, Greedy(), EngineConfig(8, 4, 2), marks=pytest.mark.long)],
)
def test_every_sample_is_what_generate_gives_it_alone(scan, sampling, cfg):
    lm = toy_lm(scan_layers=scan)
    requests = _requests(7, samples=2)
    found = _by_sample(run(_weights(lm), requests, cfg, sampling))
    assert sorted(found) == [(request, sample) for request in range(7) for sample in range(2)]
    for (request, sample), row in found.items():
        asked = requests[request]
        ids = np.asarray([asked.prompt_ids])
        keys = asked.keys[sample : sample + 1]
        alone = lm.generate(ids, np.ones_like(ids), asked.max_new_tokens, [END], sampling, keys)
        size = int(alone.lengths[0])
        np.testing.assert_array_equal(row.tokens, alone.tokens[0, :size])
        np.testing.assert_allclose(row.logprobs, alone.logprobs[0, :size], atol=1e-4)
        assert row.by_limit == (END not in row.tokens)
    assert any(row.by_limit for row in found.values())
    assert any(not row.by_limit for row in found.values()) or sampling == Greedy()


def test_a_long_prompt_that_takes_the_row_of_a_short_one_is_read_whole(toy):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 32, size).tolist() for size in (10, 200)]
    requests = [Request(prompt, 20, jax.random.split(jax.random.key(0), 1)) for prompt in prompts]
    found = _by_sample(run(_weights(toy), requests, EngineConfig(rows=1), Greedy()))
    ids = np.asarray([prompts[1]])
    alone = toy.generate(ids, np.ones_like(ids), 20, [END])
    size = int(alone.lengths[0])
    assert size > 1  # the first token does not read the row
    np.testing.assert_array_equal(found[1, 0].tokens, alone.tokens[0, :size])
    np.testing.assert_allclose(found[1, 0].logprobs, alone.logprobs[0, :size], atol=1e-4)


def test_a_sample_is_the_same_bits_whatever_its_neighbours_row_and_arrival(toy):
    requests, others = _requests(9), _requests(9, seed=1)
    first = _by_sample(run(_weights(toy), requests, FOUR, Temperature()))
    turned = _by_sample(run(_weights(toy), requests[::-1], FOUR, Temperature()))
    late = _by_sample(run(_weights(toy), [*others, *requests], FOUR, Temperature()))
    for i in range(9):
        _assert_identical(first[i, 0], turned[8 - i, 0])
        _assert_identical(first[i, 0], late[9 + i, 0])


def test_rows_on_experts_of_a_bank_are_each_on_its_own_and_base_rows_on_none(toy):
    spectra = decompose(toy, "mlp", progress=False)
    rng = np.random.default_rng(0)
    zs = [{name: rng.uniform(0.3, 1.7, len(s.s)).astype(np.float32) for name, s in spectra.items()} for _ in range(2)]
    bank = {name: np.stack([np.ones(len(s.s), np.float32), *(z[name] for z in zs)]) for name, s in spectra.items()}
    plans = serving_plan.plan(spectra, zs, 0.0, exact_base=True, kind=lambda name: name)
    weights = _weights(toy, adapter_of=bank_mixture, shared=toy.model.nest(slots(spectra, bank, plans)))
    alphas = np.eye(3, dtype=np.float32)
    alphas[0] = 0
    plain = _requests(6)
    mixed = [request._replace(alphas=alphas[i % 3]) for i, request in enumerate(plain)]
    found = _by_sample(run(weights, mixed, FOUR, Temperature()))
    base = _by_sample(run(_weights(toy), plain, FOUR, Temperature()))
    for i, request in enumerate(plain):
        alone = _by_sample(run(weights, [request._replace(alphas=alphas[i % 3])] * 4, FOUR, Temperature()))
        _assert_identical(found[i, 0], alone[0, 0])
        if i % 3 == 0:
            np.testing.assert_array_equal(found[i, 0].tokens, base[i, 0].tokens)
            np.testing.assert_allclose(found[i, 0].logprobs, base[i, 0].logprobs, rtol=1e-6)
        else:
            assert not np.array_equal(found[i, 0].logprobs, base[i, 0].logprobs)


def test_the_caller_may_end_a_row_after_any_token(toy):
    requests = [request._replace(max_new_tokens=25) for request in _requests(6)]
    weights = Weights(toy.model, toy.params, jnp.asarray(pad_eos([])))
    free = _by_sample(run(weights, requests, FOUR, Greedy()))
    seen = {i: [] for i in range(6)}

    def watch(request, sample, tokens):
        seen[request] += tokens.tolist()
        over = len(seen[request]) - (5 + 3 * request)
        return len(tokens) - over if over >= 0 and request < 4 else None

    for (request, _), row in _by_sample(run(weights, requests, FOUR, Greedy(), watch)).items():
        size = 5 + 3 * request if request < 4 else 25
        np.testing.assert_array_equal(row.tokens, free[request, 0].tokens[:size])
        np.testing.assert_array_equal(row.logprobs, free[request, 0].logprobs[:size])
        assert row.by_limit == (request >= 4)
        assert seen[request][:size] == row.tokens.tolist()


def test_a_job_of_the_same_buckets_compiles_nothing(toy, compilations):
    weights = _weights(toy)
    cfg = EngineConfig(rows=3, steps=8)
    list(run(weights, _requests(12), cfg, Temperature()))
    assert "jit(advance)" in compilations  # the counter works
    compilations.clear()
    assert len(list(run(weights, _requests(40, seed=3), cfg, Temperature()))) == 40
    assert compilations == []


def test_a_job_of_another_number_of_prompts_compiles_nothing(toy, compilations):
    from sva.generation.complete import CompleteOptions, complete

    options = CompleteOptions(eos_ids=[END], engine=EngineConfig(rows=3, steps=8))
    settings = dict(sampling=Temperature(), options=options)
    prompts = [[5, 6, 7, *request.prompt_ids] for request in _requests(75, seed=3)]
    few = list(complete(toy, prompts[:6], 12, key=jax.random.key(1), **settings))
    compilations.clear()
    many = {c.prompt: c for c in complete(toy, prompts, 12, key=jax.random.key(1), **settings)}
    assert compilations == []
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), np.arange(75))
    each = {c.prompt: c for c in complete(toy, prompts, 12, key=keys, **settings)}
    for found in (*few, *each.values()):
        np.testing.assert_array_equal(found.tokens, many[found.prompt].tokens)


def test_prompts_after_a_shared_prefix_are_answered_as_if_they_held_it(toy):
    from sva.generation.complete import CompleteOptions, complete

    options = CompleteOptions(eos_ids=[END], engine=FOUR)
    shared = list(range(5, 29))
    prompts = [[*shared, *request.prompt_ids[:20]] for request in _requests(5)]
    together = {c.prompt: c for c in complete(toy, prompts, 12, options=options)}
    for place, prompt in enumerate(prompts):
        (alone,) = complete(toy, [prompt], 12, options=options)
        np.testing.assert_array_equal(together[place].tokens, alone.tokens)
        np.testing.assert_allclose(together[place].logprobs, alone.logprobs, atol=1e-4)
