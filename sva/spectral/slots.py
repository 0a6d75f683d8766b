"""The static bank of experts of one matrix, in the form that it is served in.

A bank has E_max slots; slot 0 is the base and adds nothing. Every row of a batch carries alphas [E_max] and gets its
own mixture, 1 + sum_e alpha_e (z_e - 1), as an adapter. Other experts in the slots, or other alphas, change no shape.
With alphas [M, E_max] each of M matrices is mixed in its own proportions.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sva.parallel.sharding import constrain
from sva.spectral.expert import mix_rows
from sva.spectral.forms import Delta, Factored, Spectrum, delta, times
from sva.spectral.truncate import Plan


@struct.dataclass
class FactoredSlots:
    """Mixtures run as `Factored`."""

    spectrum: Spectrum
    z: jax.Array  # [E_max, R]; ones in slot 0
    place: jax.Array | None = None  # [] int32, the matrix's number among M

    def mix(self, alphas: jax.Array) -> Factored:
        """The adapter of B rows with alphas [B, E_max] or [B, M, E_max]."""
        return Factored(self.spectrum, _divided(mix_rows(self.z, _own(alphas, self.place))))

    @property
    def table(self) -> jax.Array:
        """What is mixed, one row a slot."""
        return self.z


@struct.dataclass
class DeltaSlots:
    """Mixtures run as `Delta` on k components; a row that mixes nothing in is the base bit for bit."""

    experts: Delta  # d [E_max, k]; zeros in slot 0
    place: jax.Array | None = None  # [] int32, the matrix's number among M

    def mix(self, alphas: jax.Array) -> Delta:
        """The adapter of B rows with alphas [B, E_max] or [B, M, E_max]."""
        d = jnp.matmul(_own(alphas, self.place), self.experts.d, precision=jax.lax.Precision.HIGHEST)
        return Delta(self.experts.u, self.experts.vt, _divided(d))

    @property
    def table(self) -> jax.Array:
        """What is mixed, one row a slot."""
        return self.experts.d


@struct.dataclass
class RescaledSlots:
    """Mixtures as Transformer-Squared's public code has them, for parity with its tables; run as `Factored`.

    m = sum_e alpha_e p_e of raw values, without a sigmoid, and z = `rescaled(m)`.
    """

    spectrum: Spectrum
    p: jax.Array  # [E_max, R] raw values; zeros in slot 0
    place: jax.Array | None = None  # [] int32, the matrix's number among M

    def mix(self, alphas: jax.Array) -> Factored:
        """The adapter of B rows with alphas [B, E_max] or [B, M, E_max]."""
        m = jnp.matmul(_own(alphas, self.place), self.p, precision=jax.lax.Precision.HIGHEST)
        return Factored(self.spectrum, _divided(rescaled(m, self.spectrum.s)))

    @property
    def table(self) -> jax.Array:
        """What is mixed, one row a slot."""
        return self.p


Slots = FactoredSlots | DeltaSlots | RescaledSlots


def rescaled(m: jax.Array, s: jax.Array) -> jax.Array:
    """Effective z [..., R] = m sum(s) / sum(s m), which keeps the nuclear norm.

    Deviation from the public code, which divides by whatever it is: an m that adds up to nothing is the base.
    """
    total, weighted = jnp.sum(s), jnp.sum(times(s, m), axis=-1, keepdims=True)
    is_something = jnp.abs(weighted) > 1e-6 * total
    return jnp.where(is_something, m * (total / jnp.where(is_something, weighted, 1)), 1)


def _own(alphas: jax.Array, place: jax.Array | None) -> jax.Array:
    """[B, E_max], one matrix's of alphas [B, M, E_max]; those that are for all matrices as they are."""
    return alphas if alphas.ndim == 2 else alphas[:, place]


def _divided(mixtures: jax.Array) -> jax.Array:
    """[B, R], divided over the components as the factors are.

    Divided over the rows, as a batch is, or not at all, it would make every step of decoding bring the factors whole to
    each device (3.6 GB a token and chip for Llama-3-8B on sixteen).
    """
    return constrain(mixtures, "rows", "rank")


def slots(
    spectra: Mapping[str, Spectrum], bank: Mapping[str, jax.Array], plans: Mapping[str, Plan]
) -> dict[str, Slots]:
    """The banks {name: [E_max, R]} of `sva.bank` in the form that each matrix's plan names, numbered in their order."""
    return {
        name: FactoredSlots(spectra[name], z, jnp.asarray(place, jnp.int32))
        if plans[name].form == "factored"
        else DeltaSlots(delta(spectra[name], z, plans[name].components), jnp.asarray(place, jnp.int32))
        for place, (name, z) in enumerate(bank.items())
    }


def mixture(bank: Any, alphas: jax.Array) -> Any:
    """The adapter in which row b runs on 1 + sum_e alphas[b, e] (z_e - 1).

    Args:
      bank: a tree of `Slots`; those of stacked layers carry them on axis 0.
      alphas: [B, E_max], or [B, M, E_max] for the M matrices of the bank in the order that `slots` was given them.
    """

    def one(slots: Slots) -> Any:
        is_stacked = slots.table.ndim == 3
        return jax.vmap(lambda layer: layer.mix(alphas))(slots) if is_stacked else slots.mix(alphas)

    return jax.tree.map(one, bank, is_leaf=lambda x: isinstance(x, Slots))
