"""Prefill and decode in one jitted function: token ids in, token ids and their log-probs out."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from sva.generation.sampling import Sampling, reported
from sva.models import cache as kv_cache
from sva.models.cache import Part, Recent
from sva.models.transformer import Transformer, apply, positions_of, variables


class Generation(NamedTuple):
    """What was generated, N = max_new_tokens."""

    tokens: Any  # [B, N] int32; a row's end token is its last one, 0 after it
    logprobs: (
        Any  # [B, N] float32 nats, before temperature and cut (`OnPolicy`: after its temperature); 0 after the end
    )
    lengths: Any  # [B] int32, tokens generated, the end token among them


@struct.dataclass
class Rows:
    """Where each of B rows stands: the token drawn last, which the next step reads."""

    token: jax.Array  # [B] int32
    position: jax.Array  # [B] int32, that token's
    count: jax.Array  # [B] int32, tokens drawn; token t of a row is drawn with fold_in(key, t)
    done: jax.Array  # [B] bool
    limit: jax.Array  # [B] int32, tokens to draw at most
    keys: jax.Array  # [B] typed keys


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
      max_new_tokens: N, the size of the result, at least 2 (static).
      sampling: the strategy (static).
      samples: of each prompt; the prompt is read once. Row p * samples + i is sample i of prompt p, B = P * samples.
    Returns:
      Generation of B rows.
    """
    collections = variables(model, params, adapter)
    past: list[Part] = []
    if prefix_ids is not None:
        past.append(read(model, collections, prefix_ids[None], jnp.ones_like(prefix_ids)[None])[1])
    logits, prompts, position = read(model, collections, prompt_ids, prompt_mask, past)
    logits, position = (jnp.repeat(x, samples, axis=0) for x in (logits, position))
    rows, first = begin(logits, position, jnp.broadcast_to(limit, keys.shape), eos_ids, keys, sampling)
    if samples == 1:  # what one row reads is written on
        length = prompt_ids.shape[1]
        recent = Recent(kv_cache.resize(prompts, length + max_new_tokens), jnp.full((), length, jnp.int32))
    else:
        past.append(kv_cache.resize(prompts, prompt_ids.shape[1]))
        recent = kv_cache.start(model.cfg, len(keys), max_new_tokens, model.kept_dtype, scan=model.scan_layers)
    rows, rest, _ = decode(model, collections, past, recent, rows, eos_ids, sampling=sampling, steps=max_new_tokens - 1)
    tokens, logprobs = (jnp.concatenate([x[:, None], y], axis=1) for x, y in zip(first, rest, strict=True))
    return Generation(tokens, logprobs, rows.count)


def read(
    model: Transformer,
    collections: Mapping[str, Any],
    ids: jax.Array,
    mask: jax.Array,
    past: Sequence[Part] = (),
) -> tuple[jax.Array, Part, jax.Array]:
    """What prompts [P, T], padded on the left, come to after `past`, in which every slot holds a token.

    Returns:
      Logits of the next token [P, V] float32, the prompts' keys and values, and the last token's position [P].
    """
    positions, valid = positions_of(mask)
    positions = positions + sum(part.positions.shape[1] for part in past)
    hidden, part = apply(model, collections, ids, positions, valid, past, output_start=ids.shape[1] - 1)
    return apply(model, collections, hidden[:, -1], method="unembed"), part, positions[:, -1]


def begin(
    logits: jax.Array, position: jax.Array, limit: jax.Array, eos_ids: jax.Array, keys: jax.Array, sampling: Sampling
) -> tuple[Rows, tuple[jax.Array, jax.Array]]:
    """Rows [B] whose first token is drawn from logits [B, V] of a last prompt token at `position` [B].

    Returns:
      The rows, and of the token drawn its id and its log-prob in nats, each [B].
    """
    nothing = jnp.zeros_like(position)
    rows = Rows(nothing, position, nothing, jnp.zeros_like(position, bool), limit, keys)
    return _draw(rows, logits, eos_ids, sampling)


def decode(
    model: Transformer,
    collections: Mapping[str, Any],
    past: Sequence[Part],
    recent: Recent,
    rows: Rows,
    eos_ids: jax.Array,
    *,
    sampling: Sampling,
    steps: int,
) -> tuple[Rows, tuple[jax.Array, jax.Array], Recent]:
    """Draws `steps` tokens more for each row that is not done, or fewer where all are.

    Args:
      past, recent: keys and values of what the rows hold; `recent` of B rows, with `steps` slots free.
    Returns:
      The rows, the tokens and log-probs drawn, each [B, steps] (0 where a row was done), and `recent` with the keys
      and values of the tokens that were read.
    """
    batch = rows.token.shape[0]

    def unfinished(state) -> jax.Array:
        step, rows, _, _ = state
        return (step < steps) & ~rows.done.all()

    def advance(state):
        step, rows, out, recent = state
        where = rows.position[:, None], jnp.ones((batch, 1), bool)
        hidden, recent = apply(model, collections, rows.token[:, None], *where, past, recent)
        logits = apply(model, collections, hidden[:, -1], method="unembed")
        rows, drawn = _draw(rows, logits, eos_ids, sampling)
        column = jnp.zeros_like(step), step
        tokens, logprobs = (
            jax.lax.dynamic_update_slice(x, y[:, None], column) for x, y in zip(out, drawn, strict=True)
        )
        return step + 1, rows, (tokens, logprobs), recent

    out = jnp.zeros((batch, steps), jnp.int32), jnp.zeros((batch, steps), jnp.float32)
    first = jnp.zeros((), jnp.int32)
    _, rows, out, recent = jax.lax.while_loop(unfinished, advance, (first, rows, out, recent))
    return rows, out, recent


def _draw(
    rows: Rows, logits: jax.Array, eos_ids: jax.Array, sampling: Sampling
) -> tuple[Rows, tuple[jax.Array, jax.Array]]:
    token = sampling(logits, jax.vmap(jax.random.fold_in)(rows.keys, rows.count))
    by_token = reported(
        sampling, logits
    ).T  # as the product leaves them on CPU, so that none of the three is made to turn them round
    logprob = by_token[token, jnp.arange(len(token))] - jax.nn.logsumexp(by_token, axis=0)
    token, logprob = jnp.where(rows.done, 0, token), jnp.where(rows.done, 0.0, logprob)
    count = rows.count + jnp.where(rows.done, 0, 1)
    ended = (token[:, None] == eos_ids[None, :]).any(axis=1) | (count >= rows.limit)
    rows = dataclasses.replace(
        rows,
        token=token,
        position=rows.position + 1,
        count=count,
        done=rows.done | ended,
    )
    return rows, (token, logprob)
