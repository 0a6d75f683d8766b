"""Linen modules of the decoder. Weights are named and shaped as in the checkpoint: (out, in)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sva.models.attention import Scaling, attend
from sva.models.cache import KV, kept, write
from sva.models.config import ModelConfig
from sva.models.packing import Packing, pack, unpack
from sva.parallel.sharding import constrain, hidden_axes
from sva.utils.matmul import Int8, dot, dots

normal = nn.initializers.normal(0.02)


def weight(module: nn.Module, name: str, init: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """The module's weight of this name as it was given, or made by `init` where a model is initialised.

    `Module.param` alone would trace `init` of every weight in every trace, only to compare shapes, which `match` has
    done when the checkpoint was read: a tenth of the time that tracing takes.
    """
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, shape, dtype)


class SpectralDense(nn.Module):
    """A linear layer that may be adapted: the only place that looks at how a weight is given.

    Without an adapter it is the plain product x W^T (the dense form, where W may be a merged weight). With one, in
    the collection `adapter` under the weight's own name, it is what the adapter makes of x and W; a W that the adapter
    does not read may be absent.
    """

    features: int
    use_bias: bool = False

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, features] from x [B, T, D_in]."""
        return side_by_side(x, [self])[0]

    @nn.compact
    def given(self, into: int, dtype: Any) -> tuple[Any, Any, Any]:
        """(weight, adapter, bias) for inputs of this width; None for what there is not."""
        adapter: Any = self.get_variable("adapter", "weight")
        w: Any = None
        if adapter is None or self.has_variable("params", "weight"):
            w = weight(self, "weight", normal, (self.features, into), dtype)
        zeros = nn.initializers.zeros
        return w, adapter, weight(self, "bias", zeros, (self.features,), dtype) if self.use_bias else None


def side_by_side(x: jax.Array, layers: Sequence[SpectralDense]) -> list[jax.Array]:
    """[B, T, features] of each of these layers for the same x [B, T, D_in]."""
    given = [layer.given(x.shape[-1], x.dtype) for layer in layers]
    if all(adapter is None for _, adapter, _ in given):
        ys = dots(x, [w for w, _, _ in given])
    else:
        ys = [dot(x, w) if adapter is None else adapter(x, w) for w, adapter, _ in given]
    biases = (bias for _, _, bias in given)
    return [y if b is None else y + b.reshape((1,) * (y.ndim - 1) + b.shape) for y, b in zip(ys, biases, strict=True)]


class Embed(nn.Module):
    """Token embeddings [V, D], read forwards and, where they are tied, backwards."""

    vocab_size: int
    features: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.weight = weight(self, "weight", normal, (self.vocab_size, self.features), self.dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """[B, T, D] of ids [B, T]."""
        if isinstance(self.weight, Int8):
            return self.weight.take(ids, self.dtype)
        return jnp.take(self.weight, ids, axis=0)

    def attend(self, hidden: jax.Array) -> jax.Array:
        """[..., V] products of hidden [..., D] with every embedding."""
        return dot(hidden, self.weight)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) times a weight, in float32, given back in the dtype of x."""

    eps: float
    plus_one: bool = False  # the factor is 1 + weight, in float32 (Gemma)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Same shape as x."""
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = weight(self, "weight", init, (x.shape[-1],), x.dtype)
        scale = jnp.reshape(scale, (1,) * (x.ndim - 1) + scale.shape)
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        return (h * (1 + scale.astype(jnp.float32))).astype(x.dtype) if self.plus_one else h.astype(x.dtype) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x [B, T, heads, H] turned by its position; halves are paired, as in Hugging Face checkpoints.

    Where `cos` and `sin` [B, T, 1, 2, W / 2] are of fewer than H numbers, the first W of a head are turned. The halves
    change places by a reversal, which fuses into one loop without branches; XLA's CPU concatenation does not.
    """
    if (width := 2 * cos.shape[-1]) < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :width], cos, sin), x[..., width:]], axis=-1)
    halves = x.reshape(*x.shape[:-1], 2, -1)
    return (halves * cos + jax.lax.rev(halves, (halves.ndim - 2,)) * sin).reshape(x.shape)


class LayerCache(NamedTuple):
    """The keys and values that one layer attends to beside the call's own; scanned layers take one of [L, ...]."""

    past: tuple[KV, ...]  # of earlier tokens
    slots: KV | None  # of which this call's one token takes slot `AttentionInputs.slot`; None: T tokens by themselves
    window: jax.Array | None  # [] int32 sliding window in tokens, 0 for full attention; None where no layer has one
    rope: jax.Array | None  # [] int32, which of `AttentionInputs.rope`; None where all layers have the same


class AttentionInputs(NamedTuple):
    """Positions, masks and indices that the attention of all layers shares in one call."""

    rope: tuple[jax.Array, jax.Array]  # cosine and sine of the T positions; of each kind, where layers differ
    mask: jax.Array  # [B, T, S] bool over the slots of the past and then the others
    distance: Any  # [B, T, S] int32, query position less key position; None where no layer has a window
    slot: Any  # [] int32, the one to write; None where the layers' caches have no slots
    packing: Packing | None  # of the tokens; None where all B * T are computed


def from_column(x: jax.Array, packing: Packing | None, start: int) -> tuple[jax.Array, Packing | None]:
    """(x of the columns from `start` on, its packing): as it lies where that is all of them, else [B, T - start, D]."""
    return (unpack(x, packing)[:, start:], None) if start else (x, packing)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, over earlier tokens' keys and values and the call's own."""

    cfg: ModelConfig
    kept_dtype: Any  # of keys and values

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: LayerCache, inputs: AttentionInputs, output_start: int
    ) -> tuple[jax.Array, KV]:
        """(y of `from_column(x, ...)`, KV); see `Block`."""
        cfg, packing = self.cfg, inputs.packing
        queried, own_packing = from_column(x, packing, output_start)

        q, k, v = self._project(x, queried)
        if cfg.qk_norm == "full":
            q, k = self._normalise(q, k)

        def heads_of(y: jax.Array, packing: Packing | None) -> jax.Array:
            y = unpack(y, packing)
            return y.reshape(*y.shape[:2], -1, cfg.head_dim)

        q, k, v = heads_of(q, own_packing), heads_of(k, packing), heads_of(v, packing)
        if cfg.qk_norm == "head":
            q, k = self._normalise(q, k)
        q, k = rotate(q, *(x[:, output_start:] for x in inputs.rope)), rotate(k, *inputs.rope)
        q = constrain(q, "batch", None, "heads", None)
        k, v = (constrain(x, "batch", None, "kv_heads", None) for x in (k, v))
        own = kept(k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), self.kept_dtype)
        own = own if cache.slots is None else write(cache.slots, own, inputs.slot)
        scaling = Scaling(cfg.attention_scale or cfg.head_dim**-0.5, cfg.attention_softcap)
        y = pack(attend(q, [*cache.past, own], inputs.mask[:, output_start:], scaling), own_packing)
        return SpectralDense(cfg.hidden_size, cfg.attention_output_bias, name="o_proj")(y), own

    @nn.nowrap
    def _project(self, x: jax.Array, queried: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(queries of `queried`, keys and values of x), the heads of each side by side."""
        cfg = self.cfg
        widths = [heads * cfg.head_dim for heads in (cfg.num_heads, cfg.num_kv_heads, cfg.num_kv_heads)]
        if cfg.fused:
            layer = SpectralDense(sum(widths), cfg.attention_bias, name="qkv_proj")
            q, k, v = jnp.split(layer(x), np.cumsum(widths)[:-1], axis=-1)
            return (q if queried is x else layer(queried)[..., : widths[0]]), k, v
        layers = [
            SpectralDense(width, cfg.attention_bias, name=f"{name}_proj")
            for name, width in zip("qkv", widths, strict=True)
        ]
        if queried is x:
            q, k, v = side_by_side(x, layers)
        else:
            q, k, v = layers[0](queried), *side_by_side(x, layers[1:])
        return q, k, v

    @nn.nowrap
    def _normalise(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _norm(self.cfg, "q_norm")(q), _norm(self.cfg, "k_norm")(k)


def _norm(cfg: ModelConfig, name: str) -> RMSNorm:
    return RMSNorm(cfg.rms_norm_eps, cfg.norm_plus_one, name=name)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x))."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] from x [B, T, D]."""
        cfg = self.cfg
        if cfg.fused:
            both = SpectralDense(2 * cfg.intermediate_size, cfg.mlp_bias, name="gate_up_proj")(x)
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate = SpectralDense(cfg.intermediate_size, cfg.mlp_bias, name="gate_proj")(x)
            up = SpectralDense(cfg.intermediate_size, cfg.mlp_bias, name="up_proj")(x)
        return SpectralDense(cfg.hidden_size, cfg.mlp_bias, name="down_proj")(ACTIVATIONS[cfg.hidden_act](gate) * up)


class Block(nn.Module):
    """One decoder layer."""

    cfg: ModelConfig
    kept_dtype: Any
    feed_forward: type[nn.Module] = Mlp  # made of the configuration, called with x

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: LayerCache, inputs: AttentionInputs, output_start: int
    ) -> tuple[jax.Array, KV]:
        """The layer's output and its keys and values.

        Args:
          x: [B, T, D], or [1, N, D] with a packing.
          cache: this layer's.
          inputs: all layers'.
          output_start: the first column whose output is wanted (static); of those before only keys and values are
            computed.
        Returns:
          The shape of x, or [B, T - output_start, D], and the KV of `cache.slots`, or of the T tokens.
        """
        if cache.window is not None:
            seen = inputs.mask & ((cache.window == 0) | (inputs.distance < cache.window))
            inputs = inputs._replace(mask=seen)
        if cache.rope is not None:
            cos, sin = inputs.rope
            inputs = inputs._replace(rope=(cos[cache.rope], sin[cache.rope]))
        cfg = self.cfg
        before, after, before_mlp, after_mlp = cfg.norms

        def normed(x: jax.Array, name: str) -> jax.Array:
            return _norm(cfg, name)(x) if name else x

        def added(x: jax.Array, y: jax.Array, name: str) -> jax.Array:
            y = normed(y, name)
            y = y if cfg.residual_multiplier == 1 else y * jnp.asarray(cfg.residual_multiplier, y.dtype)
            return constrain(x + y, *hidden_axes(x.shape[1]))

        y, kv = Attention(cfg, self.kept_dtype, name="self_attn")(normed(x, before), cache, inputs, output_start)
        x, _ = from_column(x, inputs.packing, output_start)
        x = added(x, y, after)
        return added(x, self.feed_forward(cfg, name="mlp")(normed(x, before_mlp)), after_mlp), kv
