"""Attention of queries over segments of keys and values."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sva.models.cache import KV, Rounded

_MASKED = -1e30  # finite: a row that may see nothing gives a mean of the values, never NaN


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
