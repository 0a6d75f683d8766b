"""Mixtures of experts around the base, z' = 1 + sum_k alpha_k (z_k - 1), and the static bank that batches mix from.

A bank has E_max slots; slot 0 is the base and adds nothing. Every row of a batch carries alphas [E_max] and gets its
own mixture as an adapter. Other experts in the slots, or other alphas, change no shape. With alphas [M, E_max] each of
M matrices is mixed in its own proportions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sva.parallel.sharding import constrain
from sva.spectral.expert import check_vectors
from sva.spectral.forms import Delta, Factored, Spectrum, delta, require_vector, times
from sva.spectral.serving_plan import Plan
from sva.utils.errors import UserError


def mix(zs: Sequence[Mapping[str, jax.Array]], alphas: Any) -> dict[str, jax.Array]:
    """One z around the base: z' = 1 + sum_k alpha_k (z_k - 1).

    Transformer-Squared (arXiv 2501.06252), section 3.2, mixes sum_k alpha_k z_k; the two are equal where the alphas
    add to 1, and this one stays at the base where they are 0. A weight that an expert leaves out counts as ones.

    Args:
      zs: E effective z, each {name: [R]}.
      alphas: [E], or {name: [E]} for a mixture of its own for each matrix.
    Returns:
      {name: [R]} over the names of all experts.
    Raises:
      UserError: not one alpha for each expert, or none at all for a weight.
    """
    names = list(dict.fromkeys(name for z in zs for name in z))
    mixed = {}
    for name in names:
        if isinstance(alphas, Mapping) and name not in alphas:
            raise UserError(f"{name}: an expert adapts it, and the alphas, one row a matrix, have none for it")
        weights = jnp.asarray(alphas[name] if isinstance(alphas, Mapping) else alphas, jnp.float32)
        if weights.shape != (len(zs),):
            raise UserError(f"{name}: {len(zs)} experts need {len(zs)} alphas, got shape {weights.shape}")
        present = [(k, z[name]) for k, z in enumerate(zs) if name in z]
        for _, z in present:
            require_vector(name, z)
        mixed[name] = 1 + sum(weights[k] * (jnp.asarray(z) - 1) for k, z in present)
    return mixed


def bank(zs: Sequence[Mapping[str, jax.Array]], spectra: Mapping[str, Spectrum], slots: int) -> dict[str, jax.Array]:
    """The static bank {name: [slots, R] float32} over all `spectra`: slot 0 and every unused slot are the base.

    Expert k of `zs` lies in slot k + 1. Adding, dropping or replacing one keeps all shapes, so nothing recompiles.

    Raises:
      UserError: more experts than slots; a z of a weight that is not among the spectra, or of another length.
    """
    if len(zs) >= slots:
        raise UserError(f"{len(zs)} experts need {len(zs) + 1} slots, the bank has {slots}")
    for z in zs:
        check_vectors(z, spectra)
    table = {}
    for name, spectrum in spectra.items():
        rows = np.ones((slots, np.shape(spectrum.s)[-1]), np.float32)
        for slot, z in enumerate(zs, start=1):
            if name in z:
                rows[slot] = np.asarray(z[name])
        table[name] = jnp.asarray(rows)
    return table


def mix_rows(bank_rows: jax.Array, alphas: jax.Array) -> jax.Array:
    """A mixture for each row of a batch, out of one matrix's bank.

    Args:
      bank_rows: [E_max, R].
      alphas: [B, E_max]; slot 0 adds nothing.
    Returns:
      [B, R] = 1 + alphas (bank - 1).
    """
    chex.assert_rank([bank_rows, alphas], 2)  # alphas of one row would be mixed without a word
    chex.assert_equal(alphas.shape[1], len(bank_rows))
    return 1 + jnp.matmul(alphas, bank_rows - 1, precision=jax.lax.Precision.HIGHEST)


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
      bank: a tree of `Slots`; those of stacked layers or modules carry them on their first axes.
      alphas: [B, E_max], or [B, M, E_max] for the M matrices of the bank in the order that `slots` was given them.
    """
    chex.assert_rank(alphas, {2, 3})

    def one(slots: Slots) -> Any:
        return jax.vmap(one)(slots) if slots.table.ndim > 2 else slots.mix(alphas)

    return jax.tree.map(one, bank, is_leaf=lambda x: isinstance(x, Slots))
