"""The rows of a server that decode together: a prompt joins between two steps, and a row leaves when it is done.

The programs are those of `sva.generation.engine`, whose `run` takes a list of prompts to its end; here prompts come and
go while others decode. Shapes depend on the prompt's bucket and on the tier of the fullest row alone.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sva.generation.engine import EngineConfig, Places, Read, advance, fit, idle, insert, read_prompts, stop
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
    used: int  # slots written
    count: int  # tokens drawn
    is_rich: bool


class Rows:
    """A fixed number of rows; everything here is called by the one thread that owns JAX."""

    def __init__(self, weights: Weights, cfg: EngineConfig, experts: int) -> None:
        """The rows, all free; `experts` is E_max, 0 without a bank."""
        self.weights = weights
        self._cfg = cfg
        self._experts = experts
        self._ends = set(np.asarray(weights.eos_ids).tolist())
        self.clear()

    def clear(self) -> None:
        """Frees every row, and makes their state anew."""
        key = jax.random.key(0)
        self._impl = jax.random.key_impl(key)
        settings = jax.tree.map(lambda x: np.repeat(x, self._cfg.rows, axis=0), row_settings())
        slots = round_up(self._cfg.steps + 1, self._cfg.tier)
        self._live: dict[int, _Row] = {}
        self._state = idle(self.weights.model, key, settings, rows=self._cfg.rows, slots=slots, experts=self._experts)

    @property
    def live(self) -> list[int]:
        """The numbers of the rows at work."""
        return list(self._live)

    @property
    def free(self) -> int:
        """How many rows are free."""
        return self._cfg.rows - len(self._live)

    def read(self, prompt_ids: Sequence[int], alphas: np.ndarray) -> ReadPrompt:
        """A prompt's keys, values and next logits under a mixture, alphas [E_max]."""
        bucket = prompt_bucket(len(prompt_ids))
        copies = self._cfg.prompts
        ids, mask = pad_tokens([prompt_ids] * copies, bucket)
        slots = round_up(bucket + self._cfg.steps, self._cfg.tier)
        found = read_prompts(self.weights, ids, mask, np.stack([alphas] * copies), slots=slots)
        return ReadPrompt(found, bucket)

    def start(self, prompt: ReadPrompt, sample: Sample) -> tuple[int, Drawn]:
        """(the row that the sample takes, its first token); there must be a free one."""
        row = min(set(range(self._cfg.rows)) - set(self._live))
        copies, nowhere = self._cfg.prompts, self._cfg.rows
        places = Places(
            which=np.zeros(copies, np.int32),
            rows=np.asarray([row] + [nowhere] * (copies - 1), np.int32),
            used=np.full(copies, prompt.slots, np.int32),
            limit=np.full(copies, sample.limit, np.int32),
            keys=jax.random.wrap_key_data(jnp.asarray(np.stack([sample.key] * copies)), impl=self._impl),
            alphas=np.stack([sample.alphas] * copies),
            settings=jax.tree.map(lambda x: np.repeat(x, copies, axis=0), sample.settings),
        )
        fullest = max([prompt.slots, *(one.used for one in self._live.values())])
        self._state = fit(self._state, fullest + self._cfg.steps, self._cfg.tier)
        strategy = PerRow(sample.is_rich)
        self._state, first = insert(self.weights, self._state, prompt.read, places, sampling=strategy)
        tokens, logprobs, *others = (x[:1] for x in to_host(first))
        done = sample.limit == 1 or int(tokens[0]) in self._ends
        if not done:
            self._live[row] = _Row(prompt.slots, 1, sample.is_rich)
        return row, Drawn(tokens, logprobs, (others[0], others[1]) if sample.is_rich else None, done)

    def step(self) -> dict[int, Drawn]:
        """What every row at work drew in the next few tokens; those that are done are free again."""
        cfg = self._cfg
        strategy = PerRow(any(row.is_rich for row in self._live.values()))
        fullest = max(row.used for row in self._live.values())
        self._state = fit(self._state, fullest + cfg.steps, cfg.tier)
        self._state, drawn = advance(self.weights, self._state, sampling=strategy, steps=cfg.steps)
        *drawn, counts, done = to_host((*drawn, self._state.decoding.count, self._state.decoding.done))
        found = {}
        for number, row in list(self._live.items()):
            new = int(counts[number]) - row.count
            row.used, row.count = row.used + cfg.steps, int(counts[number])
            tokens, logprobs, *others = (x[number][:new] for x in drawn)
            likeliest = (others[0], others[1]) if row.is_rich else None
            found[number] = Drawn(tokens, logprobs, likeliest, bool(done[number]))
            if done[number]:
                del self._live[number]
        return found

    def stop(self, numbers: Sequence[int]) -> None:
        """Frees these rows, those of them that are at work."""
        stopped = np.zeros(self._cfg.rows, bool)
        for number in numbers:
            if self._live.pop(number, None) is not None:
                stopped[number] = True
        if stopped.any():
            self._state = dataclasses.replace(self._state, decoding=stop(self._state.decoding, stopped))


def samples_keys(seed_key: jax.Array, line: int, samples: int) -> list[np.ndarray]:
    """The key data of each sample of prompt `line` (from 1), as `sva generate` numbers them."""
    own = _fold(seed_key, np.int32(line))
    keys = [own] if samples == 1 else [_fold(own, np.int32(number)) for number in range(samples)]
    return [np.asarray(jax.random.key_data(key)) for key in keys]


_fold: Any = jax.jit(jax.random.fold_in)
