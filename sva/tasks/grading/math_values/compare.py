"""Whether two answers have the same value. Only an equality that was established counts; what cannot be read or
computed is `Unreadable`."""

import re
from itertools import product
from typing import Any

import sympy

from .forms import Assigned, Named, Statement, canonical, pieces, real_set
from .latex import read
from .numbers import equal, is_below, multiple
from .parts import DEGREE, Based, Group, Measured, Table, Words, expression
from .units import Unit, unit

_BASES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def same(gold: str, answer: str) -> bool:
    """Whether an answer's value is the right one's.

    Raises:
      Unreadable: one of them was not read to its end.
    """
    if _squeezed(gold) == _squeezed(answer):
        return True
    based, given = _based(gold), _based(answer)
    if given:
        return based == given
    if based:
        return re.sub(r"\s", "", answer) == based.digits
    return any(_same(a, b) for a, b in product(_readings(gold), _readings(answer)))


def _squeezed(text: str) -> str:
    """The text without the blanks that mean nothing: all but those between two letters or digits."""
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", text)


def _readings(text: str) -> list[Any]:
    """The values that a text can have: 100,200 is a number or a list, everything else has one."""
    value = canonical(read(text, thousands=True))
    grouped = re.search(r"\d,\d{3}(?!\d)", text) is not None and not re.search(r",0\d", text)
    return [value, canonical(read(text, thousands=False))] if grouped else [value]


def _based(text: str) -> Based | None:
    """The digits and the base of 101_2, 101_{\\text{two}}, (A3)_{16}."""
    inner = re.sub(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}", r"\1", text)
    match = re.fullmatch(r"\s*\(?([0-9A-F ]+?)\)?\s*_\s*\{?\s*\(?(\d{1,2}|[a-z]+)\)?\s*\}?\s*", inner)
    if not match or not (re.search(r"\d", match[1]) or len(match[1]) > 1):
        return None
    name = match[2]
    if not name.isdigit() and name not in _BASES:
        return None
    return Based(match[1].replace(" ", ""), int(name) if name.isdigit() else _BASES.index(name) + 2)


def _same(a: Any, b: Any) -> bool:
    """Whether two values in canonical form are equal; a is the right answer's."""
    if isinstance(a, Named) and isinstance(b, Named):
        if a.name == b.name:
            return _same(a.value, b.value)
        return a.statement is not None and b.statement is not None and _same_statement(a.statement, b.statement)
    if isinstance(a, Named) or isinstance(b, Named):
        named, other = (a, b) if isinstance(a, Named) else (b, a)
        if isinstance(other, Statement):
            return named.statement is not None and _same_statement(named.statement, other)
        return _same(*(value.value if isinstance(value, Named) else value for value in (a, b)))
    if isinstance(a, Statement) or isinstance(b, Statement):
        return isinstance(a, Statement) and isinstance(b, Statement) and _same_statement(a, b)
    if isinstance(a, Assigned) or isinstance(b, Assigned):
        return _same_assigned(a, b)
    if isinstance(a, Measured) or isinstance(b, Measured):
        return _same_measured(a, b)
    if isinstance(a, sympy.Set) or isinstance(b, sympy.Set):
        return _same_sets(real_set(a), real_set(b))
    if isinstance(a, Group) or isinstance(b, Group):
        return _same_groups(a, b)
    if isinstance(a, Table) or isinstance(b, Table):
        return isinstance(a, Table) and isinstance(b, Table) and _same_tables(a, b)
    if isinstance(a, Words) or isinstance(b, Words):
        return isinstance(a, Words) and isinstance(b, Words) and a.text.casefold() == b.text.casefold()
    return _same_angles(a, b)


def _same_angles(a: Any, b: Any) -> bool:
    """Of expressions: a degree is pi/180; where only one of the two has the sign, it may also stand for nothing."""
    if equal(*(value.subs(DEGREE, sympy.pi / 180) for value in (a, b))):
        return True
    return a.has(DEGREE) != b.has(DEGREE) and equal(a.subs(DEGREE, 1), b.subs(DEGREE, 1))


def _same_statement(a: Statement, b: Statement) -> bool:
    """Equations and inequalities of the form "expression < 0" are the same but for a factor, positive for a "<"."""
    if a.sign != b.sign:
        return False
    factor = multiple(a.expression, b.expression)
    return factor is not None and factor != 0 and (a.sign in ("=", "!=") or bool(factor.is_real and factor > 0))


def _same_assigned(a: Any, b: Any) -> bool:
    if isinstance(a, Assigned) and isinstance(b, Assigned):
        return a.values.keys() == b.values.keys() and all(_same(a.values[name], b.values[name]) for name in a.values)
    assigned, other = (a, b) if isinstance(a, Assigned) else (b, a)
    if not isinstance(other, Group) or other.kind not in ("()", ","):
        return False
    values = list(assigned.values.values())
    return len(values) == len(other.items) and all(
        _same(*((x, y) if isinstance(a, Assigned) else (y, x))) for x, y in zip(values, other.items, strict=True)
    )


def _same_measured(a: Any, b: Any) -> bool:
    """With units: equal after conversion; where only one names a unit, the numbers alone; percent by its meaning."""
    bare = [value.value if isinstance(value, Measured) else value for value in (a, b)]
    units = [unit(value.unit) if isinstance(value, Measured) else None for value in (a, b)]
    first, second = units
    if first and second:
        if (first.dimension, first.power) != (second.dimension, second.power):
            return False
        if first.scale == second.scale:
            return _same(*bare)
        return _same(
            *(expression(value) * _rational(found.scale) for value, found in zip(bare, (first, second), strict=True))
        )
    percent = [found is not None and found.dimension == "percent" for found in units]
    if not any(percent):
        lettered = [_as_symbol(value, found) for value, found in zip((a, b), units, strict=True)]
        return _same(*bare) or _same(*lettered)
    if _same(*(value / 100 if sign else value for value, sign in zip(bare, percent, strict=True))):
        return True
    # 25% may be asked for and given as 25; 0.25 and 0.25% are not the same
    return (
        _same(*bare)
        and isinstance(bare[0], sympy.Expr)
        and bare[0].is_real is True
        and is_below(sympy.Integer(1), bare[0])
    )


def _as_symbol(value: Any, found: Unit | None) -> Any:
    """5 m, if the letter were one: some write so what they mean as metres."""
    if not isinstance(value, Measured) or found is None or not isinstance(value.value, sympy.Expr):
        return value.value if isinstance(value, Measured) else value
    return value.value * sympy.Symbol(value.unit.strip(" .0123456789")) ** found.power


def _rational(value: Any) -> Any:
    return sympy.Rational(value.numerator, value.denominator)


def _same_sets(a: sympy.Set, b: sympy.Set) -> bool:
    mine, others = pieces(a), pieces(b)
    return len(mine) == len(others) and all(
        x[2:] == y[2:] and equal(x[0], y[0]) and equal(x[1], y[1]) for x, y in zip(mine, others, strict=True)
    )


def _same_groups(a: Any, b: Any) -> bool:
    """Lists and sets in any order, points and intervals in theirs; a column or a row of numbers is a point."""
    if isinstance(a, Group) and a.kind == "~" or isinstance(b, Group) and b.kind == "~":
        sides = [value.items if isinstance(value, Group) and value.kind == "~" else [value] for value in (a, b)]
        return any(_same(x, y) for x, y in product(*sides))
    kinds = [value.kind if isinstance(value, Group) else "" for value in (a, b)]
    items = [_items(value) for value in (a, b)]
    if ":" in kinds:
        items = [[expression(item) for item in value] for value in items]
    if kinds[0] == kinds[1] == ":":
        return _same_ratios(*items)
    if ":" in kinds:
        sides = [value[0] / value[1] if kind == ":" else value[0] for value, kind in zip(items, kinds, strict=True)]
        return [len(value) for value in items] in ([2, 1], [1, 2]) and _same(*sides)
    ordered = [kind not in ("{}", ",", "") for kind in kinds]
    if "{}" in kinds and not any(ordered):
        return _covers(*items) and _covers(items[1], items[0])
    if (
        kinds[0] == kinds[1]
        and ordered[0]
        or set(kinds) == {"()", ","}
        or (set(kinds) == {"()", ""} and _is_table(a, b))
    ):
        return len(items[0]) == len(items[1]) and all(_same(x, y) for x, y in zip(*items, strict=True))
    return not any(ordered) and _matches(*items)


def _is_table(*values: Any) -> bool:
    return any(isinstance(value, Table) for value in values)


def _items(value: Any) -> list[Any]:
    if isinstance(value, Table) and (len(value.rows) == 1 or all(len(row) == 1 for row in value.rows)):
        return [item for row in value.rows for item in row]
    return value.items if isinstance(value, Group) else [value]


def _covers(a: list[Any], b: list[Any]) -> bool:
    """Whether each of a is among b."""
    return all(any(_same(x, y) for y in b) for x in a)


def _matches(a: list[Any], b: list[Any]) -> bool:
    """Whether each of a is one of b, each of which is taken once."""
    left = list(b)
    for x in a:
        place = next((i for i, y in enumerate(left) if _same(x, y)), None)
        if place is None:
            return False
        del left[place]
    return not left


def _same_ratios(a: list[Any], b: list[Any]) -> bool:
    """1:2 is 2:4; with a zero in it (a time of day) each number by itself."""
    if len(a) != len(b):
        return False
    if any(x == 0 for x in (*a, *b)):
        return all(_same(x, y) for x, y in zip(a, b, strict=True))
    return all(equal(x * b[0], y * a[0]) for x, y in zip(a, b, strict=True))


def _same_tables(a: Table, b: Table) -> bool:
    shapes = [[len(row) for row in table.rows] for table in (a, b)]
    return shapes[0] == shapes[1] and all(
        equal(x, y) for rows in zip(a.rows, b.rows, strict=True) for x, y in zip(*rows, strict=True)
    )
