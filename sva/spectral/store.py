"""Spectra of a whole model, decomposed once and kept on disk.

One safetensors file a matrix, under a directory of the base model's fingerprint. Its header names the format, the
fingerprint, the digest of the factors and the reconstruction error, so that a file which is damaged, foreign or of
another version is noticed and made again, and a run that was killed goes on after the last finished matrix.
"""

import hashlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import safetensors
from tqdm import tqdm

from sva.errors import UserError
from sva.files import save_tensors, write_atomically
from sva.spectral.forms import Spectrum
from sva.spectral.svd import reconstruction_error, svd

FORMAT = "sva-spectrum-1"


def decompose(
    weights: Mapping[str, Callable[[], np.ndarray]],
    fingerprint: str,
    directory: Path,
    *,
    progress: bool = True,
) -> dict[str, Spectrum]:
    """Spectra {name: Spectrum of float32 host arrays}, from `directory` where they are sound, else computed and kept.

    Args:
      weights: for each name, a function that reads the weight [D_out, D_in]; one is held at a time.
      fingerprint: of the base model; files of another one are made again.
      directory: one file `<name>.safetensors` a matrix.
      progress: show a bar on stderr while matrices are decomposed.
    Raises:
      UserError: a weight holds NaN or infinite values (named), or the disk is full.
    """
    spectra: dict[str, Spectrum | None] = {}
    for name in weights:
        spectra[name] = _read(directory / f"{name}.safetensors", fingerprint, name)
    todo = [name for name, spectrum in spectra.items() if spectrum is None]
    for name in tqdm(todo, "decompose", unit="matrix", file=sys.stderr, disable=not (progress and todo)):
        w = weights[name]()
        try:
            spectrum = svd(w)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        error = reconstruction_error(w, spectrum)
        write_atomically(
            directory / f"{name}.safetensors",
            lambda path, s=spectrum, name=name, error=error: _write(path, s, fingerprint, name, error),
        )
        spectra[name] = spectrum
    return {name: spectrum for name, spectrum in spectra.items() if spectrum is not None}


def _digest(spectrum: Spectrum) -> str:
    digest = hashlib.sha256()
    for factor in spectrum:
        digest.update(np.ascontiguousarray(factor).data)
    return digest.hexdigest()


def _write(path: Path, spectrum: Spectrum, fingerprint: str, name: str, error: float) -> None:
    metadata = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "name": name,
        "sha256": _digest(spectrum),
        "relative_error": f"{error:.3e}",
    }
    save_tensors(path, {k: np.asarray(v) for k, v in spectrum._asdict().items()}, metadata)


def _read(path: Path, fingerprint: str, name: str) -> Spectrum | None:
    """The stored spectrum, or None where there is none that can be trusted (said on stderr when one is there)."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            wanted = {"format": FORMAT, "fingerprint": fingerprint, "name": name}
            for key, value in wanted.items():
                if metadata.get(key) != value:
                    raise ValueError(f"its {key} is {metadata.get(key)!r}, not {value!r}")
            spectrum = Spectrum(*(file.get_tensor(key) for key in Spectrum._fields))
        if _digest(spectrum) != metadata.get("sha256"):
            raise ValueError("its contents do not match their digest")
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        print(f"sva: {path} is not used ({error}); decomposing again", file=sys.stderr)
        return None
    return spectrum
