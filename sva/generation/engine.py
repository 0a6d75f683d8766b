"""Continuous batching: a fixed number of rows decode together, and a row that finishes takes the next prompt.

All programs have shapes that no request changes: prompts are read a fixed number at a time in a bucket of their own
length, and all rows decode `EngineConfig.steps` tokens between two looks at the queue. Within one such shape a
request's tokens and log-probs are the same bits whatever its neighbours, its row and its time of arrival.

    queue -> read (prompts) -> insert (one row) -> advance (all rows, some tokens) -> finished rows leave -> insert ...

What a row has read lies in the first slots of its row of `State.slots`; how many slots there are follows the fullest
row, in steps of `_TIER`, because attention costs what the slots cost. The tokens of a round gather in a
segment of their own and move to their rows when it ends.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sva.generation.decode import DecodeState, begin, decode, read
from sva.generation.sampling import Sampling
from sva.generation.weights import Weights
from sva.models import cache as kv_cache
from sva.models.cache import KVSegment
from sva.models.vocabulary import check_ids
from sva.utils.errors import UserError
from sva.utils.padding import pad_tokens, prompt_bucket

_TIER = 128  # slots


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Shapes of the engine's programs."""

    rows: int = 32  # that decode together
    steps: int = 8  # tokens between two looks at the queue; a row that finishes waits half of them on average
    prompts: int = 1  # read at a time; more where a few hundred tokens do not fill the machine

    def __post_init__(self) -> None:
        if kv_cache.BLOCK % self.steps:  # a round's tokens are written within one block of a row's slots
            raise UserError(f"steps={self.steps} must divide {kv_cache.BLOCK}")


class Read(NamedTuple):
    """Prompts that have been read, of as many rows as are read at a time."""

    logits: jax.Array  # [A, V] float32, of the first token
    segment: KVSegment  # of the longest prompts' slots, whatever these prompts' bucket
    position: jax.Array  # [A] int32, of the last prompt token


@struct.dataclass
class State:
    """All rows."""

    decoding: DecodeState
    slots: KVSegment
    used: jax.Array  # [B] int32, slots a row has written
    alphas: jax.Array  # [B, E_max] float32, [B, 0] without a bank


class Place(NamedTuple):
    """The row that a prompt takes, and its limits; the numbers are [] int32."""

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
    """Prompts [A, T], padded on the left, read, and their segment padded to `slots` slots."""
    logits, segment, position = read(weights.model, weights.collections(alphas), ids, mask, weights.past)
    return Read(logits, kv_cache.resize(segment, slots), position)


@partial(jax.jit, static_argnames=("sampling",), donate_argnames=("state",))
def insert(
    weights: Weights, state: State, prompts: Read, place: Place, *, sampling: Sampling
) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """(State with one prompt in a row and its first token drawn, (the token's id, its log-prob), each [1])."""
    logits, position = (jax.lax.dynamic_slice_in_dim(x, place.which, 1) for x in (prompts.logits, prompts.position))
    one, drawn = begin(logits, position, place.limit[None], weights.eos_ids, place.key[None], sampling)
    segment = kv_cache.resize(kv_cache.row(prompts.segment, place.which), state.slots.valid.shape[1])

    def put(x: jax.Array, y: jax.Array) -> jax.Array:
        return x.at[place.row].set(y[0])

    new = State(
        decoding=jax.tree.map(put, state.decoding, one),
        slots=kv_cache.replace_row(state.slots, place.row, segment),
        used=put(state.used, place.used[None]),
        alphas=put(state.alphas, place.alphas[None]),
    )
    return new, drawn


@partial(jax.jit, static_argnames=("sampling", "steps"), donate_argnames=("state",))
def advance(
    weights: Weights, state: State, *, sampling: Sampling, steps: int
) -> tuple[State, tuple[jax.Array, jax.Array]]:
    """(State after `steps` tokens a row, (tokens, log-probs), each [B, steps] and 0 where a row was done)."""
    past = [*weights.past, state.slots]
    collections = weights.collections(state.alphas)
    model, batch = weights.model, len(state.used)
    new = kv_cache.start(model.cfg, batch, steps, model.kept_dtype, scan=model.scan_layers)
    decoding, drawn, new = decode(
        model, collections, past, new, state.decoding, weights.eos_ids, sampling=sampling, steps=steps
    )
    slots = kv_cache.append(state.slots, state.used, new.segment)
    used = state.used + jnp.where(state.decoding.done, 0, steps)
    return dataclasses.replace(state, decoding=decoding, slots=slots, used=used), drawn


@partial(jax.jit, donate_argnames=("decoding",))
def stop(decoding: DecodeState, stopped: jax.Array) -> DecodeState:
    """The state with the rows of the mask [B] done."""
    return dataclasses.replace(decoding, done=decoding.done | stopped)


@partial(jax.jit, static_argnames=("slots",))
def resize(segment: KVSegment, *, slots: int) -> KVSegment:
    """The segment with so many slots: free ones added, or the last ones dropped."""
    return kv_cache.resize(segment, slots)


# (request, sample, tokens drawn since the last call) -> how many of them to keep, to end the row; None to continue it.
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
        """Adds what a round drew, of which `count` tokens are now drawn in all; returns the new tokens."""
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

    Requests start in their order, a request's samples in theirs. After every round `watch` sees the new tokens of
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
    queue = _Queue(weights, requests, cfg)
    state = _idle(weights, requests[0], cfg, _tier(queue.width + cfg.steps))
    live: dict[int, _Row] = {}
    while queue or live:
        for row in sorted(set(range(cfg.rows)) - set(live)):
            if not queue:
                break
            number, sample, prompts, which = queue.take()
            request = requests[number]
            used = prompt_bucket(len(request.prompt_ids))
            size, limit = np.int32(used), np.int32(request.max_new_tokens)
            place = Place(np.int32(which), np.int32(row), size, limit, request.keys[sample], _alphas(request))
            state, first = insert(weights, state, prompts, place, sampling=sampling)
            live[row] = _Row(number, sample, used, first)
        state = _fit(state, max(row.used for row in live.values()) + cfg.steps)
        state, drawn = advance(weights, state, sampling=sampling, steps=cfg.steps)
        tokens, logprobs, counts, done = map(np.asarray, (*drawn, state.decoding.count, state.decoding.done))
        stopped = np.zeros(cfg.rows, bool)
        for number, row in list(live.items()):
            new = row.take(tokens[number], logprobs[number], int(counts[number]))
            row.used += cfg.steps
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
            state = dataclasses.replace(state, decoding=stop(state.decoding, stopped))


class _Queue:
    """The samples that have not started, in order; a prompt is read when its first sample is taken."""

    def __init__(self, weights: Weights, requests: Sequence[Request], cfg: EngineConfig) -> None:
        self.width = max(prompt_bucket(len(request.prompt_ids)) for request in requests)  # slots of every prompt
        self._weights, self._cfg = weights, cfg
        self._waiting = deque(enumerate(requests))
        self._read: deque[tuple[int, int, Read, int]] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._read)

    def take(self) -> tuple[int, int, Read, int]:
        """(request, sample, prompts that were read together, which of them is the request's)."""
        if not self._read:
            self._read.extend(self._read_next())
        return self._read.popleft()

    def _read_next(self) -> Iterator[tuple[int, int, Read, int]]:
        """Reads the next request's prompt, and those of later ones that have its bucket."""
        together = self._cfg.prompts
        bucket = prompt_bucket(len(self._waiting[0][1].prompt_ids))
        same = [entry for entry in self._waiting if prompt_bucket(len(entry[1].prompt_ids)) == bucket][:together]
        for entry in same:
            self._waiting.remove(entry)
        rows = [request for _, request in same] + [same[0][1]] * (together - len(same))
        ids, mask = pad_tokens([request.prompt_ids for request in rows], bucket)
        alphas = np.stack([_alphas(request) for request in rows])
        found = read_prompts(self._weights, ids, mask, alphas, slots=self.width)
        for which, (number, request) in enumerate(same):
            yield from ((number, sample, found, which) for sample in range(len(request.keys)))


def _idle(weights: Weights, request: Request, cfg: EngineConfig, slots: int) -> State:
    """All rows done."""
    model = weights.model

    def none() -> jax.Array:
        return jnp.zeros(cfg.rows, jnp.int32)

    keys = jnp.broadcast_to(request.keys[0], (cfg.rows,))
    return State(
        decoding=DecodeState(none(), none(), none(), jnp.ones(cfg.rows, bool), none(), keys),
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
