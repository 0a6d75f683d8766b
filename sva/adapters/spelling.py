"""How configurations and expert files spell a parametrisation: a name, and after a colon its settings.

Without JAX, so that a wrong spelling is told before it is imported; `sva.spectral.parametrisations` says what each is.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from sva.utils.errors import UserError, above, at_least


class Spelling(NamedTuple):
    """A parametrisation's name and settings, in their order."""

    name: str
    settings: Mapping[str, float]

    def __str__(self) -> str:
        settings = ",".join(f"{x}={value:g}" for x, value in self.settings.items() if value != OPTIONAL.get(x))
        return f"{self.name}:{settings}" if settings else self.name


OPTIONAL = {"dropout": 0.0}  # settings that may be left out, and what they then are
_FRACTIONS = ("alpha", "dropout")  # settings that need not be whole

_LOW_RANK = {"r": 16, "alpha": 32.0, "dropout": 0.0}
EXAMPLES = {
    example.name: example
    for example in (
        Spelling("linear", {}),
        Spelling("sigmoid_nuclear", {}),
        Spelling("top_k", {"k": 64}),
        Spelling("tail_only", {"k": 64}),
        Spelling("banded", {"width": 2}),
        Spelling("core", {"r": 16}),
        Spelling("projected", {"n": 13, "r": 2}),
        Spelling("lora", _LOW_RANK),
        Spelling("rslora", _LOW_RANK),
        Spelling("dora", _LOW_RANK),
        Spelling("ia3", {}),
        Spelling("full", {}),
    )
}
DIAGONAL = ("linear", "sigmoid_nuclear", "top_k", "tail_only")  # those that yield an effective z
LOW_RANK = ("lora", "rslora", "dora")
UNDECOMPOSED = (*LOW_RANK, "ia3", "full")  # those that read no spectrum


def parse(spelling: str) -> Spelling:
    """The name and settings of a parametrisation spelt so, e.g. `core:r=16` or `lora:r=16,alpha=32,dropout=0.05`.

    Raises:
      UserError: no such parametrisation (all are listed), a setting that it lacks, misses or cannot take.
    """
    name, _, text = spelling.partition(":")
    if name not in EXAMPLES:
        raise UserError(f"unknown parametrisation {name!r}: it is one of {', '.join(map(str, EXAMPLES.values()))}")
    example = EXAMPLES[name]
    given: dict[str, float] = {}
    for part in text.split(",") if text else []:
        setting, _, value = part.partition("=")
        if setting not in example.settings or setting in given:
            raise UserError(
                f"parametrisation {spelling!r}: {setting!r} is unknown or given twice; write e.g. {example}"
            )
        given[setting] = _number(setting, value, f"parametrisation {spelling!r}", example)
    settings = {x: given[x] if x in given else OPTIONAL[x] for x in example.settings if x in given or x in OPTIONAL}
    if missing := ", ".join(setting for setting in example.settings if setting not in settings):
        raise UserError(f"parametrisation {spelling!r} does not say {missing}; write e.g. {example}")
    check(name, settings)
    return Spelling(name, settings)


def _number(setting: str, text: str, where: str, example: Spelling) -> float:
    """The value of one setting."""
    if setting not in _FRACTIONS:
        if not text.isdecimal():
            raise UserError(f"{where}: {setting}={text} is no whole number; write e.g. {example}")
        return int(text)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: {setting}={text} is no number; write e.g. {example}")
    return value


def check(name: str, settings: Mapping[str, float]) -> None:
    """Raises UserError for a setting that is out of range."""
    for setting, value in settings.items():
        if setting == "alpha":
            above(f"{name}:{setting}", value, 0)
        elif setting == "dropout":
            if not 0 <= value < 1:
                raise UserError(f"{name}:dropout={value:g} must be at least 0 and below 1")
        else:
            at_least(f"{name}:{setting}", value, 1)
