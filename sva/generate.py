"""Prefill and decode in one jitted function: token ids in, token ids and their log-probs out."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sva.models import cache as kv_cache
from sva.models.cache import Cache
from sva.models.transformer import Transformer, apply, positions_of, variables
from sva.sampling import Sampling


class Generation(NamedTuple):
    """What was generated, N = max_new_tokens."""

    tokens: Any  # [B, N] int32; a row's end token is its last one, 0 after it
    logprobs: Any  # [B, N] float32 nats, of softmax(logits) before any temperature or cut; 0 after the end
    lengths: Any  # [B] int32, tokens generated, the end token among them


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "sampling", "samples"))
def generate(
    model: Transformer,
    params: Mapping[str, Any],
    prompt_ids: jax.Array,
    prompt_mask: jax.Array,
    limit: jax.Array,
    eos_ids: jax.Array,
    keys: jax.Array,
    adapter: Mapping[str, Any] | None = None,
    *,
    prefix_ids: jax.Array | None = None,
    max_new_tokens: int,
    sampling: Sampling,
    samples: int = 1,
) -> Generation:
    """Continues every prompt until an end token or the limit.

    Args:
      model, params, adapter: as for `logits`.
      prompt_ids, prompt_mask: [P, T] int32, padded on the left.
      limit: [] int32, tokens to generate at most; no more than max_new_tokens.
      eos_ids: [K] int32, end tokens; -1 where unused.
      keys: [B] typed keys, one a row of the result; step t uses fold_in(key, t).
      prefix_ids: [S] int32, tokens before every prompt, read once; not with an adapter that differs by row.
      max_new_tokens: N, the size of the result (static).
      sampling: the strategy (static).
      samples: of each prompt; the prompt is read once. Row p * samples + i is sample i of prompt p, B = P * samples.
    Returns:
      Generation of B rows.
    """
    rows, slots = prompt_ids.shape[0], prompt_ids.shape[1] + max_new_tokens
    collections = variables(model, params, adapter)
    positions, valid = positions_of(prompt_mask)
    if prefix_ids is None:
        cache = kv_cache.init(model.cfg, rows, slots, model.dtype, scan=model.scan_layers)
    else:
        positions = positions + prefix_ids.shape[0]
        cache = kv_cache.init(model.cfg, 1, prefix_ids.shape[0], model.dtype, scan=model.scan_layers)
        _, cache = apply(model, collections, prefix_ids[None], *positions_of(jnp.ones_like(prefix_ids)[None]), cache)
        cache = kv_cache.grow(kv_cache.repeat(cache, rows), slots)
    hidden, cache = apply(model, collections, prompt_ids, positions, valid, cache)
    hidden, next_position = hidden[:, -1], positions[:, -1] + 1
    if samples > 1:
        cache = kv_cache.repeat(cache, samples)
        hidden, next_position = (
            jnp.repeat(hidden, samples, axis=0),
            jnp.repeat(next_position, samples, axis=0),
        )
    return decode(model, collections, cache, hidden, next_position, limit, eos_ids, keys, sampling, max_new_tokens)


def decode(
    model: Transformer,
    collections: Mapping[str, Any],
    cache: Cache,
    hidden: jax.Array,
    next_position: jax.Array,
    limit: jax.Array,
    eos_ids: jax.Array,
    keys: jax.Array,
    sampling: Sampling,
    max_new_tokens: int,
) -> Generation:
    """The decode loop, from the last prompt token's hidden state [B, D] and a cache with max_new_tokens free slots."""
    batch = hidden.shape[0]

    def sample(hidden: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = apply(model, collections, hidden, method="unembed")
        token = sampling(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, step))
        chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        return token, chosen - jax.nn.logsumexp(logits, axis=-1)

    def record(out: Generation, done: jax.Array, token: jax.Array, logprob: jax.Array, step: jax.Array):
        token, logprob = jnp.where(done, 0, token), jnp.where(done, 0.0, logprob)
        out = Generation(
            tokens=jax.lax.dynamic_update_slice(out.tokens, token[:, None], (jnp.zeros_like(step), step)),
            logprobs=jax.lax.dynamic_update_slice(out.logprobs, logprob[:, None], (jnp.zeros_like(step), step)),
            lengths=out.lengths + jnp.where(done, 0, 1),
        )
        return out, done | (token[:, None] == eos_ids[None, :]).any(axis=1), token

    def unfinished(state) -> jax.Array:
        step, _, _, done, _ = state
        return (step < limit) & ~done.all()

    def advance(state):
        step, cache, out, done, token = state
        position = (next_position + step - 1)[:, None]
        hidden, cache = apply(model, collections, token[:, None], position, jnp.ones_like(position, bool), cache)
        out, done, token = record(out, done, *sample(hidden[:, -1], step), step)
        return step + 1, cache, out, done, token

    out = Generation(
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
        logprobs=jnp.zeros((batch, max_new_tokens), jnp.float32),
        lengths=jnp.zeros((batch,), jnp.int32),
    )
    first = jnp.zeros((), jnp.int32)
    out, done, token = record(out, jnp.zeros((batch,), bool), *sample(hidden, first), first)
    *_, out, _, _ = jax.lax.while_loop(unfinished, advance, (first + 1, cache, out, done, token))
    return out
