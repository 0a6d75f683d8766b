"""Attention of 32 rows' single queries over a cache of SmolLM2's shapes: keys in one block against blocks of 32 slots.

    python experiments/benchmarks/engine/attention.py     # writes attention.json beside this file

`sva.models.layers.attend` itself, in a loop over the 30 layers' caches as decoding has it, without anything else. The
limit is the time that reading keys and values once takes at the rate of a sum over them, measured in the same run.
"""

import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sva.models.attention import attend
from sva.models.cache import BLOCK, KV
from sva.parallel import compile_cache
from sva.utils.files import write_json
from sva.utils.provenance import command, versions

ROWS, HEADS, KV_HEADS, WIDTH, LAYERS = 32, 9, 3, 64, 30
STEPS, ROUNDS = 10, 7


def caches(slots: int, *, blocks: bool) -> list[KV]:
    """Of every layer."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    lead = (ROWS, KV_HEADS)
    keys = (slots // BLOCK, WIDTH, BLOCK) if blocks else (WIDTH, slots)
    return [KV(normal(*lead, *keys), normal(*lead, slots, WIDTH)) for _ in range(LAYERS)]


@jax.jit
def steps(q: jax.Array, kvs: list[KV]) -> jax.Array:
    """So many steps, each over all layers, a layer's answer being the next one's query."""
    sees = jnp.ones((ROWS, 1, kvs[0].v.shape[2]), bool)

    def step(_, q: jax.Array) -> jax.Array:
        for kv in kvs:
            q = q + attend(q, [kv], sees).reshape(q.shape)
        return q

    return jax.lax.fori_loop(0, STEPS, step, q)


@jax.jit
def read(kvs: list[KV]) -> list[jax.Array]:
    """Everything once."""
    return [jnp.sum(x, axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(kvs)]


def milliseconds(run) -> float:
    """Of one call."""
    started = time.perf_counter()
    jax.block_until_ready(run())
    return 1e3 * (time.perf_counter() - started)


def main() -> None:
    compile_cache.start()
    q = jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, 1, HEADS, WIDTH)), jnp.float32)
    result = {"rows": ROWS, "layers": LAYERS, "slots": {}}
    for slots in (64, 96, 128, 256, 384, 512):
        one, many = (caches(slots, blocks=blocks) for blocks in (False, True))
        runs = {
            "one block": lambda one=one: steps(q, one),
            f"blocks of {BLOCK}": lambda many=many: steps(q, many),
            "read once": lambda one=one: read(one),
        }
        times = {name: [] for name in runs}
        for _ in range(ROUNDS + 1):  # the first compiles
            for name, run in runs.items():
                times[name].append(milliseconds(run) / (1 if name == "read once" else STEPS))
        result["slots"][slots] = {name: statistics.median(found[1:]) for name, found in times.items()}
        print(slots, result["slots"][slots], flush=True)
    write_json(
        Path(__file__).with_name("attention.json"),
        result | {"unit": "milliseconds a step, median", "command": command(), "versions": versions()},
    )


if __name__ == "__main__":
    main()
