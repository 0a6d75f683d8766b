"""The sparse mlp of a mixture-of-experts layer: a router picks some of X modules for every token.

| path                    | holds                                                       |
|-------------------------|-------------------------------------------------------------|
| `mlp.gate`              | the router [X, D]                                           |
| `mlp.experts.gate_proj` | [X, F, D] of all modules, X weights by name; so are the next |
| `mlp.experts.up_proj`   | [X, F, D]                                                   |
| `mlp.experts.down_proj` | [X, D, F]                                                   |

The balance of modules is sown as `load` [X] into the collection `moe`, tokens a module, where that is asked for
(`mutable=["moe"]`).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sva.models.config import ModelConfig
from sva.models.layers import ACTIVATIONS, SpectralDense, normal, weight
from sva.models.moe_config import Moe
from sva.models.stacks import stacks
from sva.spectral.grouped import grouped
from sva.utils.grouped import Layout, collect, lay_out
from sva.utils.matmul import dot

COLLECTION = "moe"


class Router(SpectralDense):
    """The router of one layer, in float32 whatever the model's dtype."""

    def chosen(self, x: jax.Array, moe: Moe) -> tuple[jax.Array, jax.Array]:
        """([B, T, K] int32 modules of each token, [B, T, K] float32 how much each counts) of x [B, T, D]."""
        w, adapter, _ = (_exact(part) for part in self.given(x.shape[-1], x.dtype))
        x = x.astype(jnp.float32)
        logits = dot(x, w) if adapter is None else adapter(x, w)
        shares, modules = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), moe.top_k)
        if moe.renormalise:
            shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
        return modules, shares


class ModuleStack(nn.Module):
    """The same matrix of all modules, stacked: what `SpectralDense` is to one matrix."""

    modules: int
    features: int

    @nn.compact
    def given(self, into: int, dtype: Any) -> tuple[Any, Any]:
        """(weight [X, features, into], adapter); None for what there is not."""
        adapter: Any = self.get_variable("adapter", "weight")
        if adapter is not None and not self.has_variable("params", "weight"):
            return None, adapter
        return weight(self, "weight", normal, (self.modules, self.features, into), dtype), adapter


class Modules(nn.Module):
    """down(act(gate(x)) * up(x)) of rows laid out by module."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, layout: Layout, batch_row: jax.Array) -> jax.Array:
        """[R, D] of x [R, D], whose rows are of these rows [R] of the batch."""
        cfg, moe = self.cfg, _moe(self.cfg)

        def product(name: str, features: int, x: jax.Array) -> jax.Array:
            w, adapter = ModuleStack(moe.modules, features, name=name).given(x.shape[-1], x.dtype)
            return grouped(adapter, x, w, layout, batch_row)

        gate, up = product("gate_proj", moe.width, x), product("up_proj", moe.width, x)
        return product("down_proj", cfg.hidden_size, ACTIVATIONS[cfg.hidden_act](gate) * up)


class SparseMlp(nn.Module):
    """The mlp of a sparse layer: the sum of the chosen modules' outputs, each times its share."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] from x [B, T, D]."""
        moe = _moe(self.cfg)
        batch, length, width = x.shape
        modules, shares = Router(moe.modules, name="gate").chosen(x, moe)
        self.sow(COLLECTION, "load", jnp.zeros(moe.modules).at[modules.ravel()].add(1))
        tokens = x.reshape(-1, width)
        layout = lay_out(modules.ravel(), moe.modules)
        token = layout.source // moe.top_k  # padding has that of no token
        rows = jnp.take(tokens, token, axis=0, mode="fill", fill_value=0)
        y = Modules(self.cfg, name="experts")(rows, layout, token // length)
        y = collect(y, layout).reshape(batch, length, moe.top_k, width).astype(jnp.float32)
        return jnp.sum(y * shares[..., None], axis=2).astype(x.dtype)


def balance(
    model: Any, params: Mapping[str, Any], input_ids: Any, attention_mask: Any, adapter: Mapping[str, Any] | None = None
) -> dict[int, np.ndarray]:
    """{sparse layer: [X] float32 share of the chosen modules} over the tokens of a batch, padding left out.

    A balanced layer has 1 / X everywhere. A metric, not part of any loss: the routers of a base are trained already.

    Args:
      model: a `Transformer`.
      params, input_ids, attention_mask, adapter: as in `sva.logits`.
    """
    mask = np.asarray(attention_mask)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    collections = {"params": params} if adapter is None else {"params": params, "adapter": model.nest(adapter)}
    sown = _loads(model, collections, jnp.asarray(input_ids), jnp.asarray(positions), np.flatnonzero(mask), mask > 0)
    found: dict[int, np.ndarray] = {}
    stacks_of = {stack.key: stack for stack in stacks(model.cfg.num_layers, model.scan_layers)}
    for key, layer in sown.items():
        loads = np.atleast_2d(np.asarray(layer["mlp"]["load"][0]))
        first = stacks_of[key].first if key in stacks_of else int(key.removeprefix("layers_"))
        found |= {first + number: load / load.sum() for number, load in enumerate(loads)}
    return dict(sorted(found.items()))


@partial(jax.jit, static_argnames=("model",))
def _loads(model: Any, collections: Any, ids: Any, positions: Any, places: Any, valid: Any) -> Any:
    _, sown = model.apply(collections, ids, positions, valid, token_indices=places, mutable=[COLLECTION])
    return sown[COLLECTION]


def _moe(cfg: ModelConfig) -> Moe:
    assert cfg.moe is not None
    return cfg.moe


def _exact(tree: Any) -> Any:
    """A tree with its floats in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
