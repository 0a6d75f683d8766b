"""Experts: what is trained, and its file.

The z-tree stands beside the parameter tree, under the same names:

    params   model.layers.0.mlp.up_proj.weight [1536, 576]      frozen
    spectra  model.layers.0.mlp.up_proj.weight u s vt           frozen
    z        model.layers.0.mlp.up_proj.weight [576]            one expert
    bank     model.layers.0.mlp.up_proj.weight [E_max, 576]     slot 0 is the base: ones
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import safetensors

from sva.spectral.forms import Bands, Core, Spectrum, Z, require_vector
from sva.spectral.parametrisations import PerMatrix, check_raw, family, matrix_infos, singular_values
from sva.utils.errors import UserError
from sva.utils.files import save_tensors, write_atomically
from sva.utils.remote import local_file, reaching, to_path

FORMAT = "sva-expert-1"


@dataclasses.dataclass(frozen=True)
class Expert:
    """One expert: raw float32 values by weight name, [R] for most parametrisations, and how to read them.

    `parametrisation` is spelt as for `sva.family`. Where it shares its numbers over matrices (`projected`), `weights`
    names the matrices; otherwise it stays empty, for raw's keys name them.

    `metadata` holds what is known of its making, all JSON values: `fingerprint` and `base` (name) of the base model,
    `targets`, `task`, `label`, `description`, `metrics`, `config`; of a classification expert also `labels`, the names
    and descriptions that it was trained to tell apart.
    """

    raw: Mapping[str, Any]
    parametrisation: str = "linear"
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        member = family(self.parametrisation)
        if isinstance(member, PerMatrix) == bool(self.weights):
            need = "names its weights in raw" if self.weights else "shares its numbers: name the weights it adapts"
            raise UserError(f"weights={list(self.weights)[:1]} with {member}, which {need}")

    @property
    def names(self) -> tuple[str, ...]:
        """The weights that the expert adapts."""
        return self.weights or tuple(self.raw)

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 over the parametrisation, every array and the weights; metadata does not enter."""
        content = hashlib.sha256(self.parametrisation.encode())
        for name, raw in sorted(self.raw.items()):
            content.update(f"\n{name} {np.shape(raw)}\n".encode())
            content.update(np.ascontiguousarray(raw, np.float32).tobytes())
        for name in sorted(self.weights):
            content.update(f"\n{name}".encode())
        return content.hexdigest()

    def z(self, spectra: Mapping[str, Spectrum]) -> dict[str, Any]:
        """Effective z of each weight, {name: [R] float32}; {name: Core or Bands} for `core`, `projected` and `banded`.

        `sva.merge` takes every kind; mixing, and one z a row, need [R] and refuse the others.

        Raises:
          UserError: a weight of the expert has no spectrum, its values have another shape, or some are NaN or infinite.
        """
        for name in self.names:
            if name not in spectra:
                raise UserError(f"the expert adapts {name}, which is not among the {len(spectra)} decomposed weights")
        member = family(self.parametrisation)
        known = matrix_infos(spectra)
        infos = {name: known[name] for name in self.names}
        check_raw(member, self.raw, infos)
        for name, raw in self.raw.items():
            if not np.isfinite(np.asarray(raw, np.float32)).all():
                raise UserError(f"{name}: raw holds NaN or infinite values")
        return member.z({name: jnp.asarray(raw) for name, raw in self.raw.items()}, infos)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, atomically; the header carries the parametrisation and the metadata."""
        header = {
            "format": FORMAT,
            "parametrisation": self.parametrisation,
            "sva": json.dumps(dict(self.metadata)),
        }
        if self.weights:
            header["weights"] = json.dumps(self.weights)
        tensors = {name: np.ascontiguousarray(raw, np.float32) for name, raw in self.raw.items()}
        write_atomically(to_path(path), lambda p: save_tensors(p, tensors, header))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        fingerprint: str | None = None,
        base: str = "this model",
        transfer: bool = False,
    ) -> "Expert":
        """Reads an expert file.

        Args:
          path: a file that `save` wrote.
          fingerprint: of the model that the expert is meant for; None reads without that check.
          base: that model's name, for the message.
          transfer: accept an expert of another base.
        Raises:
          UserError: no such file, not an expert file, one of an unknown parametrisation, or an expert of another base
            model (both named).
        """
        path = to_path(path)
        with reaching(path):
            is_there = path.is_file()
        if not is_there:
            raise UserError(f"no expert file at {path}; give the path of a .safetensors file that sva train wrote")
        try:
            with local_file(path) as local, safetensors.safe_open(local, framework="numpy") as file:
                header = file.metadata() or {}
                raw = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or no safetensors file ({error}); fetch or train it again") from error
        if header.get("format") != FORMAT:
            raise UserError(f"{path} is no sva expert: its format is {header.get('format')!r}, expected {FORMAT!r}")
        metadata, weights = json.loads(header.get("sva", "{}")), tuple(json.loads(header.get("weights", "[]")))
        try:
            expert = cls(raw, header.get("parametrisation", ""), metadata, weights)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        made_for = expert.metadata.get("fingerprint")
        if fingerprint is not None and made_for != fingerprint and not transfer:
            raise UserError(
                f"{path} was trained on {expert.metadata.get('base')} ({str(made_for)[:12]}), not on {base} "
                f"({fingerprint[:12]}); load that base model, or ask for a transfer"
            )
        return expert


def check_vectors(z: Mapping[str, Any], spectra: Mapping[str, Spectrum], rows: int | None = None) -> None:
    """Raises UserError unless every z is finite and as long as its spectrum: [R], with `rows` also [rows, R]."""
    ranks = {name: np.shape(s)[-1] for name, s in singular_values(spectra).items()}
    for name, vector in z.items():
        if name not in ranks:
            raise UserError(f"the expert adapts {name}, which is not among the {len(spectra)} decomposed weights")
        require_vector(name, vector)
        shape, rank = np.shape(vector), ranks[name]
        if len(shape) != 1 and (rows is None or len(shape) != 2 or shape[0] != rows):
            wanted = f"[{rank}]" if rows is None else f"[{rank}] or, one a row, [{rows}, {rank}]"
            raise UserError(f"{name}: z has shape {list(shape)}, expected {wanted}")
        if shape[-1] != rank:
            raise UserError(f"{name}: z has {shape[-1]} entries, its spectrum has {rank}")
        if not isinstance(vector, jax.core.Tracer) and not np.isfinite(np.asarray(vector)).all():
            raise UserError(f"{name}: z holds NaN or infinite values")


def check_z(z: Mapping[str, Z], spectra: Mapping[str, Spectrum]) -> None:
    """Raises UserError unless every z, of whatever kind, is finite and fits its spectrum."""
    check_vectors({name: x for name, x in z.items() if not isinstance(x, Core | Bands)}, spectra)
    ranks = {name: np.shape(s)[-1] for name, s in singular_values(spectra).items()}
    for name, x in z.items():
        if not isinstance(x, Core | Bands):
            continue
        if name not in ranks:
            raise UserError(f"the expert adapts {name}, which is not among the {len(spectra)} decomposed weights")
        shape, rank = np.shape(x.values), ranks[name]
        fits = shape[-2] == shape[-1] <= rank if isinstance(x, Core) else shape[-1] == rank and shape[-2] % 2
        kind = type(x).__name__
        if len(shape) != 2 or not fits:
            raise UserError(f"{name}: a {kind} of shape {list(shape)} does not fit {rank} singular values")
        if not np.isfinite(np.asarray(x.values)).all():
            raise UserError(f"{name}: the {kind} holds NaN or infinite values")
