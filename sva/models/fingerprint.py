"""The fingerprint of a model: a hash of its weights as stored, which experts and spectra are known by."""

import hashlib
from collections.abc import Iterable

import numpy as np


def digest(weight: np.ndarray) -> str:
    """Hexadecimal sha256 of one weight's dtype, shape and bytes."""
    state = hashlib.sha256(f"{weight.dtype} {weight.shape}".encode())
    state.update(np.ascontiguousarray(weight).view(np.uint8).data)
    return state.hexdigest()


def fingerprint(digests: Iterable[tuple[str, str]]) -> str:
    """Hexadecimal sha256 over (name, digest) of every weight, whatever their order and their files."""
    return hashlib.sha256("\n".join(f"{name} {value}" for name, value in sorted(digests)).encode()).hexdigest()
