"""Prints how far a mixture of experts on each mesh is from one on one device, in logits and z's gradient, as JSON.

Under "modules alone" it is how far those of one layer are where rows, or modules, do not divide over the mesh.

python tests/moe_mesh_worker.py 1x1x1x8 2x1x2x2     # data x fsdp x tensor x moe
"""

import json
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sva
from sva.cli.throughput import random_lm
from sva.models import layout
from sva.models.config import from_hf
from sva.models.moe import run_modules
from sva.models.moe_config import Moe
from sva.models.moe_mesh import divided
from sva.models.transformer import logits
from sva.parallel import sharding
from sva.parallel.mesh_config import MeshConfig
from sva.spectral.forms import Factored, Spectrum, adapters

SHAPE = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}
ROWS, LENGTH = 8, 6
UNEVEN = {"6 rows": (6, 8), "6 modules": (8, 6)}  # rows, modules on eight devices


def alone(rows: int, count: int) -> float:
    """How far one layer's modules and their z's gradient on eight devices along `moe` are from those on one device."""
    width, inner, rng = 16, 8, np.random.default_rng(0)
    moe = Moe(modules=count, top_k=2, width=inner, renormalise=True, layers=(True,))

    def of(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    sizes = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
    spectra = {
        name: Spectrum(of(count, out, inner), of(count, inner), of(count, inner, into))
        for name, (out, into) in sizes.items()
    }
    z = {name: of(count, rows, inner) for name in sizes}
    x, shares = of(rows, LENGTH, width), of(rows, LENGTH, 2)
    modules = jnp.asarray(rng.integers(0, count, (rows, LENGTH, 2)), jnp.int32)

    @jax.jit
    def slopes(z: Any) -> Any:
        def total(z: Any) -> jax.Array:
            stacks = {name: (None, Factored(spectrum, z[name])) for name, spectrum in spectra.items()}
            run = partial(run_modules, count=count, activation=jax.nn.silu)
            return jnp.sum(jnp.square(divided(run, stacks, x, modules, shares, moe)))

        return jax.value_and_grad(total)(z)

    on_one = slopes(z)
    with jax.set_mesh(sharding.make_mesh(MeshConfig(moe=8))):
        on_all = slopes(z)
    pairs = zip(jax.tree.leaves(on_one), jax.tree.leaves(on_all), strict=True)
    return max(float(np.linalg.norm(np.asarray(a - b)) / np.linalg.norm(np.asarray(a))) for a, b in pairs)


def main() -> None:
    lm = random_lm(from_hf(SHAPE), "float32", scan_layers=True)
    spectra = sva.decompose(lm, "moe", progress=False)
    rng = np.random.default_rng(0)
    z = {name: jnp.asarray(rng.uniform(0.7, 1.3, (ROWS, 16)), jnp.float32) for name in spectra}  # one a row
    ids = rng.integers(0, 64, (ROWS, LENGTH)).astype(np.int32)
    weights = jnp.asarray(rng.standard_normal((ROWS, LENGTH, 64)), jnp.float32)

    @jax.jit
    def both(params: Any, nested: Any, ids: Any, z: Any) -> Any:
        def weighted(z: Any) -> Any:
            out = logits(lm.model, params, ids, jnp.ones_like(ids), adapters(nested, lm.model.nest(z)))
            return jnp.sum(out * weights), out

        return jax.grad(weighted, has_aux=True)(z)

    @jax.jit
    def one_token(params: Any, nested: Any, ids: Any, z: Any) -> Any:
        """Of the base, and of a mixture that all rows share."""
        adapter = adapters(nested, lm.model.nest({name: x[:1] for name, x in z.items()}))
        ids = ids[:, :1]
        return jnp.stack([logits(lm.model, params, ids, jnp.ones_like(ids), x) for x in (None, adapter)])

    nested = lm.model.nest(spectra)
    slopes, out = both(lm.params, nested, ids, z)
    first = one_token(lm.params, nested, ids, z)
    found = {}
    for name in sys.argv[1:]:
        mesh = sharding.make_mesh(MeshConfig(*map(int, name.split("x"))))
        with jax.set_mesh(mesh):
            params = sharding.place(lm.params, sharding.shardings(layout.params(lm.model), mesh))
            leaves = layout.nested(lm.model, layout.spectra(lm.model.cfg, list(spectra)))
            placed = sharding.place(nested, sharding.shardings(leaves, mesh))
            rows = layout.place_rows(ids, mesh)
            their_slopes, their_out = both(params, placed, rows, z)
            their_first = one_token(params, placed, rows, z)
        largest = max(float(np.linalg.norm(x)) for x in slopes.values())
        errors = (np.linalg.norm(np.asarray(slopes[n]) - np.asarray(their_slopes[n])) for n in slopes)
        gate = params["layers"]["mlp"]["experts"]["gate_proj"]["weight"]
        found[name] = {
            "logits": float(np.abs(np.asarray(out) - np.asarray(their_out)).max()),
            "one token": float(np.abs(np.asarray(first) - np.asarray(their_first)).max()),
            "gradient": float(max(errors)) / largest,
            "modules of a device": gate.addressable_shards[0].data.shape[1],
            "size": float(np.abs(np.asarray(out)).max()),
        }
    found["modules alone"] = {name: alone(*sizes) for name, sizes in UNEVEN.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
