"""Linen modules of the decoder. Weights are named and shaped as in the checkpoint: (out, in)."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sva.models.cache import KV, Rounded, kept, write
from sva.models.config import ModelConfig
from sva.models.packing import Packing, pack, unpack
from sva.parallel.sharding import constrain, hidden_axes
from sva.utils.matmul import Int8, dot, dots

_MASKED = -1e30  # finite: a row that may see nothing gives a mean of the values, never NaN
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


class Scaling(NamedTuple):
    """What becomes of the products of queries and keys before the softmax; hashable, so static."""

    factor: float
    cap: float | None = None

    def __call__(self, scores: jax.Array) -> jax.Array:
        """factor * scores, or cap * tanh(factor * scores / cap)."""
        if self.cap is None:
            return scores * self.factor
        return self.cap * jnp.tanh(scores * (self.factor / self.cap))


def attend(q: jax.Array, segments: Sequence[KV], mask: jax.Array, scaling: Scaling | None = None) -> jax.Array:
    """Grouped-query attention over several segments as over one, softmax in float32.

    Args:
      q: [B, T, N, H].
      segments: keys and values of S_i slots and P_i rows each, the heads a multiple of their K; row b reads row
        b // (B / P_i) of a segment, and its rows' queries are one matrix product with it. In q's dtype, or in a
        narrower one (or `Rounded`) that is widened to it.
      mask: [B, T, S] bool over all segments' slots one after another, True where a query may look.
      scaling: of the scores; None: by H ** -0.5.
    Returns:
      [B, T, N * H].
    """
    batch, length, heads, width = q.shape
    kv_heads = _numbers(segments[0].v).shape[1]
    groups, scaling = heads // kv_heads, scaling or Scaling(width**-0.5)
    if batch == length == 1:
        once = q[0, 0].reshape(kv_heads, groups, width)
        return _attend_once(once, segments, mask[0, 0], scaling).reshape(1, 1, -1)
    # A key/value head's queries of all groups and positions are the rows of one matrix.
    q = q.reshape(batch, length, kv_heads, groups, width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, groups * length, width)
    attend_all = _attend_by_segment if length > 1 and len(segments) > 1 else _attend_at_once
    out = attend_all(q, segments, mask, scaling)
    out = out.reshape(batch, kv_heads, groups, length, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads * width)


def _attend_at_once(q: jax.Array, segments: Sequence[KV], mask: jax.Array, scaling: Scaling) -> jax.Array:
    """[B, K, M, H] of queries [B, K, M = groups * T, H]: one softmax over the scores of all segments."""
    batch, kv_heads, queries, _ = q.shape
    scores = jnp.concatenate([_spread(_scores(q, segment), batch) for segment in segments], axis=-1)
    scores = scores.reshape(batch, kv_heads, -1, mask.shape[1], scores.shape[-1])
    scores = jnp.where(mask[:, None, None, :, :], scaling(scores), _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype).reshape(batch, kv_heads, queries, -1)
    out = jnp.zeros((), q.dtype)
    for piece, segment in zip(_by_segment(weights, segments), segments, strict=True):
        out += _spread(_weighted(_gather(piece, _numbers(segment.v).shape[0]), segment), batch)
    return out


def _attend_by_segment(q: jax.Array, segments: Sequence[KV], mask: jax.Array, scaling: Scaling) -> jax.Array:
    """As `_attend_at_once`, every segment's softmax by itself, weighted afterwards by its share of the whole sum.

    For many queries: scores, the largest arrays by far, stay as the products make them and are never copied.
    """
    batch, kv_heads, _, _ = q.shape
    length = mask.shape[1]
    tops, sums, outs = [], [], []
    for segment, sees in zip(segments, _by_segment(mask, segments), strict=True):
        rows, _, slots, _ = _numbers(segment.v).shape
        scores = _scores(q, segment)
        shape = scores.shape
        scores = scores.reshape(rows, kv_heads, batch // rows, -1, length, slots)
        sees = sees.reshape(rows, 1, batch // rows, 1, length, slots)
        scores = jnp.where(sees, scaling(scores), _MASKED)
        top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))  # what comes out does not depend on it
        weights = jnp.exp(scores - top)
        whole = jnp.sum(weights, axis=-1, keepdims=True)
        out = _weighted(weights.astype(q.dtype).reshape(shape), segment)
        outs.append(_spread(out.astype(jnp.float32), batch))
        for found, x in ((tops, top), (sums, whole)):
            found.append(_spread(x.reshape(*shape[:-1], 1), batch))
    best = functools.reduce(jnp.maximum, tops)
    shares = [jnp.exp(top - best) for top in tops]
    total = functools.reduce(jnp.add, (share * whole for share, whole in zip(shares, sums, strict=True)))
    out = functools.reduce(jnp.add, (share / total * out for share, out in zip(shares, outs, strict=True)))
    return out.astype(q.dtype)


def _scores(q: jax.Array, segment: KV) -> jax.Array:
    """[P, K, B / P * M, S] products of queries [B, K, M, H] with a segment's keys, float32."""
    k = _numbers(segment.k).astype(q.dtype)
    queries = _gather(q, len(k))
    if segment.in_blocks:
        each = jnp.broadcast_to(queries[:, :, None], (*k.shape[:3], *queries.shape[2:]))
        scores = _product("PKNMH,PKNHW->PKNMW", each, k, preferred_element_type=jnp.float32)
        scores = scores.swapaxes(2, 3).reshape(*queries.shape[:3], -1)
    else:
        scores = _product("PKMH,PKHS->PKMS", queries, k, preferred_element_type=jnp.float32)
    scale = _scale(segment.k)
    return scores if scale is None else scores * scale


def _weighted(weights: jax.Array, segment: KV) -> jax.Array:
    """[P, K, M, H] sums of a segment's values with weights [P, K, M, S]."""
    scale = _scale(segment.v)
    weights = weights if scale is None else (weights * scale).astype(weights.dtype)
    return _product("PKMS,PKSH->PKMH", weights, _numbers(segment.v).astype(weights.dtype))


def _numbers(x: Any) -> jax.Array:
    """The numbers of keys or values, without their scales where they are `Rounded`."""
    return x.q if isinstance(x, Rounded) else x


def _scale(x: Any) -> jax.Array | None:
    """[P, K, 1, S] scales of keys or values that are `Rounded`, else None."""
    return x.scale.reshape(*x.scale.shape[:2], 1, -1) if isinstance(x, Rounded) else None


def _by_segment(x: jax.Array, segments: Sequence[KV]) -> list[jax.Array]:
    """[..., S] over all segments' slots, split into the segments'."""
    return jnp.split(x, np.cumsum([_numbers(segment.v).shape[2] for segment in segments])[:-1], axis=-1)


def _product(spec: str, x: jax.Array, y: jax.Array, **settings: Any) -> jax.Array:
    """`einsum`; float32 means float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(spec, x, y, precision=precision, **settings)


def _gather(x: jax.Array, rows: int) -> jax.Array:
    """[B, K, M, X] as [P, K, B / P * M, X] for a segment of P rows."""
    batch, heads = x.shape[:2]
    if rows == batch:
        return x
    x = x.reshape(rows, batch // rows, *x.shape[1:]).swapaxes(1, 2)
    return x.reshape(rows, heads, -1, x.shape[-1])


def _spread(x: jax.Array, batch: int) -> jax.Array:
    """[B, K, M, X] of [P, K, B / P * M, X]: `_gather` undone."""
    rows, heads, _, width = x.shape
    if rows == batch:
        return x
    x = x.reshape(rows, heads, batch // rows, -1, width).swapaxes(1, 2)
    return x.reshape(batch, heads, -1, width)


def _attend_once(q: jax.Array, segments: Sequence[KV], mask: jax.Array, scaling: Scaling) -> jax.Array:
    """[K, G, H] of one query q [K, G, H] of one row over segments of one row, mask [S]; as sums.

    Of matrix products over one row XLA's CPU compiler drops the row's axis, and then copies the cache, four times a
    layer, to write to it.
    """

    def score(segment: KV) -> jax.Array:
        query = q[:, :, None, :, None] if segment.in_blocks else q[:, :, :, None]
        found = jnp.sum(query.astype(jnp.float32) * _numbers(segment.k)[0][:, None].astype(jnp.float32), axis=-2)
        found = found.reshape(*q.shape[:2], -1)
        return found if (scale := _scale(segment.k)) is None else found * scale[0]

    def weighted(weights: jax.Array, segment: KV) -> jax.Array:
        weights = weights if (scale := _scale(segment.v)) is None else weights * scale[0]
        return jnp.sum(
            weights[:, :, :, None].astype(jnp.float32) * _numbers(segment.v)[0][:, None].astype(jnp.float32), axis=2
        )

    scores = scaling(jnp.concatenate([score(segment) for segment in segments], axis=-1))
    weights = jax.nn.softmax(jnp.where(mask[None, None, :], scores, _MASKED), axis=-1).astype(q.dtype)
    out = [weighted(piece, segment) for piece, segment in zip(_by_segment(weights, segments), segments, strict=True)]
    return sum(out[1:], out[0]).astype(q.dtype)


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
