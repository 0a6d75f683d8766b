"""Which singular components a set of experts needs, what the others would have changed, and the form that follows.

An expert changes W by U diag(s (z - 1)) V^T. Where the delta form keeps k components, the part of the change that it
leaves out has spectral norm max abs(s (z - 1)) over the components left out, as U and V are orthonormal: known before
anything is served. A mixture sum_e alpha_e (z_e - 1) loses at most sum_e abs(alpha_e) times what expert e loses.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sva.spectral.cost import Form, cheapest, multiply_adds
from sva.spectral.forms import Spectrum, require_vector
from sva.utils.errors import UserError


@dataclass(frozen=True)
class Plan:
    """How one matrix is served for a set of E experts."""

    form: Form  # "factored", or "delta" on `components`
    components: np.ndarray  # [k] int, ascending, what the tolerance needs or more, up to a bucket
    losses: np.ndarray  # [E] spectral norm of what the delta form leaves out of each expert's change of W
    s_max: float  # the matrix's largest singular value
    token_bytes: Mapping[Form, int]  # predicted bytes of this matrix read for a token decoded at batch 1, by form

    @property
    def extra_bytes(self) -> int:
        """Bytes a decoded token beyond what one merged weight would read."""
        return self.token_bytes[self.form] - self.token_bytes["dense"]

    def bound(self, alphas: Any) -> np.ndarray:
        """[...] bound on the spectral norm of what this plan leaves out of the mixtures alphas [..., E].

        0 in the factored form; of one expert alone attained, up to the rounding of U and V.
        """
        lost = np.abs(np.asarray(alphas, np.float64)) @ self.losses
        return lost if self.form == "delta" else np.zeros_like(lost)


def plan(
    spectra: Mapping[str, Spectrum],
    zs: Sequence[Mapping[str, Any]],
    tolerance: float,
    *,
    exact_base: bool = False,
    kind: Callable[[str], Hashable] = str,
) -> dict[str, Plan]:
    """The form of every matrix for these experts, by predicted bytes a decoded token (`cost.cheapest`).

    The delta form keeps the components that an expert moves by more than the tolerance, abs(s (z - 1)) > tolerance *
    s_max, and then the next most moved ones, to fill a bucket: another expert that needs as many meets the same shapes.

    Args:
      spectra: of the matrices.
      zs: E effective z, each {name: [R]}; a matrix that an expert leaves out counts as ones.
      tolerance: relative to each matrix's largest singular value; 0 drops nothing that moves.
      exact_base: rows of the base must be the base bit for bit; then every matrix takes the delta form.
      kind: names of one kind share form and k, as layers that are stacked must; by default each is its own.
    Raises:
      UserError: a tolerance that no number of components meets, or a z that is not a vector.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise UserError(f"tolerance={tolerance} is met by no number of components; use 0 (exact) or a little more")
    for z in zs:
        for name, x in z.items():
            require_vector(name, x)
    moves = {name: _moves(spectrum, [z.get(name) for z in zs]) for name, spectrum in spectra.items()}
    needed: dict[Hashable, int] = {}
    for name, moved in moves.items():
        count = int((moved > tolerance * float(np.max(spectra[name].s))).any(axis=0).sum())
        needed[kind(name)] = max(needed.get(kind(name), 0), count)
    return {
        name: _plan(spectra[name], moved, bucket(needed[kind(name)], moved.shape[1]), exact_base)
        for name, moved in moves.items()
    }


def bucket(components: int, rank: int) -> int:
    """The smallest bucket that holds them: 0, 8, 12, 16, 24, 32, 48, 64, 96, 128, ..., at most `rank`."""
    if components == 0:
        return 0
    power = 1 << max(components - 1, 1).bit_length()  # no less than `components`
    return min(max(8, power if components > power * 3 // 4 else power * 3 // 4), rank)


def summary(plans: Mapping[str, Plan], met: Callable[[str], float] = lambda name: 1) -> str:
    """One line: how many matrices take which form, k, bytes a token and the largest relative loss of an expert.

    `met` is the share of tokens that read a matrix: all, where it is not in a module of a mixture.
    """
    sizes = [len(x.components) for x in plans.values() if x.form == "delta"]
    parts = [f"{len(plans) - len(sizes)} of {len(plans)} matrices factored"]
    if sizes:
        lost = max(x.losses.max(initial=0) / x.s_max for x in plans.values() if x.form == "delta" and x.s_max)
        parts.append(f"{len(sizes)} dense + delta, k {int(np.median(sizes))} (at most {max(sizes)})")
        parts.append(f"an expert's change loses at most {lost:.1e} of the largest singular value")
    read, dense = (
        sum(met(name) * x.token_bytes[form or x.form] for name, x in plans.items()) for form in (None, "dense")
    )
    return "; ".join([*parts, f"they read {read / dense:.2f} times the bytes a token of merged ones"])


def _moves(spectrum: Spectrum, zs: Sequence[Any]) -> np.ndarray:
    """[E, R] float64 abs(s (z - 1))."""
    s = np.asarray(spectrum.s, np.float64)
    rows = [np.zeros_like(s) if z is None else np.abs(s * (np.asarray(z, np.float64) - 1)) for z in zs]
    return np.stack(rows) if rows else np.zeros((0, len(s)))


def _plan(spectrum: Spectrum, moved: np.ndarray, k: int, exact_base: bool) -> Plan:
    order = np.argsort(-moved.max(axis=0, initial=0), kind="stable")
    size = np.dtype(spectrum.u.dtype).itemsize
    forms: tuple[Form, ...] = ("dense", "factored", "delta")
    return Plan(
        form=cheapest(spectrum, "exact_base" if exact_base else "rows", moved=k),
        components=np.sort(order[:k]),
        losses=moved[:, order[k:]].max(axis=1, initial=0),
        s_max=float(np.max(spectrum.s)),
        token_bytes={form: size * multiply_adds(spectrum, form, k) for form in forms},
    )
