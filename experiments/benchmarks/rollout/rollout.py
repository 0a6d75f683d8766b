"""A rollout of 64 GSM8K prompts with 4 completions each, SmolLM2 in float32: refilled rows beside a single batch.

    python experiments/benchmarks/rollout/rollout.py [--prompts 64] [--rows N] [--rounds 1]   # writes result.json

Prompts are GSM8K's first training questions, rows stop at the lengths of lengths.json, tokens are drawn at temperature
1 with the same keys on both sides. `engine` is what training runs (`sva.training.rollout.engine_config`): so many rows
at a time, and one that ends takes the next sample. `single batch` is what training ran before: all rows decode until
the longest ends, each prompt's keys and values read once for its samples. Each side runs once on few tokens to
compile, then both in turn. The rows whose tokens differ are listed with their first differing step.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sva.generation import chat, engine
from sva.generation.decode import begin, decode, prefill_prefix, read
from sva.generation.engine import Request
from sva.generation.load import load
from sva.generation.sampling import OnPolicy
from sva.generation.weights import Weights
from sva.models import cache as kv_cache
from sva.models.transformer import variables
from sva.parallel import compile_cache
from sva.tasks import task
from sva.training.config.rollout import RolloutConfig
from sva.training.rollout import PromptShape, engine_config
from sva.utils.files import write_json
from sva.utils.padding import common_prefix, length_bucket, pad_tokens
from sva.utils.provenance import command, versions

HERE = Path(__file__).parent
NEW, SAMPLES, SAMPLING = 512, 4, OnPolicy(1.0)


@partial(jax.jit, static_argnames=("model", "new"))
def single_batch(model: Any, params: Any, ids: Any, mask: Any, keys: jax.Array, limit: Any, *, new: int) -> Any:
    """(tokens [B, new], counts [B]) of all rows in one batch."""
    collections, eos_ids = variables(model, params, None), jnp.full(4, -1, jnp.int32)
    logits, segment, position = read(model, collections, ids, mask, [])
    logits, position = (jnp.repeat(x, SAMPLES, axis=0) for x in (logits, position))
    state, first = begin(logits, position, limit, eos_ids, keys, SAMPLING)
    past = [kv_cache.resize(segment, ids.shape[1])]
    cache = kv_cache.start(model.cfg, len(keys), new, model.kept_dtype, scan=model.scan_layers)
    state, rest, _ = decode(model, collections, past, cache, state, eos_ids, sampling=SAMPLING, steps=new - 1)
    return jnp.concatenate([first[0][:, None], rest[0]], axis=1), state.count


class Sides:
    """Both ways to draw the same rows."""

    def __init__(self, prompts: int, rows: int | None) -> None:
        self.lm = load("smollm2-135m-instruct-q4_1", progress=False)
        gsm8k = task("gsm8k")
        source = gsm8k.source("train")
        texts = [chat.render_example(self.lm, gsm8k, source[i]) for i in range(prompts)]
        self.prompts = chat.tokenize(self.lm, texts)
        self.lengths = np.asarray(json.loads((HERE / "lengths.json").read_text())["answers"])[:prompts].reshape(-1)
        self.keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(len(self.lengths)))
        shared, longest = common_prefix(self.prompts), max(map(len, self.prompts))
        cfg = RolloutConfig(prompts=prompts, samples=SAMPLES, max_new_tokens=NEW, rows=rows)
        self.shape = PromptShape(length_bucket(longest), longest, shared)
        self.cfg = engine_config(cfg, self.shape, NEW)

    def engine(self, lengths: np.ndarray) -> list[np.ndarray]:
        """The tokens of every row, refilled."""
        model, params = self.lm.model, self.lm.params
        prefix = np.asarray(self.prompts[0][: self.shape.shared], np.int32)[None]
        segment = prefill_prefix(model, variables(model, params, None), prefix)
        weights = Weights(model, params, jnp.full(4, -1, jnp.int32), prefix=segment)
        keys = self.keys.reshape(-1, SAMPLES)
        requests = [
            Request(prompt[self.shape.shared :], NEW, own) for prompt, own in zip(self.prompts, keys, strict=True)
        ]
        seen = np.zeros(len(lengths), int)

        def watch(request: int, sample: int, tokens: np.ndarray) -> int | None:
            row = request * SAMPLES + sample
            seen[row] += len(tokens)
            return len(tokens) - (seen[row] - lengths[row]) if seen[row] >= lengths[row] else None

        found: list[Any] = [None] * len(lengths)
        for row in engine.run(weights, requests, self.cfg, SAMPLING, watch):
            found[row.request * SAMPLES + row.sample] = row.tokens
        return found

    def single(self, lengths: np.ndarray) -> list[np.ndarray]:
        """The tokens of every row, in one batch."""
        ids, mask = pad_tokens(self.prompts, self.shape.width)
        limit = np.asarray(lengths, np.int32)
        tokens, counts = single_batch(self.lm.model, self.lm.params, ids, mask, self.keys, limit, new=NEW)
        return [row[:count] for row, count in zip(np.asarray(tokens), np.asarray(counts), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rows", type=int, help="rollout.rows (default: as in training)")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    compile_cache.start()
    sides = Sides(arguments.prompts, arguments.rows)
    runs = {"engine": sides.engine, "single batch": sides.single}
    for run in runs.values():
        run(np.minimum(sides.lengths, 10))
    sides.engine(np.where(np.arange(len(sides.lengths)) == 0, NEW, 1))  # one long row meets every tier of slots
    times: dict[str, list[float]] = {name: [] for name in runs}
    tokens: dict[str, list[np.ndarray]] = {}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            tokens[name] = run(sides.lengths)
            times[name].append(time.perf_counter() - started)
            print(f"{name}: {times[name][-1]:.1f} s", file=sys.stderr, flush=True)
    pairs = list(zip(*tokens.values(), strict=True))
    differ = [np.flatnonzero(one != other) for one, other in pairs]
    total, best = int(sides.lengths.sum()), {name: min(found) for name, found in times.items()}
    result = {
        "prompts": arguments.prompts,
        "samples": SAMPLES,
        "rows_at_a_time": sides.cfg.rows,
        "new_tokens": total,
        "longest": int(sides.lengths.max()),
        "seconds": times,
        "tokens_per_second": {name: total / seconds for name, seconds in best.items()},
        "ratio": best["single batch"] / best["engine"],
        "first_differing_step": {row: int(at[0]) for row, at in enumerate(differ) if at.size},
        "versions": versions(),
        "command": command(),
    }
    write_json(HERE / "result.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
