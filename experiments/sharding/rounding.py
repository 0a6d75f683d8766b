"""How far one device's float32 gradient is from float64's, beside what meshes differ by (equality.py).

    python experiments/sharding/rounding.py      # minutes; writes rounding.json beside this file

SmolLM2 with a trained expert, 16 rows, the factored form. The float64 gradient is of the same weights, spectra and
tokens. "split" adds the gradients of the rows of one prompt at a time: the same numbers, in products of other shapes.
"wide" replaces some of the products by float64's. "meshes": in float64, where rounding hides nothing, what 8 host
devices differ by from one.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equality
import jax
import jax.numpy as jnp
import numpy as np

import sva
from sva import runtime, sharding
from sva.demo import asset_files
from sva.files import write_json
from sva.models import layers, layout
from sva.reinforce import Batch
from sva.runs import command, versions
from sva.spectral import forms


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 8)
    runtime.start()
    lm = sva.load("smollm2-135m-instruct-q4_1", scan_layers=True, progress=False)
    at = equality.setting(lm, sva.decompose(lm, "mlp", progress=False), asset_files()[:2])
    raw = {name: jnp.asarray(x, jnp.float32) for name, x in at.experts[0].raw.items()}
    ids, mask = equality.prompts(lm)
    tokens = equality.rollout(at, ids, mask, "factored")[0].tokens
    rewards = np.where(np.arange(len(tokens)) % 3 == 0, 1.0, -1.0).astype(np.float32)
    batch = Batch(ids, mask, tokens, np.ones_like(tokens), rewards)  # pyright: ignore

    def gradient(batch: Batch, wide: bool = False, at: equality.Setting = at) -> dict[str, np.ndarray]:
        dtype = jnp.float64 if wide else jnp.float32
        args = jax.tree.map(lambda x: x.astype(dtype), (raw, at.nested, at.lm.params))
        _, grads = equality.gradient(*args, batch, model=lm.model.clone(dtype=dtype), kl_coef=0.0)
        return {name: np.asarray(x, np.float64) for name, x in grads.items()}

    exact = gradient(batch, wide=True)

    def error(found: dict[str, np.ndarray]) -> float:
        return equality.relative(list(found.values()), list(exact.values()))

    one = gradient(batch)
    parts = [gradient(jax.tree.map(lambda x, p=p: x[_rows(len(x), p)], batch)) for p in range(equality.PROMPTS)]
    split = {name: np.mean([part[name] for part in parts], axis=0) for name in one}
    result: dict[str, Any] = {
        "one_device": error(one),
        "split": error(split),
        "one_device_against_split": equality.relative(list(one.values()), list(split.values())),
    }
    with wide_products(forms):
        result["adapted_products_wide"] = error(gradient(batch))
        with wide_products(layers):
            result["all_products_wide"] = error(gradient(batch))
    result["meshes"] = {}
    for sizes in ((8, 1, 1), (2, 4, 1), (2, 2, 2)):
        mesh = sharding.make_mesh(sharding.MeshConfig(*sizes))
        with jax.set_mesh(mesh):
            there = equality.moved(at, mesh)
            placed = sharding.place(batch, sharding.shardings(layout.rows(batch), mesh))
            result["meshes"]["x".join(map(str, sizes))] = error(gradient(placed, wide=True, at=there))
        print(json.dumps(result["meshes"]), flush=True)
    result |= {"versions": versions(), "command": command()}
    write_json(Path(__file__).with_name("rounding.json"), result)
    print(json.dumps(result, indent=2))


def _rows(length: int, prompt: int) -> slice:
    """Of an array with so many rows, those of one prompt."""
    each = length // equality.PROMPTS
    return slice(prompt * each, (prompt + 1) * each)


@contextlib.contextmanager
def wide_products(module: Any) -> Iterator[None]:
    """Inside, what the module calls `dot` multiplies and adds in float64."""
    narrow = module.dot
    module.dot = lambda x, w: narrow(x.astype(jnp.float64), jnp.asarray(w, jnp.float64)).astype(x.dtype)
    equality.gradient.clear_cache()
    try:
        yield
    finally:
        module.dot = narrow
        equality.gradient.clear_cache()


if __name__ == "__main__":
    main()
