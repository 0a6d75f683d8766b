"""A population answers the same prompts, as one batch: every row is one member and one prompt.

A member is a mixture of a bank's experts (few-shot adaptation) or a z of its own (evolution). What all prompts begin
with is read once a member, as a segment of the cache that the member's rows share. Rows decode a few tokens at a
time; whenever at most half of them are at work, they go on without the others, so that a batch costs what its answers
need and not what its longest does. A row's answer depends on its neighbours by rounding alone.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sva.generation import chat
from sva.generation.decode import DecodeState, Generation, PromptBatch, begin, decode, prefill_prefix, read
from sva.generation.finite import check_finite
from sva.generation.lm import LM
from sva.generation.prompts import check_token_lists, pad_eos
from sva.generation.sampling import Sampling
from sva.generation.weights import Weights, bank_mixture, own_factors
from sva.models import cache as kv_cache
from sva.models.cache import DecodeCache, KVSegment
from sva.models.transformer import Transformer
from sva.parallel.processes import to_host
from sva.parallel.sharding import row_shards
from sva.utils.padding import common_prefix, pad_rows, pad_tokens, round_up

_STEPS = 4  # tokens between two looks at which rows are at work
_FEWEST = 16  # rows that are not worth halving


@dataclasses.dataclass(frozen=True)
class Members:
    """P members; see `mixtures` and `own_z`."""

    adapter_of: Callable[[Transformer, Any, Any], Any]  # as of `Weights`
    shared: Any
    values: Any  # a tree whose leaves' first axis is P

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.values)[0])

    def some(self, first: int, last: int, size: int) -> "Members":
        """Members `first` to `last`, the first of them repeated until there are `size`."""
        values = jax.tree.map(lambda x: pad_rows(np.asarray(x[first:last]), size), self.values)
        return dataclasses.replace(self, values=values)


def mixtures(bank: Any, alphas: np.ndarray) -> Members:
    """Mixtures of a bank's experts: the model's nested tree of `Slots`, of E + 1 slots, and alphas [P, E] or [P, M, E].

    A mixture for each of M matrices where there are three axes.
    """
    return Members(bank_mixture, bank, np.pad(alphas, [(0, 0)] * (alphas.ndim - 1) + [(1, 0)]))  # slot 0 is the base


def own_z(spectra: Any, z: Any) -> Members:
    """Members with a z each: the model's nested tree of spectra, and {weight name: [P, R]}."""
    return Members(own_factors, spectra, to_host(z))


class PaddedShape(NamedTuple):
    """Sizes that fit some prompts."""

    shared: int  # tokens that all of them begin with, see `sva.utils.padding.common_prefix`
    width: int  # of the rest of the longest one


def padded_shape(prompts: Sequence[Sequence[int]]) -> PaddedShape:
    """The smallest shape that fits these prompts."""
    shared = common_prefix(prompts)
    return PaddedShape(shared, max(map(len, prompts)) - shared)


def prompt_batch(
    lm: LM, prompts: Sequence[Sequence[int]], keys: jax.Array, max_new_tokens: int, shape: PaddedShape | None = None
) -> PromptBatch:
    """The prompts, each with its key of `keys` [S], in the shape of more prompts of which these are some.

    Raises:
      UserError: an empty prompt, one that does not leave max_new_tokens of the context, or a token id out of range.
    """
    check_token_lists(lm, prompts, max_new_tokens)
    shared, width = shape or padded_shape(prompts)
    ids, mask = pad_tokens([prompt[shared:] for prompt in prompts], width)
    prefix_ids = np.asarray(prompts[0][:shared], np.int32) if shared else None
    return PromptBatch(ids, mask, keys, np.int32(max_new_tokens), prefix_ids)


def answers(
    lm: LM,
    members: Members,
    prompts: PromptBatch,
    *,
    sampling: Sampling,
    rows: int,
    stops: Sequence[str] = (),
) -> Generation:
    """P * S continuations as host arrays: of up to N = `prompts.limit` tokens; row p * S + s is prompt s under
    member p.

    Members are padded to a multiple of 8, or to as many as make `rows`, so that few programs serve all numbers.

    Args:
      rows: decoded at once, whole members only; sets the peak memory of the KV cache.
      stops: stop strings; one that is a special token ends a row, others are for the caller to find.
    Raises:
      UserError: no answer has log-probabilities that are finite.
    """
    size = len(prompts.ids)
    eos_ids = jnp.asarray(pad_eos(chat.end_tokens(lm, stops)))
    # On a mesh, as many members as make rows that it divides.
    step = row_shards() // math.gcd(row_shards(), size)
    together = max(step, min(rows // size, round_up(len(members), 8)) // step * step)
    parts = []
    for first in range(0, len(members), together):
        last = min(first + together, len(members))
        out = _batch(lm, members.some(first, last, together), prompts, eos_ids, sampling)
        parts.append([x[: (last - first) * size] for x in out])
    out = Generation(*map(np.concatenate, zip(*parts, strict=True)))
    if not np.isfinite(out.logprobs).all(axis=1).any():  # one member that overflows is a bad member, all are a fault
        check_finite(lm, out.logprobs, "answer")
    return out


def _batch(lm: LM, members: Members, prompts: PromptBatch, eos_ids: jax.Array, sampling: Sampling) -> Generation:
    """`answers` of one batch. Whenever at most half of the rows are at work, they go on without the others."""
    total, max_new_tokens = len(members) * len(prompts.ids), int(prompts.limit)
    weights = Weights(lm.model, lm.params, eos_ids, adapter_of=members.adapter_of, shared=members.shared)
    rounds = -(-(max_new_tokens - 1) // _STEPS)
    state, first = _read(weights, members.values, prompts, slots=rounds * _STEPS, sampling=sampling)
    tokens, logprobs = (
        np.zeros((total, 1 + rounds * _STEPS), np.int32),
        np.zeros((total, 1 + rounds * _STEPS), np.float32),
    )
    tokens[:, 0], logprobs[:, 0] = to_host(first)
    counts, which = np.ones(total, np.int32), np.arange(total)  # which rows are in the batch
    for at in range(1, tokens.shape[1], _STEPS):
        live = np.flatnonzero(~to_host(state.decoding.done)[: len(which)])
        if not len(live):
            break
        batch = len(state.decoding.done)
        while batch % (2 * row_shards()) == 0 and batch // 2 >= max(_FEWEST, len(live)):
            batch //= 2
        if batch < len(state.decoding.done):
            state, which = _keep(state, np.resize(live, batch)), which[live]
        state, drawn = _advance(weights, state, sampling=sampling, steps=_STEPS)
        for kept, new in zip((tokens, logprobs), to_host(drawn), strict=True):
            kept[which, at : at + _STEPS] = new[: len(which)]
        counts[which] = to_host(state.decoding.count)[: len(which)]
    return Generation(tokens[:, :max_new_tokens], logprobs[:, :max_new_tokens], counts)


@struct.dataclass
class State:
    """B rows at work."""

    values: Any  # of `Members`, first axis B
    decoding: DecodeState
    past: list[KVSegment]  # what all prompts begin with, of P members or B rows
    cache: DecodeCache


@partial(jax.jit, static_argnames=("slots", "sampling"))
def _read(
    weights: Weights, values: Any, prompts: PromptBatch, *, slots: int, sampling: Sampling
) -> tuple[State, tuple[jax.Array, ...]]:
    """The state after all prompts are read, with room for `slots` tokens, and each row's first token and log-prob.

    What all prompts begin with is read once a member, of values whose first axis is P.
    """
    members, shots = len(jax.tree.leaves(values)[0]), len(prompts.ids)
    past = []
    if prompts.prefix_ids is not None:
        prefix = jnp.broadcast_to(prompts.prefix_ids, (members, len(prompts.prefix_ids)))
        past = [prefill_prefix(weights.model, weights.collections(values), prefix)]
    each = jax.tree.map(lambda x: jnp.repeat(x, shots, axis=0), values)  # row p * S + s sees row p of the past
    rows = (prompts.ids, prompts.mask, prompts.keys)
    ids, mask, keys = (jnp.tile(x, (members,) + (1,) * (x.ndim - 1)) for x in rows)
    logits, segment, position = read(weights.model, weights.collections(each), ids, mask, past)
    limit = jnp.broadcast_to(prompts.limit, keys.shape)
    decoding, first = begin(logits, position, limit, weights.eos_ids, keys, sampling)
    length = ids.shape[1]
    cache = DecodeCache(kv_cache.resize(segment, length + slots), jnp.full((), length, jnp.int32))
    return State(each, decoding, past, cache), first


@partial(jax.jit, static_argnames=("sampling", "steps"), donate_argnames=("state",))
def _advance(weights: Weights, state: State, *, sampling: Sampling, steps: int) -> tuple[State, tuple[jax.Array, ...]]:
    """The state `steps` tokens later, and the tokens and log-probs, each [B, steps]."""
    decoding, drawn, cache = decode(
        weights.model,
        weights.collections(state.values),
        state.past,
        state.cache,
        state.decoding,
        weights.eos_ids,
        sampling=sampling,
        steps=steps,
    )
    return dataclasses.replace(state, decoding=decoding, cache=cache), drawn


@jax.jit
def _keep(state: State, which: jax.Array) -> State:
    """The state of these rows alone."""
    total = len(state.decoding.done)

    def some(segment: KVSegment) -> KVSegment:
        return kv_cache.rows(segment, which // (total // len(segment.valid)))

    past, cache = [some(segment) for segment in state.past], DecodeCache(some(state.cache.segment), state.cache.index)
    values, decoding = jax.tree.map(lambda x: x[which], (state.values, state.decoding))
    return State(values, decoding, past, cache)
