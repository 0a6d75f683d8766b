"""Experts: what is trained, and its file.

The z-tree stands beside the parameter tree, under the same names:

    params   model.layers.0.mlp.up_proj.weight [1536, 576]      frozen
    spectra  model.layers.0.mlp.up_proj.weight u s vt           frozen
    z        model.layers.0.mlp.up_proj.weight [576]            one expert
    bank     model.layers.0.mlp.up_proj.weight [E_max, 576]     slot 0 is the base: ones

Members of several arrays a weight (LoRA) have them under a second key, which a file joins to the name by a slash:

    raw      model.layers.0.mlp.up_proj.weight a [16, 576] b [1536, 16]
    file     model.layers.0.mlp.up_proj.weight/a   model.layers.0.mlp.up_proj.weight/b
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import safetensors

from sva.adapters.family import Adapter, Family, PerMatrix
from sva.spectral.forms import Bands, Core, Spectrum, Z, require_vector
from sva.spectral.parametrisations import Diagonal, Frozen, check_raw, family, matrix_infos
from sva.utils.errors import UserError
from sva.utils.files import save_tensors, write_atomically
from sva.utils.remote import local_file, reaching, to_path

FORMAT = "sva-expert-1"


@dataclasses.dataclass(frozen=True)
class Expert:
    """One expert: raw float32 values by weight name, [R] for most parametrisations, and how to read them.

    Where a weight has several arrays (`lora`, `dora`), its value is {part: array}.

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
    def member(self) -> Family:
        """The parametrisation itself."""
        return family(self.parametrisation)

    @property
    def arrays(self) -> dict[str, Any]:
        """Every array of raw, {name: array} or {name/part: array}, as a file holds them."""
        flat: dict[str, Any] = {}
        for name, value in self.raw.items():
            flat |= {f"{name}/{part}": x for part, x in value.items()} if isinstance(value, Mapping) else {name: value}
        return flat

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 over the parametrisation, every array and the weights; metadata does not enter."""
        content = hashlib.sha256(self.parametrisation.encode())
        for name, raw in sorted(self.arrays.items()):
            content.update(f"\n{name} {np.shape(raw)}\n".encode())
            content.update(np.ascontiguousarray(raw, np.float32).tobytes())
        for name in sorted(self.weights):
            content.update(f"\n{name}".encode())
        return content.hexdigest()

    def z(self, frozen: Mapping[str, Frozen]) -> dict[str, Any]:
        """Effective z of each weight, {name: [R] float32}; for other parametrisations what `sva.merge` takes.

        Mixing, and one z a row, need [R] and refuse the others.

        Args:
          frozen: the spectra of the expert's weights, or for an expert without spectra (`lora`, `dora`, `ia3`, `full`)
            their `Matrix`, from `sva.frozen`.
        Raises:
          UserError: a weight of the expert has none, its values have another shape, or some are NaN or infinite.
        """
        member = self.member
        for name in self.names:
            if name not in frozen:
                raise UserError(f"the expert adapts {name}, which is not among the {len(frozen)} decomposed weights")
            if isinstance(frozen[name], Spectrum) != member.has_spectra:
                raise UserError(f"an expert of {member} was given spectra it cannot use; give sva.frozen(lm, expert)")
        infos = matrix_infos({name: frozen[name] for name in self.names})
        check_raw(member, self.raw, infos)
        for name, raw in self.arrays.items():
            if not np.isfinite(np.asarray(raw, np.float32)).all():
                raise UserError(f"{name}: raw holds NaN or infinite values")
        return member.z(jax.tree.map(jnp.asarray, dict(self.raw)), infos)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, atomically; the header carries the parametrisation and the metadata."""
        header = {
            "format": FORMAT,
            "parametrisation": self.parametrisation,
            "sva": json.dumps(dict(self.metadata)),
        }
        if self.weights:
            header["weights"] = json.dumps(self.weights)
        tensors = {name: np.ascontiguousarray(raw, np.float32) for name, raw in self.arrays.items()}
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
                raw = _by_weight({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a mapping)
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


def _by_weight(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Raw values of the arrays of a file: `Expert.arrays` undone."""
    raw: dict[str, Any] = {}
    for key, x in arrays.items():
        name, slash, part = key.partition("/")
        if slash:
            raw.setdefault(name, {})[part] = x
        else:
            raw[name] = x
    return raw


def require_mixable(experts: Iterable[Expert]) -> None:
    """Raises UserError for an expert without an effective z, before anything is decomposed for it."""
    for expert in experts:
        if not isinstance(expert.member, Diagonal):
            raise UserError(
                f"an expert of {expert.member} has no z, one number for each singular value; such an expert can be "
                "merged (sva evaluate, sva expert export, sva.merge), not mixed, dispatched to or given to single rows"
            )


def check_vectors(z: Mapping[str, Any], spectra: Mapping[str, Spectrum], rows: int | None = None) -> None:
    """Raises UserError unless every z is finite and as long as its spectrum: [R], with `rows` also [rows, R]."""
    for name, vector in z.items():
        if name not in spectra:
            raise UserError(f"the expert adapts {name}, which is not among the {len(spectra)} decomposed weights")
        require_vector(name, vector)
        shape, rank = np.shape(vector), np.shape(spectra[name].s)[-1]
        if len(shape) != 1 and (rows is None or len(shape) != 2 or shape[0] != rows):
            wanted = f"[{rank}]" if rows is None else f"[{rank}] or, one a row, [{rows}, {rank}]"
            raise UserError(f"{name}: z has shape {list(shape)}, expected {wanted}")
        if shape[-1] != rank:
            raise UserError(f"{name}: z has {shape[-1]} entries, its spectrum has {rank}")
        if not isinstance(vector, jax.core.Tracer) and not np.isfinite(np.asarray(vector)).all():
            raise UserError(f"{name}: z holds NaN or infinite values")


def check_z(z: Mapping[str, Z], frozen: Mapping[str, Frozen]) -> None:
    """Raises UserError unless every z, of whatever kind, is finite and fits its spectrum."""
    spectra = {name: x for name, x in frozen.items() if isinstance(x, Spectrum)}
    check_vectors({name: x for name, x in z.items() if not isinstance(x, Core | Bands | Adapter)}, spectra)
    for name, x in z.items():
        if not isinstance(x, Core | Bands | Adapter):
            continue
        if name not in frozen:
            raise UserError(f"the expert adapts {name}, which is not among the {len(frozen)} decomposed weights")
        if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(x)):
            raise UserError(f"{name}: the {type(x).__name__} holds NaN or infinite values")
        if isinstance(x, Adapter):
            continue
        shape, rank = np.shape(x.values), np.shape(spectra[name].s)[-1]
        fits = shape[-2] == shape[-1] <= rank if isinstance(x, Core) else shape[-1] == rank and shape[-2] % 2
        kind = type(x).__name__
        if len(shape) != 2 or not fits:
            raise UserError(f"{name}: a {kind} of shape {list(shape)} does not fit {rank} singular values")
