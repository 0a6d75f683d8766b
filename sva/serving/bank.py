"""The experts of a running server: by name, each in a slot of the arrays that rows mix from.

An expert that comes or goes changes numbers in these arrays and no shape. The slot of a dropped expert is given away
only when no answer uses it any more, so that nothing changes under a request at work.
"""

import dataclasses
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sva.generation.decompose import spectra_of
from sva.generation.lm import LM
from sva.generation.merge import nested_slots, shared_form
from sva.spectral import serving_plan
from sva.spectral.expert import Expert, require_mixable
from sva.spectral.mixing import bank, mix
from sva.utils.errors import UserError

BASE, ADAPTIVE = "base", "adaptive"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class NoExpert(UserError):
    """A name that no loaded expert has."""


class NoWeight(UserError):
    """A weight that no expert of this bank can adapt."""


class BankFull(UserError):
    """Every slot is taken."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One loaded expert."""

    name: str
    slot: int
    label: str
    description: str
    digest: str
    about: Mapping[str, Any]  # how it came about, JSON values
    z: Mapping[str, np.ndarray] = dataclasses.field(repr=False)


class Held(NamedTuple):
    """A mixture whose slots stay as they are until it is given back."""

    alphas: np.ndarray  # [E_max] float32
    slots: tuple[int, ...]
    weights: Mapping[str, float]  # of the experts by name, those that are not 0


def check_name(name: str, base: str) -> None:
    """Raises UserError for a name that no expert may have."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"{name!r} cannot be an expert's name; use letters, digits, dot, dash and underscore, 64 at most"
        )
    if name in (BASE, ADAPTIVE, base):
        raise UserError(f"{name!r} is the name of another model here; choose another name for the expert")


class Bank:
    """Named experts in the slots of one static bank, every matrix factored.

    `put` and `drop` are for the thread that owns JAX, everything else for any.
    """

    def __init__(self, lm: LM, base: str, names: tuple[str, ...], experts: int, *, progress: bool = True) -> None:
        """An empty bank over the matrices of these names, with room for so many experts."""
        spectra = spectra_of(lm, names, progress=progress)
        self._s = {name: np.asarray(spectra[name].s, np.float32) for name in names}  # on the host, for any thread
        moved = {name: np.full_like(s, 2.0) for name, s in self._s.items()}
        # The form for experts that move every component, so that any expert fits it exactly.
        plans = serving_plan.plan(spectra, [moved], 0.0, kind=lambda name: shared_form(lm.model, name))
        self.size = experts + 1
        self.tree = nested_slots(lm.model, spectra, bank([], spectra, self.size), plans)
        self.names = names
        self._lm, self._base, self._spectra = lm, base, spectra
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._uses = [0] * self.size
        self.version = 0  # grows with every change of the experts

    @property
    def numbers(self) -> int:
        """How many numbers the z of one expert has at most."""
        return sum(self.ranks.values())

    @property
    def ranks(self) -> dict[str, int]:
        """{weight name: R, the singular values of its matrix}."""
        return {name: len(s) for name, s in self._s.items()}

    @property
    def entries(self) -> list[Entry]:
        """The loaded experts, in the order they came."""
        with self._lock:
            return list(self._entries.values())

    def uses(self, entry: Entry) -> int:
        """How many answers at work or waiting use the expert's slot."""
        return self._uses[entry.slot]

    def hold(self, weights: Mapping[str, float]) -> Held:
        """The mixture of experts by name, held until `release`.

        Raises:
          NoExpert: a name that is not loaded.
        """
        with self._lock:
            for name in weights:
                self._require(name)
            alphas = np.zeros(self.size, np.float32)
            for name, weight in weights.items():
                alphas[self._entries[name].slot] = weight
            slots = tuple(np.flatnonzero(alphas).tolist())
            for slot in slots:
                self._uses[slot] += 1
            return Held(alphas, slots, {name: weight for name, weight in weights.items() if weight})

    def hold_all(self, mixtures: Sequence[Mapping[str, float]]) -> list[Held]:
        """`hold` of each, or of none where one names an expert that is not loaded."""
        found: list[Held] = []
        try:
            for weights in mixtures:
                found.append(self.hold(weights))
        except NoExpert:
            for held in found:
                self.release(held)
            raise
        return found

    def release(self, held: Held) -> None:
        """Gives a mixture back, once for each `hold`."""
        with self._lock:
            for slot in held.slots:
                self._uses[slot] -= 1

    def effective(self, expert: Expert) -> dict[str, np.ndarray]:
        """The z of an expert for this bank, host arrays; for the thread that owns JAX.

        Raises:
          UserError: another base, a parametrisation without a z, or weights that are not in the bank.
        """
        made_for = expert.metadata.get("fingerprint")
        if made_for != self._lm.fingerprint:
            raise UserError(
                f"the expert was trained on {expert.metadata.get('base')} ({str(made_for)[:12]}), not on "
                f"{self._base} ({self._lm.fingerprint[:12]}); serve that model, or move it with sva expert transfer"
            )
        require_mixable([expert])
        if outside := [name for name in expert.names if name not in self.names]:
            raise UserError(
                f"the expert adapts {outside[0]}, which this server does not mix; start it with --targets all"
            )
        return {name: np.asarray(x, np.float32) for name, x in expert.z(self._spectra).items()}

    def mixed(self, weights: Mapping[str, float]) -> dict[str, np.ndarray]:
        """The z that a mixture of loaded experts makes; for the thread that owns JAX."""
        self.release(self.hold(weights))  # raises where one is not loaded
        known = {entry.name: entry.z for entry in self.entries}
        zs = [jax.tree.map(jnp.asarray, dict(known[name])) for name in weights]
        return {name: np.asarray(x) for name, x in mix(zs, np.asarray([*weights.values()])).items()}

    def spectrum(self, weight: str, mixture: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
        """(s [R], z [R]) of one matrix under a mixture of loaded experts, both float32; s descending.

        It is the formula of `sva.spectral.mixing.mix` in numpy, so that no request waits for the thread that owns JAX.

        Raises:
          NoWeight: the bank has no such matrix.
          NoExpert: an expert that is not loaded.
        """
        if weight not in self._s:
            raise NoWeight(f"no expert here can adapt {weight[:200]!r}; GET /v1/spectra lists the weights")
        with self._lock:
            for name in mixture:
                self._require(name)
            zs = {name: self._entries[name].z.get(weight) for name in mixture}
        z = self._ones(weight)
        for name, alpha in mixture.items():
            if (own := zs[name]) is not None:
                z += np.float32(alpha) * (own - 1)
        return self._s[weight], z

    def put(self, name: str, z: Mapping[str, np.ndarray], digest: str, about: Mapping[str, Any]) -> Entry:
        """The expert under a name, in a free slot; one of that name is replaced.

        Args:
          about: its label and description among other things.
        Raises:
          UserError: no such name is allowed.
          BankFull: no slot is free.
        """
        check_name(name, self._base)
        slot = self._free_slot()
        rows = {key: z.get(key, np.ones_like(self._ones(key))) for key in self.names}
        self.tree = _replaced(self._lm.model, self.tree, rows, slot)
        label, description = str(about.get("label") or ""), str(about.get("description") or "")
        entry = Entry(name, slot, label, description, digest, dict(about), dict(z))
        with self._lock:
            self._entries.pop(name, None)
            self._entries[name] = entry
            self.version += 1
        return entry

    def drop(self, name: str) -> Entry:
        """Takes the name away; answers that use the expert finish with it.

        Raises:
          NoExpert: no such expert.
        """
        with self._lock:
            self._require(name)
            self.version += 1
            return self._entries.pop(name)

    def _require(self, name: str) -> None:
        """Raises NoExpert for a name that is not loaded; the caller has the lock."""
        if name not in self._entries:
            raise NoExpert(f"no expert {name[:100]!r} is loaded; there is {', '.join(self._entries) or 'none'}")

    def _ones(self, name: str) -> np.ndarray:
        return np.ones_like(self._s[name])

    def _free_slot(self) -> int:
        with self._lock:
            taken = {entry.slot for entry in self._entries.values()}
            for slot in range(1, self.size):
                if slot not in taken and not self._uses[slot]:
                    return slot
        raise BankFull(
            f"all {self.size - 1} slots for experts are taken; drop an expert, wait for answers that still use a "
            "dropped one, or start the server with more --slots"
        )


def _replaced(model: Any, tree: Mapping[str, Any], rows: Mapping[str, np.ndarray], slot: int) -> dict[str, Any]:
    """The bank with one slot's z replaced; only the tables of z pass through the program, spectra do not."""
    slots: dict[Any, Any] = flatten_dict(dict(tree))
    new: dict[Any, Any] = flatten_dict(model.nest(rows))
    tables = _set_rows({path: one.z for path, one in slots.items()}, new, np.int32(slot))
    return unflatten_dict({path: dataclasses.replace(one, z=tables[path]) for path, one in slots.items()})


@jax.jit
def _set_rows(tables: dict[Any, jax.Array], rows: dict[Any, jax.Array], slot: jax.Array) -> dict[Any, jax.Array]:
    """Tables [E_max, R] or [L, E_max, R] with rows [R] or [L, R] in the slot."""
    return {path: table.at[..., slot, :].set(jnp.asarray(rows[path])) for path, table in tables.items()}
