"""A population answers the same prompts, as one batch: every row is one member and one prompt.

A member is a mixture of a bank's experts (few-shot adaptation) or a z of its own (evolution). What all prompts begin
with is read once a member, as a part of the cache that the member's rows share. Rows decode a few tokens at a time;
whenever at most half of them are at work, they go on without the others, so that a batch costs what its answers need
and not what its longest does. A row's answer depends on its neighbours by rounding alone.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sva.generation import chat
from sva.generation.decode import Generation, Rows, begin, decode, read
from sva.generation.finite import check_finite
from sva.generation.lm import LM
from sva.generation.prompts import check_prompts, pad_eos
from sva.generation.sampling import Sampling
from sva.models import cache as kv_cache
from sva.models.cache import Part, Recent
from sva.models.transformer import Transformer, variables
from sva.models.vocabulary import check_ids
from sva.parallel.processes import to_host
from sva.spectral.forms import adapters
from sva.spectral.mixing import mixture
from sva.utils.padding import common_prefix, pad_rows

_SEGMENT = 4  # tokens between two looks at which rows are at work
_FEWEST = 16  # rows that are not worth halving


@dataclasses.dataclass(frozen=True)
class Members:
    """P members; see `mixtures` and `own_z`."""

    adapter: Callable[[Transformer, Any, Any], Any]  # of the model, what all share, and the values of some rows
    shared: Any
    values: Any  # a tree whose leaves' first axis is P

    def __len__(self) -> int:
        return len(jax.tree.leaves(self.values)[0])

    def some(self, first: int, last: int, size: int) -> "Members":
        """Those of these places, the first of them repeated until there are `size`."""
        values = jax.tree.map(lambda x: pad_rows(np.asarray(x[first:last]), size), self.values)
        return dataclasses.replace(self, values=values)


def mixtures(bank: Any, alphas: np.ndarray) -> Members:
    """Mixtures of a bank's experts: the model's nested tree of `Slots`, of E + 1 slots, and alphas [P, E] or [P, M, E].

    A mixture for each of M matrices where there are three axes.
    """
    return Members(_mixture, bank, np.pad(alphas, [(0, 0)] * (alphas.ndim - 1) + [(1, 0)]))  # slot 0 is the base


def own_z(spectra: Any, z: Any) -> Members:
    """Members with a z each: the model's nested tree of spectra, and {weight name: [P, R]}."""
    return Members(_factored, spectra, to_host(z))


def _mixture(_: Transformer, bank: Any, alphas: jax.Array) -> Any:
    return mixture(bank, alphas)


def _factored(model: Transformer, spectra: Any, z: Any) -> Any:
    return adapters(spectra, model.nest(z))


class Room(NamedTuple):
    """Sizes that fit some prompts."""

    shared: int  # tokens that all of them begin with, see `sva.utils.padding.common_prefix`
    width: int  # of the rest of the longest one


def room(prompts: Sequence[Sequence[int]]) -> Room:
    """Exactly what these need."""
    shared = common_prefix(prompts)
    return Room(shared, max(map(len, prompts)) - shared)


class Asked(NamedTuple):
    """S prompts."""

    prefix_ids: np.ndarray  # [T0] int32, what all of them begin with; may be empty
    ids: np.ndarray  # [S, T] int32, the rest, padded on the left
    mask: np.ndarray  # [S, T] int32
    keys: jax.Array  # [S] typed keys


def ask(
    lm: LM, prompts: Sequence[Sequence[int]], keys: jax.Array, max_new_tokens: int, sizes: Room | None = None
) -> Asked:
    """The prompts, each with its key of `keys` [S], in the room of more prompts of which these are some.

    Raises:
      UserError: an empty prompt, one that does not leave max_new_tokens of the context, or a token id out of range.
    """
    lengths = np.asarray([len(prompt) for prompt in prompts])
    check_prompts(lengths, max_new_tokens, lm.model.cfg.max_position_embeddings)
    for number, prompt in enumerate(prompts):
        check_ids(prompt, lm.model.cfg.vocab_size, lm.tokenizer, f"prompt {number}")
    shared, width = sizes or room(prompts)
    ids, mask = np.zeros((len(prompts), width), np.int32), np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) + shared :] = prompt[shared:]
        mask[row, width - len(prompt) + shared :] = 1
    return Asked(np.asarray(prompts[0][:shared], np.int32), ids, mask, keys)


def answers(
    lm: LM,
    members: Members,
    asked: Asked,
    max_new_tokens: int,
    *,
    sampling: Sampling,
    rows: int,
    stops: Sequence[str] = (),
) -> Generation:
    """P * S continuations as host arrays: row p * S + s is prompt s under member p.

    Members are padded to a multiple of 8, or to as many as make `rows`, so that few programs serve all numbers.

    Args:
      rows: at work at a time, but one member's are never divided.
      stops: stop strings; one that is a special token ends a row, others are for the caller to find.
    Raises:
      UserError: no answer has log-probabilities that are finite.
    """
    size = len(asked.ids)
    eos_ids = jnp.asarray(pad_eos(chat.end_tokens(lm, stops)))
    together = max(1, min(rows // size, -(-len(members) // 8) * 8))
    parts = []
    for first in range(0, len(members), together):
        last = min(first + together, len(members))
        out = _batch(lm, members.some(first, last, together), asked, max_new_tokens, eos_ids, sampling)
        parts.append([x[: (last - first) * size] for x in out])
    out = Generation(*map(np.concatenate, zip(*parts, strict=True)))
    if not np.isfinite(out.logprobs).all(axis=1).any():  # one member that overflows is a bad member, all are a fault
        check_finite(lm, out.logprobs, "answer")
    return out


def _batch(
    lm: LM, members: Members, asked: Asked, max_new_tokens: int, eos_ids: jax.Array, sampling: Sampling
) -> Generation:
    """`answers` of one batch. Whenever at most half of the rows are at work, they go on without the others."""
    total = len(members) * len(asked.ids)
    weights = Weights(lm.model, members.adapter, lm.params, eos_ids, members.shared)
    segments = -(-(max_new_tokens - 1) // _SEGMENT)
    limit = jnp.asarray(max_new_tokens, jnp.int32)
    state, first = _read(weights, members.values, asked, limit, slots=segments * _SEGMENT, sampling=sampling)
    tokens, logprobs = (
        np.zeros((total, 1 + segments * _SEGMENT), np.int32),
        np.zeros((total, 1 + segments * _SEGMENT), np.float32),
    )
    tokens[:, 0], logprobs[:, 0] = to_host(first)
    counts, which = np.ones(total, np.int32), np.arange(total)  # which rows are in the batch
    for at in range(1, tokens.shape[1], _SEGMENT):
        live = np.flatnonzero(~to_host(state.rows.done)[: len(which)])
        if not len(live):
            break
        batch = len(state.rows.done)
        while batch % 2 == 0 and batch // 2 >= max(_FEWEST, len(live)):
            batch //= 2
        if batch < len(state.rows.done):
            state, which = _keep(state, np.resize(live, batch)), which[live]
        state, drawn = _advance(weights, state, sampling=sampling, steps=_SEGMENT)
        for kept, new in zip((tokens, logprobs), to_host(drawn), strict=True):
            kept[which, at : at + _SEGMENT] = new[: len(which)]
        counts[which] = to_host(state.rows.count)[: len(which)]
    return Generation(tokens[:, :max_new_tokens], logprobs[:, :max_new_tokens], counts)


@struct.dataclass
class Weights:
    """What all rows read."""

    model: Transformer = struct.field(pytree_node=False)
    adapter: Any = struct.field(pytree_node=False)  # of `Members`
    params: Any
    eos_ids: jax.Array  # [K] int32, -1 where unused
    shared: Any

    def collections(self, values: Any) -> dict[str, Any]:
        """The variables for rows of these values."""
        return variables(self.model, self.params, self.adapter(self.model, self.shared, values))


@struct.dataclass
class State:
    """B rows at work."""

    values: Any  # of `Members`, first axis B
    rows: Rows
    past: list[Part]  # what all prompts begin with, of P members or B rows
    recent: Recent


@partial(jax.jit, static_argnames=("slots", "sampling"))
def _read(
    weights: Weights, values: Any, asked: Asked, limit: jax.Array, *, slots: int, sampling: Sampling
) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """The state after all prompts are read, with room for `slots` tokens, and each row's first token and log-prob.

    What all prompts begin with is read once a member, of values whose first axis is P.
    """
    members, shots = len(jax.tree.leaves(values)[0]), len(asked.ids)
    past = []
    if asked.prefix_ids.size:
        prefix = jnp.broadcast_to(asked.prefix_ids, (members, asked.prefix_ids.size))
        past = [read(weights.model, weights.collections(values), prefix, jnp.ones_like(prefix))[1]]
    each = jax.tree.map(lambda x: jnp.repeat(x, shots, axis=0), values)  # row p * S + s sees row p of the past
    ids, mask, keys = (jnp.tile(x, (members,) + (1,) * (x.ndim - 1)) for x in asked[1:])
    logits, prompts, position = read(weights.model, weights.collections(each), ids, mask, past)
    rows, first = begin(logits, position, jnp.broadcast_to(limit, keys.shape), weights.eos_ids, keys, sampling)
    length = ids.shape[1]
    recent = Recent(kv_cache.resize(prompts, length + slots), jnp.full((), length, jnp.int32))
    return State(each, rows, past, recent), first


@partial(jax.jit, static_argnames=("sampling", "steps"), donate_argnames=("state",))
def _advance(
    weights: Weights, state: State, *, sampling: Sampling, steps: int
) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """The state `steps` tokens later, and the tokens and log-probs, each [B, steps]."""
    collections = weights.collections(state.values)
    rows, drawn, recent = decode(
        weights.model,
        collections,
        state.past,
        state.recent,
        state.rows,
        weights.eos_ids,
        sampling=sampling,
        steps=steps,
    )
    return dataclasses.replace(state, rows=rows, recent=recent), drawn


@jax.jit
def _keep(state: State, which: jax.Array) -> State:
    """The rows of these places alone."""
    total = len(state.rows.done)

    def some(part: Part) -> Part:
        return kv_cache.rows(part, which // (total // len(part.valid)))

    past, recent = [some(part) for part in state.past], Recent(some(state.recent.part), state.recent.index)
    values, rows = jax.tree.map(lambda x: x[which], (state.values, state.rows))
    return State(values, rows, past, recent)
