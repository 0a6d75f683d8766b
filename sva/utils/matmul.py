"""x w^T, the product of every layer: the one place that knows which order of it a machine runs fastest.

A weight is a float array, or `Int8`. The orders differ in rounding alone; experiments/benchmarks/decode measures them.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

_FEW_ROWS = 256
_ONE_CORE = 1 << 19  # weights
_MIN_LANES = 8
_LIMB = 128


@struct.dataclass
class Int8:
    """A weight [D_out, D_in] as int8 numbers and one float32 scale a row: w = q * scale[:, None]."""

    q: jax.Array  # [D_out, D_in] int8, -127 to 127
    scale: jax.Array  # [D_out] float32, of the largest value of each row / 127

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.q.shape

    def take(self, rows: jax.Array, dtype: Any) -> jax.Array:
        """[..., D_in] of rows [...], as floats."""
        return (self.q[rows].astype(jnp.float32) * self.scale[rows][..., None]).astype(dtype)


def quantise_weight(w: Any) -> Int8:
    """The nearest int8 weight of w [..., D_out, D_in]: off by half a step at most, 1/254 of each row's largest."""
    w = jnp.asarray(w, jnp.float32)
    scale = jnp.max(jnp.abs(w), axis=-1) / 127
    q = jnp.round(w / jnp.where(scale == 0, 1, scale)[..., None])
    return Int8(q.astype(jnp.int8), scale)


def floats(w: Any, dtype: Any) -> jax.Array:
    """[..., D_out, D_in], the floats that an Int8 weight stands for; an array passes through."""
    return (w.q.astype(jnp.float32) * w.scale[..., None]).astype(dtype) if isinstance(w, Int8) else w


def dot(x: jax.Array, w: Any) -> jax.Array:
    """x w^T over the last axes. float32 means float32: no bfloat16 passes where the hardware would use them.

    Args:
      x: [..., D_in].
      w: [D_out, D_in]; floats of x's dtype, or Int8, which stays int8 in memory while it is read.
    Returns:
      [..., D_out] in x's dtype.
    """
    if isinstance(w, Int8):
        y = _int8(x.reshape(-1, x.shape[-1]).astype(jnp.float32), w.q) * w.scale[None, :]
        return y.reshape(*x.shape[:-1], w.shape[0]).astype(x.dtype)
    if x.size == x.shape[-1] and w.dtype.itemsize < 4 and _lanes(w):
        return _narrow(x, w)
    return _dense(x, w)


def dots(x: jax.Array, ws: Sequence[Any]) -> list[jax.Array]:
    """x w^T of each of these weights of one width: a product for each, but for one row of float32 on a CPU.

    There small weights are one product: of a vector with fewer than about half a million weights XLA's runs on one
    core. What joins them does not change from step to step, so that XLA does it before a loop of decoding.
    """
    one_row = x.size == x.shape[-1] and len(ws) > 1
    if one_row and all(not isinstance(w, Int8) and w.dtype == jnp.float32 and w.size < _ONE_CORE for w in ws):
        return jax.lax.platform_dependent(x, *ws, cpu=_joined, default=_apart)
    return _apart(x, *ws)


def _apart(x: jax.Array, *ws: Any) -> list[jax.Array]:
    return [dot(x, w) for w in ws]


def _joined(x: jax.Array, *ws: jax.Array) -> list[jax.Array]:
    return jnp.split(dot(x, jnp.concatenate(ws)), np.cumsum([len(w) for w in ws])[:-1], axis=-1)


def _dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """A matrix product.

    For a few rows of x XLA's CPU product is faster with the weight as its left operand; for many the other way round,
    which has no result to turn.
    """
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    if x.size > _FEW_ROWS * x.shape[-1]:
        return jax.lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())), precision=precision)
    rows = x if x.ndim > 2 else x[:, None]  # of a matrix XLA would turn it round again
    y = jax.lax.dot_general(w, rows, (((1,), (rows.ndim - 1,)), ((), ())), precision=precision)
    return jnp.moveaxis(y, 0, -1).reshape(*x.shape[:-1], w.shape[0])


@jax.custom_vjp
def _narrow(x: jax.Array, w: jax.Array) -> jax.Array:
    """The product of one row with a weight of fewer than four bytes a number."""
    return jax.lax.platform_dependent(x, w, cpu=_one_row, default=_dense)


def _narrow_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _narrow(x, w), (x, w)


def _narrow_backward(given: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(_dense, *given)[1](g)


_narrow.defvjp(_narrow_forward, _narrow_backward)


@jax.jit
def _one_row(x: jax.Array, w: jax.Array) -> jax.Array:
    """The product of one row, bound by how fast w is read: sums in lanes side by side, then across the lanes.

    A sum of slices written out is one elementwise loop, which converts w as it reads it and which all cores share.
    XLA's CPU vector product reads bfloat16 and int8 at a thirtieth of this rate, as of jaxlib 0.10; a reduction it
    would fuse with its neighbours. float32 it reads as fast as this does. Jitted by itself, so that it is traced and
    lowered once a shape.
    """
    out, into = w.shape
    lanes = _lanes(w)
    # One barrier for both: XLA would move what is done to w alone, a float copy of each slice, out of a decode loop.
    x, w = jax.lax.optimization_barrier((x, w))
    if w.dtype == jnp.bfloat16:  # of which XLA's CPU compiler would take slices only after converting all of it
        w = jax.lax.bitcast_convert_type(w, jnp.uint16)
    parts, weights = x.astype(jnp.float32).reshape(into // lanes, lanes), w.reshape(out, into // lanes, lanes)
    sums = jnp.zeros((), jnp.float32)
    for term in range(into // lanes):
        sums = sums + _widened(weights[:, term]) * parts[term][None]
    sums = jax.lax.optimization_barrier(sums)
    y = jnp.matmul(sums, jnp.ones((lanes, 1), jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return y.reshape(*x.shape[:-1], out).astype(x.dtype)


def _widened(w: jax.Array) -> jax.Array:
    """In float32; uint16 are the bits of bfloat16."""
    if w.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(w.astype(jnp.uint32) << 16, jnp.float32)
    return w.astype(jnp.float32)


def _lanes(w: jax.Array) -> int:
    """Lanes of `_one_row`, a power of two: the most that leave 16 terms, 0 if too few.

    Of bfloat16, 8 terms: its bits, read for more than 15 slices, XLA's CPU compiler would write to memory first.
    """
    into, lanes, terms = w.shape[1], 1, 8 if w.dtype == jnp.bfloat16 else 16
    while into % (2 * lanes) == 0 and into // (2 * lanes) >= terms:
        lanes *= 2
    return lanes if lanes >= _MIN_LANES else 0


@jax.custom_vjp
def _int8(x: jax.Array, q: jax.Array) -> jax.Array:
    """x q^T [rows, D_out] of x [rows, D_in] float32; elsewhere than on a CPU q is converted inside the product."""
    return jax.lax.platform_dependent(x, q, cpu=_int8_cpu, default=_converted)


def _converted(x: jax.Array, q: jax.Array) -> jax.Array:
    return _dense(x, q.astype(jnp.float32))


def _int8_forward(x: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _int8(x, q), q


def _int8_backward(q: jax.Array, g: jax.Array) -> tuple[jax.Array, None]:
    return _dense(g, q.astype(jnp.float32).T), None


_int8.defvjp(_int8_forward, _int8_backward)


def _int8_cpu(x: jax.Array, q: jax.Array) -> jax.Array:
    """As `_converted`, where no product reads int8 and float together.

    Up to 256 rows go through the integer product: x, rounded to 1/16256 of its row's largest value, is two int8
    numbers a value, and the sums are exact. For more rows, converting q costs little beside the product.
    """
    if len(x) == 1 and _lanes(q):
        return _one_row(x, q)
    if len(x) > _FEW_ROWS:
        return _converted(x, q)
    step = jnp.max(jnp.abs(x), axis=1, keepdims=True) / (127 * _LIMB)
    whole = jnp.round(x / jnp.where(step == 0, 1, step))
    high = jnp.round(whole / _LIMB)
    limbs = jnp.concatenate([high, whole - _LIMB * high]).astype(jnp.int8)
    sums = jax.lax.dot_general(limbs, q, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    high, low = jnp.split(sums.astype(jnp.float32), 2)
    return (high * _LIMB + low) * step
