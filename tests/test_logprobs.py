import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from sva.generation import logprobs
from sva.generation.logprobs import chosen, score

ROWS, LENGTH, WIDTH, VOCAB = 2, 7, 5, 11


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    hidden, ref = rng.normal(0, 1, (2, ROWS, LENGTH, WIDTH)).astype(np.float32)
    head = rng.normal(0, 1, (VOCAB, WIDTH)).astype(np.float32)
    return jnp.asarray(hidden), jnp.asarray(ref), jnp.asarray(head), jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)))


def _unembed(head):
    return lambda hidden: jnp.einsum("...D,VD->...V", hidden, head, precision="highest")


def _plain(hidden, ref, head, targets):
    """The five scores in float64, one token at a time."""
    hidden, ref, head = (np.asarray(x, np.float64) for x in (hidden, ref, head))
    out = np.zeros((5, ROWS, LENGTH))
    for b in range(ROWS):
        for t in range(LENGTH):
            p, q = (np.exp(head @ x[b, t]) / np.exp(head @ x[b, t]).sum() for x in (hidden, ref))
            entropy = -sum(x * np.log(x) for x in p)
            out[:, b, t] = (
                np.log(p[targets[b, t]]),
                entropy,
                sum(y * (np.log(y) - np.log(x)) for x, y in zip(p, q, strict=True)),
                sum(x * (np.log(x) - np.log(y)) for x, y in zip(p, q, strict=True)),
                np.log(q[targets[b, t]]),
            )
    return out


@pytest.mark.parametrize("chunk", [None, 7, 3, 1])
def test_scores_are_those_of_a_plain_loop_at_any_chunk(chunk, arrays):
    hidden, ref, head, targets = arrays
    scores = score(_unembed(head), hidden, targets, ref, chunk=chunk)
    for ours, plain in zip(scores, _plain(hidden, ref, head, np.asarray(targets)), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)
    assert (scores.kl > 0).all()
    assert (scores.reverse_kl > 0).all()


def test_gradients_do_not_depend_on_the_chunk(arrays):
    hidden, ref, head, targets = arrays
    weights = jnp.asarray(np.random.default_rng(1).normal(0, 1, (5, ROWS, LENGTH)), jnp.float32)

    def loss(hidden, head, chunk):
        scores = score(_unembed(head), hidden, targets, ref, chunk=chunk)
        return sum(jnp.sum(w * x) for w, x in zip(weights, scores, strict=True))

    whole = jax.grad(loss, argnums=(0, 1))(hidden, head, 32)
    pieces = jax.grad(loss, argnums=(0, 1))(hidden, head, 3)
    for one, two in zip(whole, pieces, strict=True):
        assert np.linalg.norm(one - two) < 1e-5 * np.linalg.norm(one)
        assert np.linalg.norm(one) > 1


def _sizes(jaxpr):
    """Of every array that is made."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.size for var in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from _sizes(inner)


def test_no_array_of_all_tokens_times_the_vocabulary_is_held(arrays):
    hidden, ref, head, targets = arrays

    def loss(hidden):
        return jnp.sum(score(_unembed(head), hidden, targets, ref, chunk=2).logprobs)

    assert max(_sizes(jax.make_jaxpr(jax.grad(loss))(hidden).jaxpr)) < ROWS * LENGTH * VOCAB


def test_of_a_large_vocabulary_fewer_tokens_logits_exist_at_once():
    hidden, head = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 512, 8), (262_144, 8)))
    targets = jax.ShapeDtypeStruct((4, 512), jnp.int32)
    states = jax.ShapeDtypeStruct((9,), jnp.int32)
    made = {
        "score": jax.make_jaxpr(lambda h, w, t: score(_unembed(w), h, t).logprobs)(hidden, head, targets),
        "chosen": jax.make_jaxpr(lambda h, w, s: chosen(_unembed(w), h, s, s))(hidden, head, states),
    }
    for name, jaxpr in made.items():
        assert max(_sizes(jaxpr.jaxpr)) <= 1 << 26, name  # 268 MB, where all logits would be 2.1 GB


@pytest.mark.parametrize("room", [1 << 26, 1])
def test_chosen_logprobs_are_those_of_the_whole_vocabulary(arrays, room, monkeypatch):
    hidden, _, head, _ = arrays
    monkeypatch.setattr(logprobs, "_LOGITS", room)
    states, targets = jnp.asarray([0, 3, 3, 6]), jnp.asarray([1, 10, 0, 4])
    whole = jax.nn.log_softmax(_unembed(head)(hidden), axis=-1)[:, states, targets]
    np.testing.assert_allclose(chosen(_unembed(head), hidden, states, targets), whole, atol=1e-6)


def test_kl_of_a_policy_with_itself_is_zero_and_flat(arrays):
    hidden, _, head, targets = arrays
    scores = score(_unembed(head), hidden, targets, hidden, chunk=3)
    for kind in ("kl", "reverse_kl"):
        np.testing.assert_allclose(getattr(scores, kind), 0, atol=1e-6)
        slope = jax.grad(lambda x, kind=kind: jnp.sum(getattr(score(_unembed(head), x, targets, hidden), kind)))(hidden)
        assert np.abs(slope).max() < 1e-6


def test_the_reference_gets_no_gradient_and_may_be_absent(arrays):
    hidden, ref, head, targets = arrays
    slope = jax.grad(lambda ref: sum(map(jnp.sum, score(_unembed(head), hidden, targets, ref))))(ref)
    assert not np.asarray(slope).any()
    for nothing in score(_unembed(head), hidden, targets)[2:]:
        np.testing.assert_array_equal(nothing, np.zeros((ROWS, LENGTH)))


def test_the_compiled_gradient_holds_a_fraction_of_all_tokens_logits():
    rows, length, vocabulary = 4, 2048, 2048
    whole = rows * length * vocabulary * 4  # bytes of [B, N, V] in float32
    shapes = ((rows, length, 8), (rows, length, 8), (vocabulary, 8))
    hidden, ref, head = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    targets = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def loss(hidden, ref, head, targets, chunk):
        scores = score(_unembed(head), hidden, targets, ref, chunk=chunk)
        return jnp.sum(scores.logprobs + scores.kl + scores.reverse_kl)

    def bytes_of(chunk):
        compiled = jax.jit(jax.grad(loss), static_argnums=4).lower(hidden, ref, head, targets, chunk).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert bytes_of(None) < whole / 3
    assert bytes_of(length) > 2 * whole
