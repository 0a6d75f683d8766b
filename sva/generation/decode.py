"""Prefill and decode in one jitted function: token ids in, token ids and their log-probs out."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from sva.generation.row_sampling import PerRow, RowSettings
from sva.generation.sampling import Sampling, reported
from sva.models import cache as kv_cache
from sva.models.cache import DecodeCache, KVSegment
from sva.models.transformer import Transformer, apply, positions_of, variables


class Generation(NamedTuple):
    """Generated tokens and their log-probs, N = max_new_tokens."""

    tokens: Any  # [B, N] int32; a row's end token is its last one, 0 after it
    logprobs: Any  # [B, N] float32 nats, before temperature and cut (`OnPolicy`: after its temperature), then 0
    lengths: Any  # [B] int32, tokens generated, the end token among them


@struct.dataclass
class DecodeState:
    """The state of B rows between two steps; the next one reads each row's last token."""

    token: jax.Array  # [B] int32
    position: jax.Array  # [B] int32, that token's
    count: jax.Array  # [B] int32, tokens drawn; token t of a row is drawn with fold_in(key, t)
    done: jax.Array  # [B] bool
    limit: jax.Array  # [B] int32, tokens to draw at most
    keys: jax.Array  # [B] typed keys
    settings: RowSettings | None = None  # of B rows, for the strategy `PerRow`


class PromptBatch(NamedTuple):
    """P prompts to continue."""

    ids: Any  # [P, T] int32, padded on the left
    mask: Any  # [P, T] int32
    keys: Any  # [P] typed keys, one a row of the result; token t of a row is drawn with fold_in(key, t)
    limit: Any  # [] int32, tokens to draw at most
    prefix_ids: Any = None  # [S] int32, tokens before every prompt, which are read once; None for none


@partial(jax.jit, static_argnames=("model", "max_new_tokens", "sampling"))
def generate(
    model: Transformer,
    params: Mapping[str, Any],
    prompts: PromptBatch,
    eos_ids: jax.Array,
    adapter: Mapping[str, Any] | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling,
) -> Generation:
    """The continuation of every prompt, up to an end token or the limit.

    Args:
      model, params, adapter: as for `logits`.
      prompts: without a prefix where the adapter differs by row.
      eos_ids: [K] int32, end tokens; -1 where unused.
      max_new_tokens: N, the size of the result, at least 2 and at least `prompts.limit` (static).
      sampling: the strategy (static).
    Returns:
      Generation of P rows.
    """
    collections = variables(model, params, adapter)
    past: list[KVSegment] = []
    if prompts.prefix_ids is not None:
        past.append(prefill_prefix(model, collections, prompts.prefix_ids[None]))
    logits, segment, position = read(model, collections, prompts.ids, prompts.mask, past)
    limit = jnp.broadcast_to(prompts.limit, prompts.keys.shape)
    state, first = begin(logits, position, limit, eos_ids, prompts.keys, sampling)
    length = prompts.ids.shape[1]
    cache = DecodeCache(kv_cache.resize(segment, length + max_new_tokens), jnp.full((), length, jnp.int32))
    steps = max_new_tokens - 1
    state, rest, _ = decode(model, collections, past, cache, state, eos_ids, sampling=sampling, steps=steps)
    tokens, logprobs = (jnp.concatenate([x[:, None], y], axis=1) for x, y in zip(first, rest, strict=True))
    return Generation(tokens, logprobs, state.count)


@partial(jax.jit, static_argnames=("model",))
def prefill_prefix(
    model: Transformer, collections: Mapping[str, Any], ids: jax.Array, mask: jax.Array | None = None
) -> KVSegment:
    """Keys and values of the tokens before every prompt: of one row that all share, or of one a member.

    Args:
      collections: the variables, as `variables` gives them.
      ids: [P, S] int32.
      mask: [P, S] int32; None where every one is a token.
    """
    positions, valid = positions_of(jnp.ones_like(ids) if mask is None else mask)
    return apply(model, collections, ids, positions, valid, output_start=ids.shape[1] - 1)[1]


def read(
    model: Transformer,
    collections: Mapping[str, Any],
    ids: jax.Array,
    mask: jax.Array,
    past: Sequence[KVSegment] = (),
) -> tuple[jax.Array, KVSegment, jax.Array]:
    """Logits of the next token [P, V] float32, the prompts' keys and values, and the last token's position [P].

    Prompts are [P, T], padded on the left, and follow `past`, in which every slot holds a token.
    """
    positions, valid = positions_of(mask)
    positions = positions + sum(segment.positions.shape[1] for segment in past)
    hidden, segment = apply(model, collections, ids, positions, valid, past, output_start=ids.shape[1] - 1)
    return apply(model, collections, hidden[:, -1], method="unembed"), segment, positions[:, -1]


def begin(
    logits: jax.Array,
    position: jax.Array,
    limit: jax.Array,
    eos_ids: jax.Array,
    keys: jax.Array,
    sampling: Sampling | PerRow,
    settings: RowSettings | None = None,
) -> tuple[DecodeState, tuple[jax.Array, ...]]:
    """The state of B rows whose first token is drawn from logits [B, V] of a last prompt token at `position` [B].

    Returns:
      The state, and of the token drawn its id and its log-prob in nats, each [B]. Where the strategy reports the K
      likeliest tokens, their ids and log-probs too, [B, K].
    """
    nothing = jnp.zeros_like(position)
    state = DecodeState(nothing, position, nothing, jnp.zeros_like(position, bool), limit, keys, settings)
    return _draw(state, logits, eos_ids, sampling)


def decode(
    model: Transformer,
    collections: Mapping[str, Any],
    past: Sequence[KVSegment],
    cache: DecodeCache,
    state: DecodeState,
    eos_ids: jax.Array,
    *,
    sampling: Sampling | PerRow,
    steps: int,
) -> tuple[DecodeState, tuple[jax.Array, ...], DecodeCache]:
    """The state after `steps` more tokens of each row that is not done, or fewer where all are.

    Args:
      past, cache: keys and values of what the rows have read; `cache` is of B rows, with `steps` slots free.
    Returns:
      The state, the tokens and log-probs drawn, each [B, steps] (0 where a row was done), and `cache` with the keys
      and values of the tokens that were read. As of `begin`, the K likeliest tokens may follow, [B, steps, K].
    """
    batch = state.token.shape[0]

    def unfinished(carry) -> jax.Array:
        step, state, _, _ = carry
        return (step < steps) & ~state.done.all()

    def advance(carry):
        step, state, out, cache = carry
        where = state.position[:, None], jnp.ones((batch, 1), bool)
        hidden, cache = apply(model, collections, state.token[:, None], *where, past, cache)
        logits = apply(model, collections, hidden[:, -1], method="unembed")
        state, drawn = _draw(state, logits, eos_ids, sampling)
        zero = jnp.zeros_like(step)
        out = tuple(
            jax.lax.dynamic_update_slice(x, y[:, None], (zero, step, *[zero] * (y.ndim - 1)))
            for x, y in zip(out, drawn, strict=True)
        )
        return step + 1, state, out, cache

    shapes = [(batch, steps)] * 2
    if isinstance(sampling, PerRow) and sampling.likeliest:
        shapes += [(batch, steps, sampling.likeliest)] * 2
    out = tuple(jnp.zeros(x, (jnp.int32, jnp.float32)[place % 2]) for place, x in enumerate(shapes))
    first = jnp.zeros((), jnp.int32)
    _, state, out, cache = jax.lax.while_loop(unfinished, advance, (first, state, out, cache))
    return state, out, cache


def _draw(
    state: DecodeState, logits: jax.Array, eos_ids: jax.Array, sampling: Sampling | PerRow
) -> tuple[DecodeState, tuple[jax.Array, ...]]:
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.count)
    if isinstance(sampling, PerRow):
        assert state.settings is not None
        return _drawn(state, logits, eos_ids, sampling(logits, keys, state.settings), sampling)
    return _drawn(state, logits, eos_ids, sampling(logits, keys), sampling)


def _drawn(
    state: DecodeState, logits: jax.Array, eos_ids: jax.Array, token: jax.Array, sampling: Sampling | PerRow
) -> tuple[DecodeState, tuple[jax.Array, ...]]:
    # Transposed, as the product leaves them on CPU, so that none of the three uses copies them to another layout.
    by_token = reported(sampling, logits).T
    total = jax.nn.logsumexp(by_token, axis=0)
    logprob = by_token[token, jnp.arange(len(token))] - total
    others: tuple[jax.Array, ...] = ()
    if isinstance(sampling, PerRow) and sampling.likeliest:
        values, ids = jax.lax.top_k(logits, sampling.likeliest)
        others = ids, values - total[:, None]
    token, logprob = jnp.where(state.done, 0, token), jnp.where(state.done, 0.0, logprob)
    count = state.count + jnp.where(state.done, 0, 1)
    ended = (token[:, None] == eos_ids[None, :]).any(axis=1) | (count >= state.limit)
    state = dataclasses.replace(
        state,
        token=token,
        position=state.position + 1,
        count=count,
        done=state.done | ended,
    )
    return state, (token, logprob, *others)
