"""Continuous batching: a fixed number of rows decode together, and a row that finishes takes the next prompt.

All programs have shapes that no request changes: prompts are read a fixed number at a time in a bucket of their own
length, and all rows decode `EngineConfig.steps` tokens between two looks at the queue. Within one such shape a
request's tokens and log-probs are the same bits whatever its neighbours, its row and its time of arrival.

    queue -> read (prompts) -> insert (rows) -> advance (all rows, some tokens) -> finished rows leave -> insert ...

What a row has read lies in the first slots of its row of `State.slots`; how many slots there are follows the fullest
row, in steps of `EngineConfig.tier`, because attention costs what the slots cost. The tokens of a round gather in a
segment of their own and move to their rows when it ends.

On a mesh (`jax.set_mesh`) the rows are divided over its batch axes. Every process runs the same rounds: what a round
drew lies on all of them.
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
from sva.generation.row_sampling import PerRow, RowSettings
from sva.generation.sampling import Sampling
from sva.generation.weights import Weights
from sva.models import cache as kv_cache
from sva.models.cache import KVSegment
from sva.models.transformer import Transformer
from sva.models.vocabulary import check_ids
from sva.parallel.processes import to_host
from sva.parallel.sharding import constrain, repeat_all, row_shards
from sva.utils.errors import UserError
from sva.utils.padding import pad_tokens, prompt_bucket, round_up


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Shapes of the engine's programs."""

    rows: int = 32  # that decode together
    steps: int = 8  # tokens between two looks at the queue; a row that finishes waits half of them on average
    prompts: int = 1  # read at a time; more where a few hundred tokens do not fill the machine
    width: int = 0  # tokens of the longest prompt there will ever be; 0 for the longest of the requests
    one_bucket: bool = False  # pad every prompt to the widest bucket, so that one program reads all
    tier: int = 128  # slots of a row are a multiple of it; as many as a row may need make one program of `advance`

    def __post_init__(self) -> None:
        if kv_cache.BLOCK % self.steps:  # a round's tokens are written within one block of a row's slots
            raise UserError(f"steps={self.steps} must divide {kv_cache.BLOCK}")


def prompts_at_once(rows: int) -> int:
    """How many prompts to read at a time for so many rows: a few, and what a mesh that is set divides."""
    return min(max(_READ, row_shards()), rows)


_READ = 4  # fewer do not fill a machine


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


class Places(NamedTuple):
    """The rows that N samples take, and their limits; the numbers are [N] int32."""

    which: Any  # of the prompts that were read
    rows: Any  # one that there is not: the sample is a filler
    used: Any  # slots that it fills
    limit: Any  # tokens to draw
    keys: jax.Array
    alphas: Any  # [N, E_max]
    settings: RowSettings | None = None  # of N rows, for the strategy `PerRow`


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
    segment = kv_cache.constrained(kv_cache.resize(segment, slots))
    return Read(constrain(logits, "batch", "vocab"), segment, constrain(position, None))


def insert(
    weights: Weights, state: State, prompts: Read, places: Places, *, sampling: Sampling | PerRow
) -> tuple[State, tuple[jax.Array, ...]]:
    """(State with N samples in their rows, what `begin` drew: their first tokens, the tokens' log-probs, each [N]).

    The state has room for every slot that the samples' prompts fill (`fit`).
    """
    room = state.slots.valid.shape[1]
    assert (places.used <= room).all(), f"prompts fill {max(places.used)} slots of rows with {room}"
    return _insert(weights, state, prompts, places, sampling=sampling)


@partial(jax.jit, static_argnames=("sampling",), donate_argnames=("state",))
def _insert(
    weights: Weights, state: State, prompts: Read, places: Places, *, sampling: Sampling | PerRow
) -> tuple[State, tuple[jax.Array, ...]]:
    logits, position = (jnp.take(x, places.which, axis=0, mode="clip") for x in (prompts.logits, prompts.position))
    new, drawn = begin(logits, position, places.limit, weights.eos_ids, places.keys, sampling, places.settings)
    segment = kv_cache.resize(kv_cache.rows(prompts.segment, places.which), state.slots.valid.shape[1])

    def put(x: jax.Array, y: jax.Array) -> jax.Array:
        return x.at[places.rows].set(y, mode="drop")

    state = State(
        decoding=jax.tree.map(put, state.decoding, new),
        slots=kv_cache.replace_rows(state.slots, places.rows, segment),
        used=put(state.used, places.used),
        alphas=put(state.alphas, places.alphas),
    )
    return _constrained(state), repeat_all(drawn)


@partial(jax.jit, static_argnames=("sampling", "steps"), donate_argnames=("state",))
def advance(
    weights: Weights, state: State, *, sampling: Sampling | PerRow, steps: int
) -> tuple[State, tuple[jax.Array, ...]]:
    """(State after `steps` tokens a row, what `decode` drew: tokens, log-probs, each [B, steps], 0 of rows done)."""
    past = [*weights.past, state.slots]
    collections = weights.collections(state.alphas)
    model, batch = weights.model, len(state.used)
    new = kv_cache.start(model.cfg, batch, steps, model.kept_dtype, scan=model.scan_layers)
    decoding, drawn, new = decode(
        model, collections, past, new, state.decoding, weights.eos_ids, sampling=sampling, steps=steps
    )
    slots = kv_cache.append(state.slots, state.used, new.segment)
    used = state.used + jnp.where(state.decoding.done, 0, steps)
    return _constrained(dataclasses.replace(state, decoding=decoding, slots=slots, used=used)), repeat_all(drawn)


def _constrained(state: State) -> State:
    """The state as it lies on a mesh, if one is set: keys and values divided by rows and heads, the rest repeated."""
    slots = kv_cache.constrained(state.slots)
    decoding, used, alphas = repeat_all((state.decoding, state.used, state.alphas))
    return State(decoding, slots, used, alphas)


@partial(jax.jit, donate_argnames=("decoding",))
def stop(decoding: DecodeState, stopped: jax.Array) -> DecodeState:
    """The state with the rows of the mask [B] done."""
    return dataclasses.replace(decoding, done=decoding.done | stopped)


@jax.jit
def keep(state: State, which: jax.Array, is_live: jax.Array) -> State:
    """The state of the rows `which` [B'] alone, of more or fewer than there were; done where `is_live` [B'] is not."""
    decoding, used, alphas = jax.tree.map(lambda x: x[which], (state.decoding, state.used, state.alphas))
    decoding = dataclasses.replace(decoding, done=decoding.done | ~is_live)
    return _constrained(State(decoding, kv_cache.rows(state.slots, which), used, alphas))


@partial(jax.jit, static_argnames=("slots",))
def resize(segment: KVSegment, *, slots: int) -> KVSegment:
    """The segment with so many slots: free ones added, or the last ones dropped."""
    return kv_cache.constrained(kv_cache.resize(segment, slots))


# (request, sample, tokens drawn since the last call) -> how many of them to keep, to end the row; None to continue it.
Watch = Callable[[int, int, np.ndarray], int | None]


class _Waiting(NamedTuple):
    """One sample that has not started, whose prompt is read."""

    request: int
    sample: int
    prompts: Read  # with others
    which: int  # of them
    key: np.ndarray  # its data


@dataclasses.dataclass
class _Row:
    """A row at work, as the host knows it."""

    request: int
    sample: int
    used: int  # slots written
    first: tuple[jax.Array, ...]  # tokens and log-probs that `insert` drew, each [N],
    place: int  # and which of them are the row's
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)

    def take(self, tokens: np.ndarray, logprobs: np.ndarray, count: int) -> np.ndarray:
        """Adds what a round drew, of which `count` tokens are now drawn in all; returns the new tokens."""
        if not self.tokens:
            first = (x[self.place : self.place + 1] for x in to_host(self.first))
            tokens, logprobs = (np.concatenate(pair) for pair in zip(first, (tokens, logprobs), strict=True))
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

    Requests start in their order, a request's samples in theirs; where several prompts are read at a time, the next
    request takes later ones of its bucket along. After every round `watch` sees the new tokens of each row, and may
    end it.

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
    slots = round_up(queue.width + cfg.steps, cfg.tier)
    state = idle(weights.model, requests[0].keys[0], rows=cfg.rows, slots=slots, experts=len(_alphas(requests[0])))
    live: dict[int, _Row] = {}
    while queue or live:
        state = _fill(weights, state, live, queue, cfg, sampling)
        state = fit(state, max(row.used for row in live.values()) + cfg.steps, cfg.tier)
        state, drawn = advance(weights, state, sampling=sampling, steps=cfg.steps)
        tokens, logprobs, counts, done = to_host((*drawn, state.decoding.count, state.decoding.done))
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


def _fill(
    weights: Weights, state: State, live: dict[int, _Row], queue: "_Queue", cfg: EngineConfig, sampling: Sampling
) -> State:
    """The state with samples that waited in its free rows, which join `live`."""
    free = deque(sorted(set(range(cfg.rows)) - set(live)))
    while queue and free:
        samples = queue.take(min(cfg.prompts, len(free)))
        rows = [free.popleft() for _ in samples]
        needed = queue.slots(samples[0].request) + cfg.steps  # of all of them, which were read together
        state = fit(state, max(needed, state.slots.valid.shape[1]), cfg.tier)
        state, first = insert(weights, state, samples[0].prompts, queue.places(samples, rows), sampling=sampling)
        for place, (row, one) in enumerate(zip(rows, samples, strict=True)):
            live[row] = _Row(one.request, one.sample, queue.slots(one.request), first, place)
    return state


class _Queue:
    """The samples that have not started, in the order of `run`; a prompt is read when its first sample is taken."""

    def __init__(self, weights: Weights, requests: Sequence[Request], cfg: EngineConfig) -> None:
        longest = max(len(request.prompt_ids) for request in requests)
        self.width = prompt_bucket(max(longest, cfg.width))  # slots of every prompt
        self._weights, self._cfg, self._requests = weights, cfg, requests
        self._waiting = deque(range(len(requests)))
        self._read: deque[_Waiting] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._read)

    def slots(self, request: int) -> int:
        """Slots that the request's prompt fills."""
        return self.width if self._cfg.one_bucket else prompt_bucket(len(self._requests[request].prompt_ids))

    def take(self, count: int) -> list[_Waiting]:
        """The next samples, `count` of them at most, whose prompts were read together."""
        if not self._read:
            self._read.extend(self._read_next())
        prompts, samples = self._read[0].prompts, []
        while self._read and len(samples) < count and self._read[0].prompts is prompts:
            samples.append(self._read.popleft())
        return samples

    def places(self, samples: Sequence[_Waiting], rows: Sequence[int]) -> Places:
        """Where the samples go, in a shape that all numbers of them share."""
        size, nowhere = self._cfg.prompts, self._cfg.rows
        samples = [*samples, *[samples[0]] * (size - len(samples))]
        requests = [self._requests[one.request] for one in samples]
        data = jax.device_put(np.stack([one.key for one in samples]))
        keys = jax.random.wrap_key_data(data, impl=jax.random.key_impl(requests[0].keys))
        return Places(
            which=np.asarray([one.which for one in samples], np.int32),
            rows=np.asarray([*rows, *[nowhere] * (size - len(rows))], np.int32),
            used=np.asarray([self.slots(one.request) for one in samples], np.int32),
            limit=np.asarray([request.max_new_tokens for request in requests], np.int32),
            keys=keys,
            alphas=np.stack([_alphas(request) for request in requests]),
        )

    def _read_next(self) -> Iterator[_Waiting]:
        """Reads the next request's prompt, and those of later ones that have its bucket."""
        together = self._cfg.prompts
        bucket = self.slots(self._waiting[0])
        same = [number for number in self._waiting if self.slots(number) == bucket][:together]
        for number in same:
            self._waiting.remove(number)
        rows = [self._requests[number] for number in same + same[:1] * (together - len(same))]
        ids, mask = pad_tokens([request.prompt_ids for request in rows], bucket)
        alphas = np.stack([_alphas(request) for request in rows])
        found = read_prompts(self._weights, ids, mask, alphas, slots=self.width)
        for which, number in enumerate(same):
            keys = np.asarray(jax.random.key_data(self._requests[number].keys))
            yield from (_Waiting(number, sample, found, which, key) for sample, key in enumerate(keys))


@partial(jax.jit, static_argnames=("model", "rows", "slots", "experts"))
def idle(
    model: Transformer,
    key: jax.Array,
    settings: RowSettings | None = None,
    *,
    rows: int,
    slots: int,
    experts: int = 0,
) -> State:
    """The state of so many rows, all done, with a bank of so many experts; `settings` are of that many rows."""

    def none() -> jax.Array:
        return jnp.zeros(rows, jnp.int32)

    state = State(
        decoding=DecodeState(
            none(), none(), none(), jnp.ones(rows, bool), none(), jnp.broadcast_to(key, (rows,)), settings
        ),
        slots=kv_cache.empty(model.cfg, rows, slots, model.kept_dtype, scan=model.scan_layers),
        used=none(),
        alphas=jnp.zeros((rows, experts)),
    )
    return _constrained(state)


def fit(state: State, slots: int, tier: int) -> State:
    """The state with as many slots as the tier of `slots`, tier by tier: few programs serve all changes."""
    while (size := state.slots.valid.shape[1]) != round_up(slots, tier):
        more = size + (tier if size < slots else -tier)
        state = dataclasses.replace(state, slots=resize(state.slots, slots=more))
    return state


def _alphas(request: Request) -> np.ndarray:
    return np.zeros(0, np.float32) if request.alphas is None else np.asarray(request.alphas, np.float32)
