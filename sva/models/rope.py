"""Rotary positions: their settings, read from and written to a `config.json`, and their frequencies."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sva.utils.errors import UserError

DEFAULT_ROPE_THETA = 10000.0


@dataclass(frozen=True)
class Rope:
    """Settings of rotary positions; inverse frequencies are theta^(-2i / head_dim), i < head_dim / 2.

    `kind` then changes them: "default" not at all, "linear" divides all by `factor`, "llama3" divides the
    slow ones by `factor` and blends in between (Llama 3.1). `factors`, where not empty, are divisors for each
    frequency [head_dim / 2], as a GGUF file's `rope_freqs.weight` gives them, and come with kind "default".
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()


def rope_from_hf(
    config: Mapping[str, Any], head_dim: int, max_positions: int, where: str, default_theta: float = DEFAULT_ROPE_THETA
) -> Rope:
    """Rotary settings of a `config.json`: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).

    Where both are there, `rope_scaling` wins, a theta inside the dictionary wins, and the original length beside it
    wins, as in transformers 5.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(key) or {}
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: {key} must be a dictionary or null, not {given!r}")
    if layers := [name for name, value in given.items() if isinstance(value, Mapping)]:
        raise UserError(f"{where}: {key} that differs between layer types ({', '.join(layers)}) is not supported")

    def inner_or_outer(name: str) -> Any:
        return config.get(name) if given.get(name) is None else given[name]

    partial = inner_or_outer("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise UserError(f"{where}: partial_rotary_factor {partial} is not supported, only 1")

    def number(name: str) -> float:
        if given.get(name) is None:
            raise UserError(f"{where}: {key} needs {name!r}")
        return positive_number(given[name], where, f"{key}.{name}")

    theta = inner_or_outer("rope_theta")
    theta = default_theta if theta is None else positive_number(theta, where, "rope_theta")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", factor=number("factor"))
    if kind == "llama3":
        name = "original_max_position_embeddings"
        lengths = (config.get(name), given.get(name), max_positions)
        original = positive_number(next(n for n in lengths if n is not None), where, name)
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if low >= high:
            raise UserError(f"{where}: {key}.low_freq_factor {low} must be smaller than {key}.high_freq_factor {high}")
        return Rope(theta, "llama3", number("factor"), low, high, int(original))
    factors = given.get("short_factor")
    if kind == "longrope" and factors and factors == given.get("long_factor") and given.get("attention_factor") == 1:
        if len(factors) != head_dim // 2:
            raise UserError(
                f"{where}: {key}.short_factor has {len(factors)} entries, head_dim asks for {head_dim // 2}"
            )
        return Rope(theta, factors=tuple(positive_number(f, where, f"{key}.short_factor") for f in factors))
    raise UserError(f"{where}: unsupported rope type {kind!r}; supported: default, linear, llama3")


def rope_to_hf(rope: Rope) -> dict[str, Any] | None:
    """The `rope_scaling` entry of a config; None for unchanged frequencies."""
    if rope.factors:
        factors = list(rope.factors)
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "factor": 1.0,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    if rope.kind == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
        }
    return scaling


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """[head_dim / 2] float32 rotary frequencies, scaled as the configuration says.

    `llama3` blends frequencies between the unscaled and the scaled ones by wavelength, as Llama 3.1's own code.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freqs = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.factors:
        return freqs / np.asarray(rope.factors, np.float32)
    if rope.kind == "linear":
        return freqs / np.float32(rope.factor)
    if rope.kind == "llama3":
        turns = rope.original_max_position_embeddings * freqs / np.float32(2 * np.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0).astype(np.float32)  # 0: scaled down in full, 1: left alone
        return ((1 - blend) * freqs / np.float32(rope.factor) + blend * freqs).astype(np.float32)
    return freqs


def positive_number(value: Any, where: str, key: str) -> float:
    """The value of a key of the file `where`; raises UserError for anything but a positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise UserError(f"{where}: {key} must be a positive number, not {value!r}")
    return float(value)
