"""The sparse mlp of a mixture-of-experts layer: a router picks some of X modules for every token.

| path                    | holds                                                       |
|-------------------------|-------------------------------------------------------------|
| `mlp.gate`              | the router [X, D]                                           |
| `mlp.experts.gate_proj` | [X, F, D] of all modules, X weights by name; so are the next |
| `mlp.experts.up_proj`   | [X, F, D]                                                   |
| `mlp.experts.down_proj` | [X, D, F]                                                   |

Which modules were chosen is sown as `chosen` [B, T, K] into the collection `moe`, where that is asked for
(`mutable=["moe"]`); `loads` counts them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sva.models.config import ModelConfig
from sva.models.layers import ACTIVATIONS, SpectralDense, normal, weight
from sva.models.moe_config import Moe
from sva.models.moe_mesh import divided
from sva.models.stacks import stacks
from sva.spectral.grouped import grouped
from sva.utils.grouped import collect, lay_out
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
    """The modules of one layer."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, modules: jax.Array, shares: jax.Array) -> jax.Array:
        """[B, T, D] of x [B, T, D]: the sum of each token's `modules` [B, T, K], each times its share [B, T, K]."""
        cfg, moe = self.cfg, _moe(self.cfg)
        into = {"gate_proj": cfg.hidden_size, "up_proj": cfg.hidden_size, "down_proj": moe.width}
        stacks = {
            name: ModuleStack(moe.modules, width, name=name).given(into[name], x.dtype)
            for name, width in (("gate_proj", moe.width), ("up_proj", moe.width), ("down_proj", cfg.hidden_size))
        }
        run = partial(run_modules, count=moe.modules, activation=ACTIVATIONS[cfg.hidden_act])
        return divided(run, stacks, x, modules, shares, moe).astype(x.dtype)


def run_modules(
    stacks: Mapping[str, tuple[Any, Any]],
    x: jax.Array,
    modules: jax.Array,
    shares: jax.Array,
    *,
    count: int,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """[B, T, D] float32, the sum of down(act(gate(x)) * up(x)) over each token's modules, each times its share.

    Args:
      stacks: (weight, adapter) of the `count` modules' matrices.
      x: [B, T, D].
      modules: [B, T, K]; a number outside 0 to `count` - 1 adds nothing.
      shares: [B, T, K].
    """
    _, length, width = x.shape
    top_k = modules.shape[-1]
    is_here = (modules >= 0) & (modules < count)
    layout = lay_out(jnp.where(is_here, modules, count).ravel(), count)
    token = layout.source // top_k  # padding has that of no token
    rows = jnp.take(x.reshape(-1, width), token, axis=0, mode="fill", fill_value=0)

    def product(name: str, x: jax.Array) -> jax.Array:
        w, adapter = stacks[name]
        return grouped(adapter, x, w, layout, token // length)

    y = product("down_proj", activation(product("gate_proj", rows)) * product("up_proj", rows))
    y = collect(y, layout).reshape(*modules.shape, width).astype(jnp.float32)
    return jnp.sum(y * jnp.where(is_here, shares, 0)[..., None], axis=2)


class SparseMlp(nn.Module):
    """The mlp of a sparse layer: the sum of the chosen modules' outputs, each times its share."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] from x [B, T, D]."""
        moe = _moe(self.cfg)
        modules, shares = Router(moe.modules, name="gate").chosen(x, moe)
        self.sow(COLLECTION, "chosen", modules)
        return Modules(self.cfg, name="experts")(x, modules, shares)


def loads(sown: Mapping[str, Any], valid: Any, modules: int) -> dict[str, jax.Array]:
    """{key of the linen tree: [X], or [L, X] of L layers scanned together}: how often each module was chosen, float32.

    Args:
      sown: the collection `moe` of one call.
      valid: [B, T] bool, the tokens that count.
      modules: X.
    """

    def one(chosen: jax.Array) -> jax.Array:
        if chosen.ndim > 3:
            return jax.vmap(one)(chosen)
        counts = jnp.broadcast_to(jnp.asarray(valid)[..., None], chosen.shape).astype(jnp.float32)
        return jnp.zeros(modules, jnp.float32).at[chosen.ravel()].add(counts.ravel())

    return {key: one(layer["mlp"]["chosen"][0]) for key, layer in sown.items()}


def largest_load(sown: Mapping[str, Any], valid: Any, modules: int) -> jax.Array:
    """[] float32: how many times its fair part the busiest module of a layer gets, the mean over layers; 1 is balanced.

    Arguments as of `loads`.
    """
    counts = jnp.concatenate([jnp.atleast_2d(x) for x in loads(sown, valid, modules).values()])
    return jnp.mean(jnp.max(counts, axis=1) * modules / jnp.maximum(jnp.sum(counts, axis=1), 1))


def balance(
    model: Any, params: Mapping[str, Any], input_ids: Any, attention_mask: Any, adapter: Mapping[str, Any] | None = None
) -> dict[int, np.ndarray]:
    """{sparse layer: [X] float32 share of the chosen modules} over the tokens of a batch, padding left out.

    A balanced layer has 1 / X everywhere. A metric, not part of any loss: the routers of a base are trained already.

    Args:
      model: a `Transformer`.
      params, input_ids, attention_mask, adapter: as in `sva.logits`.
    """
    valid = np.asarray(attention_mask) > 0
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    collections = {"params": params} if adapter is None else {"params": params, "adapter": model.nest(adapter)}
    found: dict[int, np.ndarray] = {}
    stacks_of = {stack.key: stack for stack in stacks(model.cfg.num_layers, model.scan_layers)}
    for key, counted in _loads(model, collections, jnp.asarray(input_ids), jnp.asarray(positions), valid).items():
        first = stacks_of[key].first if key in stacks_of else int(key.removeprefix("layers_"))
        found |= {first + number: load / load.sum() for number, load in enumerate(np.atleast_2d(np.asarray(counted)))}
    return dict(sorted(found.items()))


@partial(jax.jit, static_argnames=("model",))
def _loads(model: Any, collections: Any, ids: Any, positions: Any, valid: Any) -> Any:
    _, sown = model.apply(collections, ids, positions, valid, mutable=[COLLECTION])
    return loads(sown[COLLECTION], valid, model.cfg.moe.modules)


def _moe(cfg: ModelConfig) -> Moe:
    assert cfg.moe is not None
    return cfg.moe


def _exact(tree: Any) -> Any:
    """A tree with its floats in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
