"""Prefill and decode in one jitted function: token ids in, token ids and their log-probs out."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sva.models import cache as kv_cache
from sva.models.cache import Part, Recent
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
    collections = variables(model, params, adapter)
    positions, valid = positions_of(prompt_mask)
    past: list[Part] = []
    if prefix_ids is not None:
        prefix, where = prefix_ids[None], positions_of(jnp.ones_like(prefix_ids)[None])
        past.append(apply(model, collections, prefix, *where)[1])
        positions = positions + prefix_ids.shape[0]
    hidden, prompts = apply(model, collections, prompt_ids, positions, valid, past)
    hidden, next_position = (jnp.repeat(x[:, -1], samples, axis=0) for x in (hidden, positions + 1))
    return decode(
        model,
        collections,
        [*past, prompts],
        hidden,
        next_position,
        limit,
        eos_ids,
        keys,
        sampling,
        max_new_tokens,
    )


def decode(
    model: Transformer,
    collections: Mapping[str, Any],
    past: Sequence[Part],
    hidden: jax.Array,
    next_position: jax.Array,
    limit: jax.Array,
    eos_ids: jax.Array,
    keys: jax.Array,
    sampling: Sampling,
    max_new_tokens: int,
) -> Generation:
    """The decode loop, from the last prompt token's hidden state [B, D] and the prompts' keys and values."""
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
        step, recent, out, done, token = state
        position = (next_position + step - 1)[:, None]
        here = position, jnp.ones_like(position, bool)
        hidden, recent = apply(model, collections, token[:, None], *here, past, recent)
        out, done, token = record(out, done, *sample(hidden[:, -1], step), step)
        return step + 1, recent, out, done, token

    out = Generation(
        tokens=jnp.zeros((batch, max_new_tokens), jnp.int32),
        logprobs=jnp.zeros((batch, max_new_tokens), jnp.float32),
        lengths=jnp.zeros((batch,), jnp.int32),
    )
    first = jnp.zeros((), jnp.int32)
    out, done, token = record(out, jnp.zeros((batch,), bool), *sample(hidden, first), first)
    slots = kv_cache.empty(model.cfg, batch, max_new_tokens, model.dtype, scan=model.scan_layers)
    state = (first + 1, Recent(slots, first), out, done, token)
    *_, out, _, _ = jax.lax.while_loop(unfinished, advance, state)
    return out
