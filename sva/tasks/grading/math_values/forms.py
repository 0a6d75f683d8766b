"""One form for answers that say the same in different ways: names before an answer, inequalities, unions."""

from typing import Any, NamedTuple

import sympy

from .numbers import equal, is_below
from .parts import DEGREE, Combined, Group, Measured, Relation, Unreadable, Words, expression


class Statement(NamedTuple):
    """The expression is "=", "!=", "<" or "<=" zero."""

    sign: str
    expression: Any


class Named(NamedTuple):
    """A value that is said to be that of a name; as a statement too, where it is one of expressions."""

    name: str
    value: Any
    statement: Statement | None = None


class Assigned(NamedTuple):
    """Values by their names."""

    values: dict[str, Any]


_REALS = sympy.Interval(-sympy.oo, sympy.oo)


def canonical(value: Any) -> Any:
    """A value as read, in the form in which it is compared.

    Raises:
      Unreadable: it contradicts itself, or is more than this knows.
    """
    if isinstance(value, Group):
        return Group(value.kind, [canonical(item) for item in value.items])
    if isinstance(value, Measured):
        word = value.unit.strip(" .").lower()
        if word in ("degree", "degrees"):
            return expression(value.value) * DEGREE
        return value.value if word in ("radian", "radians", "rad") else value
    if isinstance(value, Words) and value.text == "\\mathbb{R}":
        return _REALS
    if isinstance(value, Relation):
        return _relation(value)
    return _combined(value) if isinstance(value, Combined) else value


def real_set(value: Any) -> sympy.Set:
    """The set of real numbers that an interval, a set of numbers or a union of them is."""
    if isinstance(value, sympy.Set):
        return value
    if isinstance(value, Group) and all(isinstance(item, sympy.Expr) for item in value.items):
        if value.kind == "{}":
            return sympy.FiniteSet(*value.items)
        if len(value.items) == 2 and value.kind in ("()", "[]", "(]", "[)"):
            low, high = value.items
            if low.free_symbols or high.free_symbols or not is_below(low, high):
                raise Unreadable("no interval of numbers")
            return sympy.Interval(low, high, value.kind[0] == "(", value.kind[1] == ")")
    return sympy.FiniteSet(value) if isinstance(value, sympy.Expr) and value.is_real else sympy.EmptySet


def pieces(numbers: Any) -> list[tuple[Any, Any, bool, bool]]:
    """The intervals that a set consists of, from left to right: ends, and whether each is left out."""
    if isinstance(numbers, sympy.Interval):
        return [(numbers.start, numbers.end, bool(numbers.left_open), bool(numbers.right_open))]
    if isinstance(numbers, sympy.FiniteSet):
        found = [(item, item, False, False) for item in numbers.args]
    elif isinstance(numbers, sympy.Union):
        found = [piece for part in numbers.args for piece in pieces(part)]
    elif numbers is sympy.EmptySet:
        return []
    else:
        raise Unreadable("no union of intervals")
    return sorted(found, key=lambda piece: piece[0].evalf(30))


# --- relations ---


def _relation(relation: Relation) -> Any:
    sides, signs = relation
    if signs[-1] == "~":
        return _approximate(Relation(sides[:-1], signs[:-1]), sides[-1])
    if set(signs) == {"="}:
        return _equation([canonical(side) for side in sides])
    if signs == ["in"]:
        name = _name(sides[0])
        if name is None:
            raise Unreadable("an element with no name")
        return Named(name, canonical(sides[1]))
    if not all(isinstance(side, sympy.Expr) for side in sides) or "in" in signs or "=" in signs:
        raise Unreadable("a comparison of what are no numbers")
    return _inequality(sides, signs)


def _approximate(exact: Relation, rounded: Any) -> Any:
    """ "sqrt 2, about 1.41" may be meant as either, if the two are within a hundredth."""
    value = _relation(exact) if exact.signs else canonical(exact.sides[0])
    number = value.value if isinstance(value, Named) else value
    if not exact.signs and (name := _name(value)):  # x is about 1.41
        return Named(name, rounded)
    if not all(isinstance(side, sympy.Expr) and not side.free_symbols for side in (number, rounded)):
        raise Unreadable("an approximation of what is no number")
    if not abs((number - rounded).evalf(15)) <= abs(number.evalf(15)) / 100:
        raise Unreadable("an approximation that is none")
    both = Group("~", [number, rounded])
    return Named(value.name, both) if isinstance(value, Named) else both


def _equation(sides: list[Any]) -> Any:
    first, last = sides[0], sides[-1]
    numbers = [side for side in sides if isinstance(side, sympy.Expr) and not side.free_symbols]
    if len(numbers) > 1 and not all(equal(number, numbers[0]) for number in numbers[1:]):
        raise Unreadable("an equation that does not hold")
    if len(numbers) == len(sides):
        return last
    names = [_name(first), _name(last)]
    if names[0] is None and names[1] is not None and len(sides) == 2:
        first, last, names = last, first, names[::-1]  # 5 = x
    if isinstance(first, Group) and isinstance(last, Group) and first.kind == last.kind == "()":
        parts = [_name(item) for item in first.items]
        if None in parts or len(parts) != len(last.items):
            raise Unreadable("points of different length")
        return Assigned(dict(zip(map(str, parts), last.items, strict=True)))
    statement = None
    if isinstance(first, sympy.Expr) and isinstance(last, sympy.Expr):
        statement = Statement("=", first - last)
    if names[0] is not None:
        return Named(names[0], last, statement if len(sides) == 2 else None)
    if statement is None or len(sides) > 2:
        raise Unreadable("an equation of what are no numbers")
    return statement


def _name(side: Any) -> str | None:
    """The name that an answer may have before it: x, AB, f(x), \\text{Area}."""
    if isinstance(side, Words):
        return side.text.casefold()
    if isinstance(side, sympy.Expr) and side.free_symbols - {DEGREE} and not side.has(DEGREE):
        return None if side.atoms(sympy.Number) - {sympy.Integer(-1)} else str(side)
    return None


def _inequality(sides: list[Any], signs: list[str]) -> Any:
    """A set of numbers where one symbol is compared with numbers, else a statement."""
    if signs[0] in (">", ">=") and len(sides) > 1:
        sides, signs = sides[::-1], [{">": "<", ">=": "<="}.get(sign, sign) for sign in signs[::-1]]
    if any(sign in (">", ">=") for sign in signs) or ("!=" in signs and len(signs) > 1):
        raise Unreadable("inequalities of two directions")
    if len(sides) == 2 and isinstance(sides[0], sympy.Abs) and sides[0].args[0].is_Symbol and not sides[1].free_symbols:
        sides, signs = [-sides[1], sides[0].args[0], sides[1]], signs * 2  # |x| < 2
    places = [i for i, side in enumerate(sides) if side.free_symbols]
    if len(places) != 1 or not sides[places[0]].is_Symbol or len(sides) > 3:
        if len(sides) != 2:
            raise Unreadable("a chain of inequalities")
        return Statement(signs[0], sides[0] - sides[1])
    place = places[0]
    if signs == ["!="]:
        return Named(str(sides[place]), _REALS - sympy.FiniteSet(sides[1 - place]))
    low, high = -sympy.oo, sympy.oo
    opened = [True, True]
    if place > 0:
        low, opened[0] = sides[place - 1], signs[place - 1] == "<"
    if place < len(sides) - 1:
        high, opened[1] = sides[place + 1], signs[place] == "<"
    if len(sides) == 3 and place != 1:
        raise Unreadable("a chain of inequalities")
    kind = ("(" if opened[0] else "[") + (")" if opened[1] else "]")
    return Named(str(sides[place]), real_set(Group(kind, [low, high])))


def _combined(value: Combined) -> Any:
    parts = [canonical(part) for part in value.parts]
    if value.how in ("cup", "cap", "setminus"):
        first, *others = (real_set(part) for part in parts)
        for other in others:
            first = {"cup": first | other, "cap": first & other, "setminus": first - other}[value.how]
        return first
    names = [part.name for part in parts if isinstance(part, Named)]
    values = [part.value if isinstance(part, Named) else part for part in parts]
    if not isinstance(parts[0], Named) or any(isinstance(item, Statement | Assigned) for item in values):
        return Group(",", parts)
    if len(set(names)) == 1:  # x = 1 or x = -2; x = 1, -2
        if any(isinstance(item, sympy.Set) for item in values):
            return Named(names[0], _sets_together(value, values))
        return Named(names[0], Group(",", values))
    if len(set(names)) == len(parts):
        return Assigned(dict(zip(names, values, strict=True)))
    return Group(",", parts)


def _sets_together(value: Combined, sets: list[Any]) -> sympy.Set:
    """ "x < 1 or x > 2" is a union, "x > 1 and x < 2" what is in both; so is "x > 1, x != 2"."""
    how = value.how
    if how == ",":
        if not any(isinstance(part, Relation) and part.signs == ["!="] for part in value.parts):
            raise Unreadable("inequalities with no word between them")
        how = "and"
    together, *others = (real_set(item) for item in sets)
    for other in others:
        together = together & other if how == "and" else together | other
    return together
