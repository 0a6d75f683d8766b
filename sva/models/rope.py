"""Rotary positions: their settings, read from and written to a `config.json`, and their frequencies."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sva.models.fields import Reader, positive_number
from sva.utils.errors import UserError

DEFAULT_ROPE_THETA = 10000.0
KINDS = {kind: kind for kind in ("default", "linear", "dynamic", "yarn", "longrope", "llama3")}
"""{name of a rope type in a config: `Rope.kind`}"""
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class Rope:
    """Settings of rotary positions; inverse frequencies are theta^(-2i / width), i < width / 2.

    `width` is the part of the head that is turned, head_dim * fraction. `kind` then changes the frequencies: "default"
    not at all, "linear" divides all by `factor`, "llama3" divides the slow ones by `factor` and blends in between
    (Llama 3.1), "yarn" does so by counts of turns, `beta_slow` to `beta_fast`. "longrope" divides them by `factors`, in
    a row longer than the original length by `long_factors`; "dynamic" raises theta with the length of a row that is
    longer; "none" is no rotation. Cosine and sine are multiplied by `attention_factor`.
    `factors` with kind "default" are divisors for each frequency, as a GGUF file's `rope_freqs.weight` gives them.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    fraction: float = 1.0

    @property
    def follows_length(self) -> bool:
        """Whether frequencies change in a row that is longer than the original length."""
        return self.kind in ("dynamic", "longrope")


NO_ROPE = Rope(1.0, "none")
"""A layer without rotary positions."""


def rope_from_hf(read: Reader, head_dim: int, kinds: Mapping[str, str] = KINDS, fraction: float = 1.0) -> Rope:
    """Rotary settings of a `config.json`: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4).

    Where both are there, `rope_scaling` wins, a theta inside the dictionary wins, and the original length beside it
    wins, as in transformers 5.
    """
    key = "rope_scaling" if read.config.get("rope_scaling") else "rope_parameters"
    given = _dictionary(read, key)
    if layers := [name for name, value in given.items() if isinstance(value, Mapping)]:
        names = ", ".join(layers)
        raise UserError(f"{read.where}: {key} that differs between layer types ({names}) is not supported")
    theta = read.get("rope_theta") if given.get("rope_theta") is None else given["rope_theta"]
    theta = DEFAULT_ROPE_THETA if theta is None else theta
    original = read.get(_ORIGINAL) if read.get(_ORIGINAL) is not None else given.get(_ORIGINAL)
    return _Settings(read, key, given, head_dim, kinds, fraction).rope(theta, original)


def ropes_from_hf(read: Reader, head_dim: int, thetas: Mapping[str, str]) -> dict[str, Rope]:
    """{layer type: Rope} of an architecture whose layer types differ: Gemma 3, OLMo 3.

    `thetas` names the key of transformers 4's spelling that holds each type's theta.
    """
    nested = nested_settings(read, tuple(thetas))
    ropes = {}
    for kind, theta_key in thetas.items():
        given = nested[kind]
        theta = read.get(theta_key) if given.get("rope_theta") is None else given["rope_theta"]
        if given.get("truncate") is False:
            raise UserError(f"{read.where}: rope_parameters.{kind}.truncate false is not implemented; leave it out")
        key = f"rope_parameters.{kind}"
        ropes[kind] = _Settings(read, key, given, head_dim, KINDS, 1.0).rope(theta, given.get(_ORIGINAL))
    return ropes


def nested_settings(read: Reader, layer_types: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """{layer type: its own settings, empty where there are none} of `rope_parameters`.

    `rope_scaling`, transformers 4's spelling, is that of full attention and wins. Deviation: its old name of the type,
    `type`, counts here as it did in transformers 4; transformers 5 has `rope_type: default` there before and keeps it.
    """
    nested = _dictionary(read, "rope_parameters")
    if odd := [name for name in nested if name not in layer_types]:
        names = " and ".join(layer_types)
        raise UserError(f"{read.where}: rope_parameters must hold {names}, each with its own settings, not {odd[0]}")
    each = {kind: _as_dictionary(nested.get(kind), read.where, f"rope_parameters.{kind}") for kind in layer_types}
    scaling = _dictionary(read, "rope_scaling")
    return each | {"full_attention": each["full_attention"] | scaling}


def _dictionary(read: Reader, key: str) -> dict[str, Any]:
    return _as_dictionary(read.config.get(key), read.where, key)


def _as_dictionary(given: Any, where: str, key: str) -> dict[str, Any]:
    """A copy; empty for null."""
    if given is not None and not isinstance(given, Mapping):
        raise UserError(f"{where}: {key} must be a dictionary or null, not {given!r}")
    return dict(given or {})


@dataclass(frozen=True)
class _Settings:
    """One dictionary of rope settings, `given` under `key`."""

    read: Reader
    key: str
    given: Mapping[str, Any]
    head_dim: int
    kinds: Mapping[str, str]
    fraction: float

    def number(self, name: str, default: float | None = None) -> float:
        """The number under a name; raises UserError where there is neither one nor a default."""
        value = self.given.get(name)
        if value is None:
            if default is None:
                raise UserError(f"{self.read.where}: {self.key} needs {name!r}")
            return default
        return positive_number(value, self.read.where, f"{self.key}.{name}")

    def rope(self, theta: Any, original: Any) -> Rope:
        """The Rope; `original` is the length that the model was trained with first, or None."""
        where, given = self.read.where, self.given
        theta = positive_number(theta, where, "rope_theta")
        kind = given.get("rope_type") or given.get("type") or "default"
        if not isinstance(kind, str) or kind not in self.kinds:
            raise UserError(f"{where}: unsupported rope type {kind!r}; supported: {', '.join(self.kinds)}")
        kind = self.kinds[kind]
        if kind == "default":
            return Rope(theta, fraction=self.fraction)
        if kind == "linear":
            return Rope(theta, "linear", factor=self.number("factor"))
        longest = self.read.size("max_position_embeddings")
        if kind == "dynamic":
            return Rope(theta, "dynamic", factor=self.number("factor"), original_max_position_embeddings=longest)
        first = longest if original is None else original
        length = int(positive_number(first, where, _ORIGINAL))
        if length < 2:
            raise UserError(f"{where}: {_ORIGINAL} must be at least 2 tokens, not {first!r}")
        if kind == "llama3":
            low, high = self.number("low_freq_factor"), self.number("high_freq_factor")
            if low >= high:
                names = f"{self.key}.low_freq_factor {low} must be smaller than {self.key}.high_freq_factor {high}"
                raise UserError(f"{where}: {names}")
            return Rope(theta, "llama3", self.number("factor"), low, high, length)
        return self._yarn(theta, length) if kind == "yarn" else self._longrope(theta, length, longest / length)

    def _yarn(self, theta: float, length: int) -> Rope:
        """YaRN, arXiv 2309.00071."""
        factor = self.number("factor")

        def scale(strength: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * strength * math.log(factor) + 1.0

        strengths = ("mscale", "mscale_all_dim")
        is_split = all(self.given.get(name) for name in strengths)
        one, other = (scale(self.number(name)) for name in strengths) if is_split else (scale(1.0), 1.0)
        return Rope(
            theta,
            "yarn",
            factor,
            original_max_position_embeddings=length,
            attention_factor=self.number("attention_factor", one / other),
            beta_fast=self.number("beta_fast", 32.0),
            beta_slow=self.number("beta_slow", 1.0),
            truncate=self.given.get("truncate") is not False,
        )

    def _longrope(self, theta: float, length: int, ratio: float) -> Rope:
        """LongRoPE, arXiv 2402.13753; equal factors that leave attention alone are plain divisors."""
        half = int(self.head_dim * self.fraction) // 2
        short, long = (self._factors(name, half) for name in ("short_factor", "long_factor"))
        default = longrope_attention_factor(self.number("factor", ratio), length)
        attention = self.number("attention_factor", default)
        if short == long and attention == 1:
            return Rope(theta, factors=short, fraction=self.fraction)
        return Rope(
            theta,
            "longrope",
            original_max_position_embeddings=length,
            factors=short,
            long_factors=long,
            attention_factor=attention,
            fraction=self.fraction,
        )

    def _factors(self, name: str, half: int) -> tuple[float, ...]:
        where, values = self.read.where, self.given.get(name)
        if not isinstance(values, list | tuple):
            raise UserError(f"{where}: {self.key} of type longrope needs {name!r}, a list of numbers")
        if len(values) != half:
            raise UserError(f"{where}: {self.key}.{name} has {len(values)} entries, head_dim asks for {half}")
        return tuple(positive_number(value, where, f"{self.key}.{name}") for value in values)


def rope_to_hf(rope: Rope) -> dict[str, Any] | None:
    """The `rope_scaling` entry of a config; None for unchanged frequencies."""
    length = {_ORIGINAL: rope.original_max_position_embeddings}
    if rope.factors:
        return {
            "rope_type": "longrope",
            "short_factor": list(rope.factors),
            "long_factor": list(rope.long_factors or rope.factors),
            "attention_factor": rope.attention_factor,
            "factor": 1.0,
        } | length
    if rope.kind == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor} | length
    if rope.kind == "yarn":
        scaling |= {name: getattr(rope, name) for name in ("attention_factor", "beta_fast", "beta_slow", "truncate")}
        scaling |= length
    return scaling


def longrope_attention_factor(ratio: float, length: int) -> float:
    """LongRoPE's own factor of cosine and sine, for contexts `ratio` times as long as the original `length`."""
    return 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(length))


def rotated_width(rope: Rope, head_dim: int) -> int:
    """How many numbers of a head are turned."""
    return int(head_dim * rope.fraction)


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """[width / 2] float32 rotary frequencies of rows up to the original length, scaled as the configuration says.

    `llama3` blends frequencies between the unscaled and the scaled ones by wavelength, as Llama 3.1's own code.
    """
    width = rotated_width(rope, head_dim)
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    freqs = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.kind == "none":
        return np.zeros_like(freqs)
    if rope.factors:
        return freqs / np.asarray(rope.factors, np.float32)
    if rope.kind == "linear":
        return freqs / np.float32(rope.factor)
    if rope.kind == "llama3":
        turns = rope.original_max_position_embeddings * freqs / np.float32(2 * np.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0).astype(np.float32)  # 0: scaled down in full, 1: left alone
        return ((1 - blend) * freqs / np.float32(rope.factor) + blend * freqs).astype(np.float32)
    if rope.kind == "yarn":
        low, high = (_index_of(rope, turns, width) for turns in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 if low == high else 0
        ramp = np.clip((np.arange(width // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)
        return (freqs / np.float32(rope.factor) * ramp + freqs * (1 - ramp)).astype(np.float32)
    return freqs


def _index_of(rope: Rope, turns: float, width: int) -> float:
    """The place among the frequencies of the one that makes so many turns in the original length."""
    ratio = rope.original_max_position_embeddings / (turns * 2 * math.pi)
    return width * math.log(ratio) / (2 * math.log(rope.theta))
