"""The rows of a server that decode together: a prompt joins between two steps, and a row leaves when it is done.

The programs are those of `sva.generation.engine`, whose `run` takes a list of prompts to its end; here prompts come and
go while others decode. Shapes depend on the prompt's bucket and on the tier of the fullest row alone.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sva.generation.engine import EngineConfig, Places, Read, advance, fit, idle, insert, keep, read_prompts, stop
from sva.generation.row_sampling import PerRow, RowSettings, row_settings
from sva.generation.weights import Weights
from sva.parallel.processes import to_host
from sva.utils.padding import pad_tokens, prompt_bucket, round_up


class Drawn(NamedTuple):
    """What a row drew in one step."""

    tokens: np.ndarray  # [n] int32
    logprobs: np.ndarray  # [n] float32 nats
    likeliest: tuple[np.ndarray, np.ndarray] | None  # ids [n, K] and log-probs [n, K], where the row asked for them
    done: bool  # by an end token or the limit


class ReadPrompt(NamedTuple):
    """A prompt that has been read, whose samples may take rows."""

    read: Read
    slots: int  # that it fills


class Sample(NamedTuple):
    """How one row continues a prompt."""

    key: np.ndarray  # data of a typed key
    limit: int  # tokens to draw
    alphas: np.ndarray  # [E_max]
    settings: RowSettings  # of one row
    is_rich: bool  # the settings hold biases, or the likeliest tokens are wanted


@dataclasses.dataclass
class _Row:
    place: int  # in the arrays
    used: int  # slots written
    count: int  # tokens drawn
    is_rich: bool


class Rows:
    """Rows at work, each known by a number of its own; everything is called by the one thread that owns JAX.

    The arrays hold as many rows as a tier of `tiers`, for a step costs what its rows cost, at work or not.
    """

    def __init__(self, weights: Weights, cfg: EngineConfig, experts: int) -> None:
        """No row is at work; `experts` is E_max."""
        self.weights = weights
        self._cfg = cfg
        self._experts = experts
        self._base = np.zeros(experts, np.float32)  # alphas
        self._ends = set(np.asarray(weights.eos_ids).tolist())
        self._impl = jax.random.key_impl(jax.random.key(0))
        self._numbers = itertools.count()
        self.tiers = tiers(cfg.rows, cfg.prompts)
        self.clear()

    def clear(self) -> None:
        """Frees every row, and makes their state anew."""
        size = self.tiers[0]
        settings = jax.tree.map(lambda x: np.repeat(x, size, axis=0), row_settings())
        slots = round_up(self._cfg.steps + 1, self._cfg.tier)
        self._live: dict[int, _Row] = {}
        self._is_sparse = False  # fewer rows at work than the next lower tier has, at the last step
        key = jax.random.key(0)
        self._state = idle(self.weights.model, key, settings, rows=size, slots=slots, experts=self._experts)

    @property
    def free(self) -> int:
        """How many rows are free."""
        return self._cfg.rows - len(self._live)

    def warm(self) -> None:
        """Compiles what most requests meet, in all tiers of rows: they wait for nothing then."""
        sample = Sample(np.asarray(jax.random.key_data(jax.random.key(0))), 64, self._base, row_settings(), False)
        prompt = self.read([0], self._base)
        for place, size in enumerate(self.tiers):
            if place:
                self._resize(size)
            self.start(prompt, sample)
            self._advance()
        for size in self.tiers[-2::-1]:
            self._resize(size)
        self.clear()

    def read(self, prompt_ids: Sequence[int], alphas: np.ndarray) -> ReadPrompt:
        """A prompt's keys, values and next logits under a mixture, alphas [E_max]."""
        bucket = prompt_bucket(len(prompt_ids))
        copies = self._cfg.prompts
        ids, mask = pad_tokens([prompt_ids] * copies, bucket)
        slots = round_up(bucket + self._cfg.steps, self._cfg.tier)
        found = read_prompts(self.weights, ids, mask, np.stack([alphas] * copies), slots=slots)
        return ReadPrompt(found, bucket)

    def start(self, prompt: ReadPrompt, sample: Sample) -> tuple[int, Drawn]:
        """(the number of the sample's row, its first token); there must be a free one."""
        while len(self._live) == self._size:
            self._resize(self.tiers[self.tiers.index(self._size) + 1])
        place = min(set(range(self._size)) - {row.place for row in self._live.values()})
        copies, nowhere = self._cfg.prompts, self._size
        places = Places(
            which=np.zeros(copies, np.int32),
            rows=np.asarray([place] + [nowhere] * (copies - 1), np.int32),
            used=np.full(copies, prompt.slots, np.int32),
            limit=np.full(copies, sample.limit, np.int32),
            keys=jax.random.wrap_key_data(jnp.asarray(np.stack([sample.key] * copies)), impl=self._impl),
            alphas=np.stack([sample.alphas] * copies),
            settings=jax.tree.map(lambda x: np.repeat(x, copies, axis=0), sample.settings),
        )
        self._fit(prompt.slots)
        strategy = PerRow(sample.is_rich)
        self._state, first = insert(self.weights, self._state, prompt.read, places, sampling=strategy)
        tokens, logprobs, *others = (x[:1] for x in to_host(first))
        done = sample.limit == 1 or int(tokens[0]) in self._ends
        number = next(self._numbers)
        if not done:
            self._live[number] = _Row(place, prompt.slots, 1, sample.is_rich)
        return number, Drawn(tokens, logprobs, (others[0], others[1]) if sample.is_rich else None, done)

    def step(self) -> dict[int, Drawn]:
        """What every row at work drew in the next few tokens; those that are done are free again."""
        self._shrink()
        self._fit(0)
        *drawn, counts, done = self._advance()
        found = {}
        for number, row in list(self._live.items()):
            new = int(counts[row.place]) - row.count
            row.used, row.count = row.used + self._cfg.steps, int(counts[row.place])
            tokens, logprobs, *others = (x[row.place][:new] for x in drawn)
            likeliest = (others[0], others[1]) if row.is_rich else None
            found[number] = Drawn(tokens, logprobs, likeliest, bool(done[row.place]))
            if done[row.place]:
                del self._live[number]
        return found

    def _advance(self) -> list[np.ndarray]:
        """What `advance` draws in all rows of the arrays, then their counts and which are done: host arrays."""
        strategy = PerRow(any(row.is_rich for row in self._live.values()))
        self._state, drawn = advance(self.weights, self._state, sampling=strategy, steps=self._cfg.steps)
        return list(to_host((*drawn, self._state.decoding.count, self._state.decoding.done)))

    def stop(self, numbers: Iterable[int]) -> None:
        """Frees these rows, those of them that are at work."""
        stopped = np.zeros(self._size, bool)
        for number in numbers:
            if (row := self._live.pop(number, None)) is not None:
                stopped[row.place] = True
        if stopped.any():
            self._state = dataclasses.replace(self._state, decoding=stop(self._state.decoding, stopped))

    @property
    def _size(self) -> int:
        """How many rows the arrays hold."""
        return len(self._state.used)

    def _fit(self, slots: int) -> None:
        """Makes as many slots as the next step of the fullest row needs, `slots` of them used at least."""
        fullest = max([slots, *(row.used for row in self._live.values())])
        self._state = fit(self._state, fullest + self._cfg.steps, self._cfg.tier)

    def _shrink(self) -> None:
        """Goes on with fewer rows where a lower tier held them all at the last step too."""
        place = self.tiers.index(self._size)
        was_sparse, self._is_sparse = self._is_sparse, place > 0 and len(self._live) <= self.tiers[place - 1]
        if was_sparse and self._is_sparse:
            self._is_sparse = False
            self._resize(self.tiers[place - 1])

    def _resize(self, size: int) -> None:
        """Moves the rows at work to the front of arrays of `size` rows."""
        which, is_live = np.zeros(size, np.int32), np.zeros(size, bool)
        for place, row in enumerate(self._live.values()):
            which[place], is_live[place] = row.place, True
            row.place = place
        self._state = keep(self._state, which, is_live)


def tiers(rows: int, step: int) -> list[int]:
    """Numbers of rows that the arrays may hold: 4, 16, 64, ... and `rows`, multiples of `step`.

    Fewer than four cost what four cost: reading the weights.
    """
    found, size = [], 4
    while size < rows:
        found.append(round_up(size, step))
        size *= 4
    return sorted({*(size for size in found if size < rows), rows})


def samples_keys(seed_key: jax.Array, line: int, samples: int) -> list[np.ndarray]:
    """The key data of each sample of prompt `line` (from 1), as `sva generate` numbers them."""
    own = _fold(seed_key, np.int32(line))
    keys = [own] if samples == 1 else [_fold(own, np.int32(number)) for number in range(samples)]
    return [np.asarray(jax.random.key_data(key)) for key in keys]


_fold: Any = jax.jit(jax.random.fold_in)
