"""Parametrisations: what an expert stores for a matrix, and the effective z that it stands for.

Each member is a pair of pure functions over one matrix; they act on the last axis, so stacked matrices [L, R] work
as well. Inference only ever sees the effective z.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sva.errors import UserError


class Family(NamedTuple):
    """One parametrisation. Raw values are trained; both functions take the singular values s [..., R]."""

    name: str
    init: Callable[[jax.Array], jax.Array]  # s -> raw [..., R] float32, where z is 1
    z: Callable[[jax.Array, jax.Array], jax.Array]  # raw, s -> effective z [..., R] float32


def _linear_init(s: jax.Array) -> jax.Array:
    return jnp.ones(s.shape, jnp.float32)


def _linear_z(raw: jax.Array, s: jax.Array) -> jax.Array:
    del s
    return raw.astype(jnp.float32)


def _sigmoid_nuclear_init(s: jax.Array) -> jax.Array:
    return jnp.full(s.shape, 0.1, jnp.float32)


def _sigmoid_nuclear_z(raw: jax.Array, s: jax.Array) -> jax.Array:
    gate = jax.nn.sigmoid(raw.astype(jnp.float32))
    s = s.astype(jnp.float32)
    weighted = jnp.sum(s * gate, axis=-1, keepdims=True)
    total = jnp.sum(s, axis=-1, keepdims=True)
    # A matrix of zeros has no nuclear norm to keep: z is then the gate itself, and finite.
    return gate * jnp.where(total > 0, total / jnp.where(total > 0, weighted, 1.0), 1.0)


LINEAR = Family("linear", _linear_init, _linear_z)
"""z itself is trained, from ones: the paper's formula (arXiv 2501.06252, section 3.1)."""

SIGMOID_NUCLEAR = Family("sigmoid_nuclear", _sigmoid_nuclear_init, _sigmoid_nuclear_z)
"""z = c sigmoid(p), c = sum(s) / sum(s sigmoid(p)): the public code, whose rescaling keeps the nuclear norm.

c is differentiated through, so any constant p is the identity and the gradient along "all of z" is zero.
Deviation: the public code draws p ~ N(0.1, 0.01^2) and so starts near the base; here p starts at 0.1, at the base.
"""

FAMILIES = {family.name: family for family in (LINEAR, SIGMOID_NUCLEAR)}


def family(name: str) -> Family:
    """The parametrisation of that name.

    Raises:
      UserError: no such parametrisation; the message lists them.
    """
    if name not in FAMILIES:
        raise UserError(f"unknown parametrisation {name!r}: it is one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
