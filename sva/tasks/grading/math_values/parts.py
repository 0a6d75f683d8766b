"""What an answer is made of, and the arithmetic of its numbers, bounded before it is computed."""

from typing import Any, NamedTuple

import sympy

_MOST_BITS = 200_000  # of a power
DEGREE = sympy.Symbol("degree")


class Unreadable(Exception):
    """No value can be told from this text; the message says why."""


class Group(NamedTuple):
    """Several values: of a bare list ",", a set "{}", an ordered "()" or interval "[)", a ratio ":"."""

    kind: str
    items: list[Any]


class Table(NamedTuple):
    """A matrix, by its rows."""

    rows: list[list[Any]]


class Relation(NamedTuple):
    """A chain of equations or inequalities: one sign fewer than sides."""

    sides: list[Any]
    signs: list[str]


class Combined(NamedTuple):
    """Sets under "cup", "cap" or "setminus"; statements under "and" or "or"."""

    how: str
    parts: list[Any]


class Measured(NamedTuple):
    """A value with a unit, in words."""

    value: Any
    unit: str


class Words(NamedTuple):
    """Text that stands for itself; also a named set, such as the real numbers."""

    text: str


class Based(NamedTuple):
    """Digits in a base."""

    digits: str
    base: int


def power(base: Any, exponent: Any) -> Any:
    """base ** exponent, where it stays small."""
    if not exponent.free_symbols:
        size = abs(exponent.evalf(15)) if not exponent.is_Integer else abs(exponent)
        if not (size.is_infinite or size <= 10**6):
            raise Unreadable("a power too large to be computed")
        if base.is_Rational and size * max(abs(base.p), base.q, 2).bit_length() > _MOST_BITS:
            raise Unreadable("a power too large to be computed")
        if not base.is_Rational and base.is_number and size > 10_000:
            raise Unreadable("a power too large to be computed")
    return base**exponent


def factorial(value: Any) -> Any:
    if value.is_number and not (value.is_Integer and 0 <= value <= 5_000):
        raise Unreadable("a factorial too large to be computed")
    return sympy.factorial(value)


def binomial(n: Any, k: Any) -> Any:
    if not all(part.is_Integer and 0 <= part <= 10_000 for part in (n, k) if part.is_number):
        raise Unreadable("a binomial too large to be computed")
    return sympy.binomial(n, k)


def number(text: str) -> Any:
    mantissa, _, exponent = text.lower().partition("e")
    if len(exponent) > 5 or len(mantissa) > 1_000:
        raise Unreadable("a number too large to be computed")
    return sympy.Rational(mantissa.rstrip(".") or "0") * sympy.Integer(10) ** int(exponent or 0)


def expression(value: Any) -> Any:
    """The value, which can be added and multiplied."""
    if isinstance(value, sympy.Expr):
        return value
    raise Unreadable("a value that no sum or product can hold")
