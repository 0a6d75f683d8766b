"""Continuous batching: a fixed number of rows decode together, and a row that finishes takes the next prompt.

All programs have shapes that no request changes: prompts are read a fixed number at a time in a bucket of their own
length, and all rows decode `EngineConfig.segment` tokens between two looks at the queue. Within one such shape a
request's tokens and log-probs are the same bits whatever its neighbours, its row and its time of arrival.

    queue -> read (prompts) -> insert (one row) -> advance (all rows, some tokens) -> finished rows leave -> insert ...

What a row has read lies in the first slots of its row of `State.slots`; how many slots there are follows the fullest
row, in steps of `_TIER`, because attention costs what the slots cost. A segment's own tokens gather in a part of their
own and move to their rows when it ends.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sva.generation.decode import Rows, begin, decode, read
from sva.generation.sampling import Sampling
from sva.models import cache as kv_cache
from sva.models.cache import Part
from sva.models.transformer import Transformer, variables
from sva.models.vocabulary import check_ids
from sva.spectral.mixing import mixture
from sva.utils.errors import UserError
from sva.utils.padding import prompt_bucket

_TIER = 128  # slots


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Shapes of the engine's programs."""

    rows: int = 32  # that decode together
    segment: int = 8  # tokens between two looks at the queue; a row that finishes waits half of them on average
    prompts: int = 1  # read at a time; more where a few hundred tokens do not fill the machine

    def __post_init__(self) -> None:
        if kv_cache.BLOCK % self.segment:  # a segment is written within one block of a row's slots
            raise UserError(f"segment={self.segment} must divide {kv_cache.BLOCK}")


@struct.dataclass
class Weights:
    """What all rows read. With a bank each row runs on its own mixture of its experts."""

    model: Transformer = struct.field(pytree_node=False)
    params: Mapping[str, Any]
    eos_ids: jax.Array  # [K] int32, -1 where unused
    bank: Mapping[str, Any] | None = None  # the model's nested tree of `Slots`
    prefix: Part | None = None  # of one row: tokens before every prompt; not with a bank

    @property
    def past(self) -> list[Part]:
        """The parts that come before every row's own."""
        return [] if self.prefix is None else [self.prefix]

    def collections(self, alphas: jax.Array) -> dict[str, Any]:
        """The variables for rows with these alphas [B, E_max]."""
        adapter = None if self.bank is None else mixture(self.bank, alphas)
        return variables(self.model, self.params, adapter)


class Read(NamedTuple):
    """Prompts that have been read, of as many rows as are read at a time."""

    logits: jax.Array  # [A, V] float32, of the first token
    part: Part  # of the longest prompts' slots, whatever these prompts' bucket
    position: jax.Array  # [A] int32, of the last prompt token


@struct.dataclass
class State:
    """All rows."""

    rows: Rows
    slots: Part
    used: jax.Array  # [B] int32, slots a row has written
    alphas: jax.Array  # [B, E_max] float32, [B, 0] without a bank


class Place(NamedTuple):
    """Which prompt goes where; the numbers are [] int32."""

    which: Any  # of the prompts that were read
    row: Any
    used: Any  # slots that it fills
    limit: Any  # tokens to draw
    key: jax.Array
    alphas: Any  # [E_max]


class Request(NamedTuple):
    """One prompt, to be continued `len(keys)` times."""

    prompt_ids: Sequence[int]
    max_new_tokens: int
    keys: jax.Array  # [G] typed keys, one a sample
    alphas: np.ndarray | None = None  # [E_max] of the bank's experts


class Finished(NamedTuple):
    """One sample of one request."""

    request: int  # in order of the queue
    sample: int
    tokens: np.ndarray  # [N] int32, an end token among them
    logprobs: np.ndarray  # [N] float32 nats
    by_limit: bool  # and neither by an end token nor by `watch`


@partial(jax.jit, static_argnames=("slots",))
def read_prompts(weights: Weights, ids: jax.Array, mask: jax.Array, alphas: jax.Array, *, slots: int) -> Read:
    """Prompts [A, T], padded on the left, read, and their part padded to `slots` slots."""
    logits, part, position = read(weights.model, weights.collections(alphas), ids, mask, weights.past)
    return Read(logits, kv_cache.resize(part, slots), position)


@partial(jax.jit, static_argnames=("sampling",), donate_argnames=("state",))
def insert(
    weights: Weights, state: State, prompts: Read, place: Place, *, sampling: Sampling
) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """Puts one prompt into a row and draws its first token.

    Returns:
      The state, and of the token its id and its log-prob, each [1].
    """
    logits, position = (jax.lax.dynamic_slice_in_dim(x, place.which, 1) for x in (prompts.logits, prompts.position))
    one, drawn = begin(logits, position, place.limit[None], weights.eos_ids, place.key[None], sampling)
    part = kv_cache.resize(kv_cache.row(prompts.part, place.which), state.slots.valid.shape[1])

    def put(x: jax.Array, y: jax.Array) -> jax.Array:
        return x.at[place.row].set(y[0])

    new = State(
        rows=jax.tree.map(put, state.rows, one),
        slots=kv_cache.replace_row(state.slots, place.row, part),
        used=put(state.used, place.used[None]),
        alphas=put(state.alphas, place.alphas[None]),
    )
    return new, drawn


@partial(jax.jit, static_argnames=("sampling", "steps"), donate_argnames=("state",))
def advance(
    weights: Weights, state: State, *, sampling: Sampling, steps: int
) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """Draws `steps` tokens a row.

    Returns:
      The state, and the tokens and log-probs, each [B, steps], 0 where a row was done.
    """
    past = [*weights.past, state.slots]
    collections = weights.collections(state.alphas)
    model, batch = weights.model, len(state.used)
    new = kv_cache.start(model.cfg, batch, steps, model.kept_dtype, scan=model.scan_layers)
    rows, drawn, new = decode(
        model, collections, past, new, state.rows, weights.eos_ids, sampling=sampling, steps=steps
    )
    slots = kv_cache.append(state.slots, state.used, new.part)
    used = state.used + jnp.where(state.rows.done, 0, steps)
    return dataclasses.replace(state, rows=rows, slots=slots, used=used), drawn


@partial(jax.jit, donate_argnames=("rows",))
def stop(rows: Rows, stopped: jax.Array) -> Rows:
    """The rows, those of the mask [B] done."""
    return dataclasses.replace(rows, done=rows.done | stopped)


@partial(jax.jit, static_argnames=("slots",))
def resize(part: Part, *, slots: int) -> Part:
    """The part with so many slots: free ones added, or the last ones dropped."""
    return kv_cache.resize(part, slots)


# (request, sample, tokens drawn since the last call) -> how many of them to keep, to end the row; None to go on.
Watch = Callable[[int, int, np.ndarray], int | None]


@dataclasses.dataclass
class _Row:
    """A row at work, as the host knows it."""

    request: int
    sample: int
    used: int  # slots written
    first: tuple[jax.Array, jax.Array]  # token and log-prob that `insert` drew, each [1]
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)

    def take(self, tokens: np.ndarray, logprobs: np.ndarray, count: int) -> np.ndarray:
        """Adds what a segment drew, of which `count` tokens are now drawn in all; returns the new tokens."""
        if not self.tokens:
            tokens = np.concatenate([np.asarray(self.first[0]), tokens])
            logprobs = np.concatenate([np.asarray(self.first[1]), logprobs])
        new = count - sum(map(len, self.tokens))
        self.tokens.append(tokens[:new])
        self.logprobs.append(logprobs[:new])
        return tokens[:new]


def run(
    weights: Weights,
    requests: Sequence[Request],
    cfg: EngineConfig,
    sampling: Sampling,
    watch: Watch | None = None,
) -> Iterator[Finished]:
    """The samples of all requests, each as soon as it is finished.

    Requests start in their order, a request's samples in theirs. After every segment `watch` sees the new tokens of
    each row, and may end it.

    Args:
      weights: what all rows read.
      requests: each of at least one prompt token, one new token and one key. Alphas belong to a bank.
      cfg: shapes. A row's result depends on them by rounding alone.
      sampling: the strategy.
      watch: for stop strings, or to show tokens as they come.
    Raises:
      UserError: a request holds a token id outside the vocabulary.
    """
    if not requests:
        return
    for number, request in enumerate(requests):
        check_ids(request.prompt_ids, weights.model.cfg.vocab_size, what=f"request {number}")
    ends = set(np.asarray(weights.eos_ids).tolist())
    width = max(prompt_bucket(len(request.prompt_ids)) for request in requests)
    state = _idle(weights, requests[0], cfg, _tier(width + cfg.segment))
    waiting = deque(enumerate(requests))
    read_already: deque[tuple[int, int, Read, int]] = deque()  # request, sample, and where its prompt is
    live: dict[int, _Row] = {}
    while waiting or read_already or live:
        for row in sorted(set(range(cfg.rows)) - set(live)):
            if not read_already and waiting:
                read_already.extend(_read_next(weights, waiting, cfg, width))
            if not read_already:
                break
            number, sample, prompts, which = read_already.popleft()
            request = requests[number]
            used = prompt_bucket(len(request.prompt_ids))
            size, limit = np.int32(used), np.int32(request.max_new_tokens)
            place = Place(np.int32(which), np.int32(row), size, limit, request.keys[sample], _alphas(request))
            state, first = insert(weights, state, prompts, place, sampling=sampling)
            live[row] = _Row(number, sample, used, first)
        state = _fit(state, max(row.used for row in live.values()) + cfg.segment)
        state, drawn = advance(weights, state, sampling=sampling, steps=cfg.segment)
        tokens, logprobs, counts, done = map(np.asarray, (*drawn, state.rows.count, state.rows.done))
        stopped = np.zeros(cfg.rows, bool)
        for number, row in list(live.items()):
            new = row.take(tokens[number], logprobs[number], int(counts[number]))
            row.used += cfg.segment
            keep = watch(row.request, row.sample, new) if watch else None
            if keep is None and not done[number]:
                continue
            size = int(counts[number]) - (0 if keep is None else len(new) - keep)
            found, scores = np.concatenate(row.tokens)[:size], np.concatenate(row.logprobs)[:size]
            by_limit = keep is None and int(found[-1]) not in ends
            stopped[number] = keep is not None
            del live[number]
            yield Finished(row.request, row.sample, found, scores, by_limit)
        if stopped.any():
            state = dataclasses.replace(state, rows=stop(state.rows, stopped))


def _read_next(
    weights: Weights, waiting: deque[tuple[int, Request]], cfg: EngineConfig, slots: int
) -> Iterator[tuple[int, int, Read, int]]:
    """Takes the next request, and later ones whose prompts have its bucket, and reads their prompts."""
    bucket = prompt_bucket(len(waiting[0][1].prompt_ids))
    same = [entry for entry in waiting if prompt_bucket(len(entry[1].prompt_ids)) == bucket][: cfg.prompts]
    for entry in same:
        waiting.remove(entry)
    rows = [request for _, request in same] + [same[0][1]] * (cfg.prompts - len(same))
    ids, mask = np.zeros((cfg.prompts, bucket), np.int32), np.zeros((cfg.prompts, bucket), np.int32)
    for row, request in enumerate(rows):
        start = bucket - len(request.prompt_ids)
        ids[row, start:], mask[row, start:] = request.prompt_ids, 1
    found = read_prompts(weights, ids, mask, np.stack([_alphas(request) for request in rows]), slots=slots)
    for which, (number, request) in enumerate(same):
        yield from ((number, sample, found, which) for sample in range(len(request.keys)))


def _idle(weights: Weights, request: Request, cfg: EngineConfig, slots: int) -> State:
    """All rows done."""
    model = weights.model

    def none() -> jax.Array:
        return jnp.zeros(cfg.rows, jnp.int32)

    keys = jnp.broadcast_to(request.keys[0], (cfg.rows,))
    return State(
        rows=Rows(none(), none(), none(), jnp.ones(cfg.rows, bool), none(), keys),
        slots=kv_cache.empty(model.cfg, cfg.rows, slots, model.kept_dtype, scan=model.scan_layers),
        used=none(),
        alphas=jnp.zeros((cfg.rows, len(_alphas(request)))),
    )


def _fit(state: State, slots: int) -> State:
    """The state with as many slots as the tier of `slots`, tier by tier: few programs serve all changes."""
    while (size := state.slots.valid.shape[1]) != _tier(slots):
        more = size + (_TIER if size < slots else -_TIER)
        state = dataclasses.replace(state, slots=resize(state.slots, slots=more))
    return state


def _tier(slots: int) -> int:
    return -(-slots // _TIER) * _TIER


def _alphas(request: Request) -> np.ndarray:
    return np.zeros(0, np.float32) if request.alphas is None else np.asarray(request.alphas, np.float32)
