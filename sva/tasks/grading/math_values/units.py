"""Units of measurement: whether two are the same, and how many of one make the other."""

import re
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """What is measured (a length to the power of 2), or the words themselves where they name no unit known here."""

    dimension: str
    power: int
    scale: Fraction


_SIZES: dict[str, dict[str, str | int]] = {
    "length": {
        **{"mm": "1/1000", "cm": "1/100", "dm": "1/10", "m": 1, "km": 1000},
        **{"in": "254/10000", "ft": "3048/10000", "yd": "9144/10000", "mi": "1609344/1000"},
    },
    "time": {"s": 1, "min": 60, "h": 3600, "d": 86400, "week": 604800},
    "mass": {"mg": "1/1000", "g": 1, "kg": 1000},
    "volume": {"ml": 1, "l": 1000},
    "weight": {"oz": 1, "lb": 16},
    "money": {"cent": 1, "dollar": 100},
    "percent": {"percent": 1},
    "": {"unit": 1},
}
_NAMES = (
    "mm millimeter millimetre; cm centimeter centimetre; dm decimeter; m meter metre; km kilometer kilometre; "
    "in inch inches; ft foot feet; yd yard; mi mile; s sec second; min minute; h hr hour; d day; week; mg milligram; "
    "g gram; kg kilogram; ml milliliter millilitre; l liter litre; oz ounce; lb pound; cent \u00a2; dollar buck usd; "
    "percent; unit"
)
_CANONICAL = {name: names.split()[0] for names in _NAMES.split(";") for name in names.split()}
_KNOWN = {name: Unit(kind, 1, Fraction(size)) for kind, sizes in _SIZES.items() for name, size in sizes.items()}
UNITS = frozenset(_CANONICAL) | {f"{name}s" for name in _CANONICAL if len(name) > 2} | {"square", "cubic", "sq", "cu"}
_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}


def unit(words: str) -> Unit | None:
    """The unit that words name ("square inches", "cm^2"); None for words that say no more than "units" does."""
    words = words.replace(".", "").replace("mph", "mi per h")  # a.m., sq. ft.
    power, rest = 1, []
    for word in re.findall(r"[^\W\d_]+|\u00a2|\d+", words.lower()):
        if word in _POWERS:
            power = _POWERS[word]
        elif word.isdigit():
            power = int(word)
        elif word not in ("of", "in", "the", "a", "an", "total") or words.strip().lower() == "in":
            rest.append(word)
    names = [_CANONICAL.get(word) or _CANONICAL.get(word.rstrip("s")) for word in rest]
    if not rest or set(names) == {"unit"}:
        return None
    if len(rest) == 1 and names[0]:
        known = _KNOWN[names[0]]
        return Unit(known.dimension, power, known.scale**power)
    named = sorted(name or word.rstrip("s") for name, word in zip(names, rest, strict=True) if word != "per")
    return Unit(" ".join(named), power, Fraction(1))
