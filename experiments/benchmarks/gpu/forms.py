"""What a product of each form costs while decoding, at the shape of Llama-3-8B's mlp, beside the rate of memory.

    python experiments/benchmarks/gpu/forms.py              # writes forms.json beside this file

Twelve random layers W [14336, 4096] and their spectra, 1, 8 and 32 rows of one token, each row on a z of its own except
in the dense form: x W'^T, ((x V) * (s z)) U^T, and x W^T + ((x V_k) * d) U_k^T for 64 components and for all. A program
makes the products of all layers, each behind a barrier; its bytes are the matrices' that the form reads, which nothing
can hold in a cache. Medians, after compilation and a warm-up, all forms in turn.
"""

import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sva.cli.throughput import read_rate
from sva.parallel import compile_cache
from sva.spectral.forms import Delta, Factored, Spectrum
from sva.utils.files import write_json
from sva.utils.matmul import dot
from sva.utils.provenance import command, versions

LAYERS, SHAPE, ROUNDS = 12, (14336, 4096), 20
K = 64


@partial(jax.jit, static_argnames=("shape", "dtype"))
def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random numbers of about 1 / sqrt(width)."""
    return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5


@jax.jit
def products(x: jax.Array, layers: list[Any]) -> list[jax.Array]:
    """Sums of every layer's product with x [B, 1, D_in]; a layer is a matrix, or (adapter, matrix)."""
    made = [layer[0](x, layer[1]) if isinstance(layer, tuple) else dot(x, layer) for layer in layers]
    return [jnp.sum(jax.lax.optimization_barrier(y)) for y in made]


def seconds(x: jax.Array, layers: list[Any]) -> float:
    """Of one call."""
    started = time.perf_counter()
    jax.block_until_ready(products(x, layers))
    return time.perf_counter() - started


def main() -> None:
    compile_cache.start()
    out, into = SHAPE
    result: dict[str, Any] = {"layers": LAYERS, "shape": SHAPE, "device": jax.devices()[0].device_kind}
    rate = result["read_gigabytes_per_second"] = read_rate(5) / 1e9
    for dtype in (jnp.bfloat16,):
        keys = iter(jax.random.split(jax.random.key(0), 4 * LAYERS))
        rank = min(SHAPE)
        weights = [draw(next(keys), SHAPE, dtype) for _ in range(LAYERS)]
        spectra = [
            Spectrum(
                draw(next(keys), (out, rank), dtype), jnp.linspace(2, 0.1, rank), draw(next(keys), (rank, into), dtype)
            )
            for _ in range(LAYERS)
        ]
        for rows in (1, 8, 32):
            z = jnp.ones((rows, rank)) + jnp.arange(rows)[:, None] / 100
            forms = {
                "dense": weights,
                "factored": [(Factored(spectrum, z), None) for spectrum in spectra],
                f"delta, {K}": [
                    (Delta(u[:, :K], vt[:K], s[:K] * (z[:, :K] - 1)), w)
                    for (u, s, vt), w in zip(spectra, weights, strict=True)
                ],
                "delta, all": [(Delta(u, vt, s * (z - 1)), w) for (u, s, vt), w in zip(spectra, weights, strict=True)],
            }
            x = jnp.ones((rows, 1, into), dtype)
            for layers in forms.values():
                seconds(x, layers)
                seconds(x, layers)
            times = {name: [] for name in forms}
            for _ in range(ROUNDS):
                for name, layers in forms.items():
                    times[name].append(seconds(x, layers))
            for name, layers in forms.items():
                size = sum(leaf.nbytes for leaf in jax.tree.leaves(layers)) / 1e9
                median = statistics.median(times[name])
                found = {"gigabytes": size, "seconds": median, "share_of_read_rate": size / median / rate}
                result.setdefault(jnp.dtype(dtype).name, {}).setdefault(str(rows), {})[name] = found
                print(jnp.dtype(dtype).name, rows, name, json.dumps(found), flush=True)
        del weights, spectra, forms, layers
    write_json(Path(__file__).with_name("forms.json"), result | {"versions": versions(), "command": command()})


if __name__ == "__main__":
    main()
