"""How configurations and expert files spell a parametrisation: a name, and after a colon its settings.

Without JAX, so that a wrong spelling is told before it is imported; `sva.spectral.parametrisations` says what each is.
"""

from typing import NamedTuple

from sva.utils.errors import UserError, at_least


class Spelling(NamedTuple):
    """A parametrisation's name and settings, in their order."""

    name: str
    settings: dict[str, int]

    def __str__(self) -> str:
        settings = ",".join(f"{setting}={value}" for setting, value in self.settings.items())
        return f"{self.name}:{settings}" if settings else self.name


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
    )
}
DIAGONAL = ("linear", "sigmoid_nuclear", "top_k", "tail_only")  # those that yield an effective z


def parse(spelling: str) -> Spelling:
    """The name and settings of a parametrisation spelt so, e.g. `core:r=16`.

    Raises:
      UserError: no such parametrisation (all are listed), a setting that it lacks, misses or cannot take.
    """
    name, _, text = spelling.partition(":")
    if name not in EXAMPLES:
        raise UserError(f"unknown parametrisation {name!r}: it is one of {', '.join(map(str, EXAMPLES.values()))}")
    example = EXAMPLES[name]
    given: dict[str, int] = {}
    for part in text.split(",") if text else []:
        setting, _, value = part.partition("=")
        if setting not in example.settings or setting in given:
            raise UserError(
                f"parametrisation {spelling!r}: {setting!r} is unknown or given twice; write e.g. {example}"
            )
        if not value.isdecimal():
            raise UserError(f"parametrisation {spelling!r}: {setting}={value} is no whole number; write e.g. {example}")
        given[setting] = int(value)
    if given.keys() != example.settings.keys():
        missing = ", ".join(setting for setting in example.settings if setting not in given)
        raise UserError(f"parametrisation {spelling!r} does not say {missing}; write e.g. {example}")
    settings = {setting: given[setting] for setting in example.settings}
    check(name, settings)
    return Spelling(name, settings)


def check(name: str, settings: dict[str, int]) -> None:
    """Raises UserError for a setting that is out of range."""
    for setting, value in settings.items():
        at_least(f"{name}:{setting}", value, 1)
