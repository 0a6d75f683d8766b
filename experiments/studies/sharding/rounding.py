"""How far one device's float32 gradient is from float64's, beside what meshes differ by (equality.py).

    python experiments/studies/sharding/rounding.py      # a minute or two; writes rounding.json beside this file

SmolLM2 with a trained expert, 16 rows, the factored form. The float64 gradient is of the same weights, spectra and
tokens. "split" adds the gradients of the rows of one prompt at a time: the same numbers, in products of other shapes.
"wide" replaces some of the products by float64's.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equality
import jax
import jax.numpy as jnp
import numpy as np

import sva
from sva.cli.demonstration import asset_files
from sva.models import layers
from sva.parallel import compile_cache
from sva.spectral import forms
from sva.training.reinforce import Batch
from sva.utils.files import write_json
from sva.utils.provenance import command, versions


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    compile_cache.start()
    lm = sva.load("smollm2-135m-instruct-q4_1", scan_layers=True, progress=False)
    at = equality.setting(lm, sva.decompose(lm, "mlp", progress=False), asset_files()[:2])
    raw = {name: jnp.asarray(x, jnp.float32) for name, x in at.experts[0].raw.items()}
    ids, mask = equality.prompts(lm)
    tokens = equality.rollout(at, ids, mask, "factored")[0].tokens
    rewards = np.where(np.arange(len(tokens)) % 3 == 0, 1.0, -1.0).astype(np.float32)
    batch = Batch(ids, mask, tokens, np.ones_like(tokens), rewards)  # pyright: ignore

    def gradient(batch: Batch, at: equality.Setting = at) -> dict[str, np.ndarray]:
        start = jax.tree.map(lambda x: x.astype(at.lm.model.dtype), raw)
        _, grads = equality.gradient(start, at.nested, at.lm.params, batch, model=at.lm.model, kl_coef=0.0)
        return {name: np.asarray(x, np.float64) for name, x in grads.items()}

    exact = gradient(batch, widened(at))

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
    result |= {"versions": versions(), "command": command()}
    write_json(Path(__file__).with_name("rounding.json"), result)
    print(json.dumps(result, indent=2))


def widened(at: equality.Setting) -> equality.Setting:
    """The same numbers in float64, and a model that computes so."""
    spectra, nested, params = jax.tree.map(lambda x: x.astype(jnp.float64), (at.spectra, at.nested, at.lm.params))
    lm = dataclasses.replace(at.lm, model=at.lm.model.clone(dtype=jnp.float64), params=params)
    return equality.Setting(lm, spectra, nested, at.experts)


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
