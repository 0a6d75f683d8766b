"""Log-probs of given tokens and KL to a reference model, without a [B, N, V] array of the whole sequence."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

_TOKENS = 512  # whose logits exist at once: 100 MB for SmolLM2's vocabulary, 260 MB for Llama 3's
_LOGITS = 1 << 26  # that exist at once, 268 MB: of fewer tokens, where the vocabulary is Gemma's


class Scores(NamedTuple):
    """Log-probs, entropies and KLs of tokens, all [B, N] float32 nats; the last three are 0 without a reference."""

    logprobs: jax.Array  # of the token itself
    entropy: jax.Array  # of the distribution it was drawn from
    kl: jax.Array  # KL(reference || model) over the whole vocabulary
    reverse_kl: jax.Array  # KL(model || reference) over the whole vocabulary
    ref_logprobs: jax.Array  # of the token itself, under the reference


def score(
    unembed: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    ref_hidden: jax.Array | None = None,
    chunk: int | None = None,
) -> Scores:
    """Scores of `targets` under the model, exact over the vocabulary.

    Logits exist for `chunk` tokens a row at a time, and are computed again in the backward pass.

    Args:
      unembed: hidden [..., D] -> logits [..., V] float32.
      hidden: [B, N, D], the state from which each target is predicted.
      targets: [B, N] int32.
      ref_hidden: [B, N, D] of the reference model, which shares `unembed`, or None. It gets no gradient.
      chunk: tokens a row; by default as many as make about 512 in all rows, fewer of a vocabulary above 131,072.
    """
    batch, length = targets.shape
    chunk = chunk or max(1, min(_TOKENS, _LOGITS // _vocabulary(unembed, hidden)) // batch)

    @jax.checkpoint
    def one(hidden: jax.Array, targets: jax.Array, ref_hidden: jax.Array | None) -> Scores:
        logps = jax.nn.log_softmax(unembed(hidden), axis=-1)
        probs = jnp.exp(logps)
        chosen, entropy = _pick(logps, targets), -jnp.sum(probs * logps, axis=-1)
        if ref_hidden is None:
            nothing = jnp.zeros_like(chosen)
            return Scores(chosen, entropy, nothing, nothing, nothing)
        ref = jax.lax.stop_gradient(jax.nn.log_softmax(unembed(ref_hidden), axis=-1))
        kl = jnp.sum(jnp.exp(ref) * (ref - logps), axis=-1)
        return Scores(chosen, entropy, kl, jnp.sum(probs * (logps - ref), axis=-1), _pick(ref, targets))

    if length <= chunk:
        return one(hidden, targets, ref_hidden)
    padded = -(-length // chunk) * chunk

    def split(x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        x = jnp.pad(x, ((0, 0), (0, padded - length)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, padded // chunk, chunk, *x.shape[2:]), 1, 0)

    scores = jax.lax.map(lambda args: one(*args), (split(hidden), split(targets), split(ref_hidden)))
    return Scores(*(jnp.moveaxis(x, 0, 1).reshape(batch, padded)[:, :length] for x in scores))


def chosen(
    unembed: Callable[[jax.Array], jax.Array], hidden: jax.Array, states: jax.Array, targets: jax.Array
) -> jax.Array:
    """[B, K] float32 nats: the log-probs of `targets` [K] after the states numbered `states` [K] of hidden [B, S, D].

    Every state is unembedded once: all together, or where their logits are too many one column after another.
    """
    batch, length, _ = hidden.shape
    if batch * length * _vocabulary(unembed, hidden) <= _LOGITS:
        return jax.nn.log_softmax(unembed(hidden), axis=-1)[:, states, targets]

    def column(hidden: jax.Array) -> jax.Array:
        return jnp.take(jax.nn.log_softmax(unembed(hidden), axis=-1), targets, axis=-1)

    by_state = jax.lax.map(column, jnp.moveaxis(hidden, 1, 0))  # [S, B, K]
    return by_state[states, :, jnp.arange(len(targets))].T


def _vocabulary(unembed: Callable[[jax.Array], jax.Array], hidden: jax.Array) -> int:
    return jax.eval_shape(unembed, jax.ShapeDtypeStruct((1, 1, hidden.shape[-1]), hidden.dtype)).shape[-1]


def _pick(logps: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logps, targets[..., None], axis=-1)[..., 0]
