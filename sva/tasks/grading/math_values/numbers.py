"""Whether two expressions have the same value."""

from typing import Any

import sympy

from .parts import Unreadable

_DIGITS = 50
_BOUND = sympy.Float("1e-40")  # relative, of what has no exact form
# Where expressions with symbols are compared; the negative ones only where both are real there.
_POINTS = ("1.9137", "0.3719", "7.3391", "113.717", "10007.31", "-0.6173", "-2.3971", "-17.119", "-2111.93")


def equal(a: Any, b: Any) -> bool:
    """Whether two expressions are equal: as they are written, as rational numbers, else in value to 40 digits.

    With symbols in them, their values are compared at nine points, and so they count as equal where they are on
    the numbers for which both are real: sqrt(1/n) is 1/sqrt(n), but sqrt(x^2) is not x.

    Raises:
      Unreadable: an expression has no value, or its values cannot be computed.
    """
    if a == b:
        if a in (sympy.nan, sympy.zoo):
            raise Unreadable("no number")
        return True
    if (a.is_Rational and b.is_Rational) or a.is_infinite or b.is_infinite:
        return False
    factor = multiple(a, b, exact=True)
    return factor is not None and factor == 1


def multiple(a: Any, b: Any, exact: bool = False) -> Any:
    """The constant c with a = c b; None where there is none. With `exact`, 1 or None.

    Raises:
      Unreadable: as for `equal`.
    """
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if symbols and (a - b).has(sympy.floor, sympy.ceiling):
        raise Unreadable("rounding of symbols")
    compared = 0
    factor: Any = sympy.Integer(1) if exact else None
    for i in range(len(_POINTS)) if symbols else [0]:
        point = {
            symbol: sympy.Float(_POINTS[i], _DIGITS) * (1 + sympy.Rational(k, 7)) for k, symbol in enumerate(symbols)
        }
        x, y = _value(a, point), _value(b, point)
        negative = _POINTS[i].startswith("-")
        if x is None or y is None or (negative and not (x.is_real and y.is_real)):
            continue
        if factor is None and not _is_zero(y):
            factor = x / y
        if factor is not None and not _close(x, factor * y):
            return None
        compared += 1
    if compared < (3 if symbols else 1) or factor is None:
        raise Unreadable("no value to compare")
    return factor


def is_below(a: Any, b: Any) -> bool:
    """Whether one real number is less than another."""
    if a.is_infinite or b.is_infinite or (a.is_Rational and b.is_Rational):
        return bool(a < b)
    return not equal(a, b) and bool((a - b).evalf(_DIGITS) < 0)


def _value(expression: Any, point: dict[Any, Any]) -> Any:
    """Its value, as a number with real and imaginary part; None where it has none."""
    if expression.is_Rational:
        return expression
    if expression.is_infinite:
        return None
    value = expression.evalf(_DIGITS, subs=point) if point else expression.evalf(_DIGITS)
    if value.has(sympy.nan, sympy.zoo, sympy.oo) or not all(part.is_number for part in value.as_real_imag()):
        return None
    real, imaginary = value.as_real_imag()
    if not (_is_numeral(real) and _is_numeral(imaginary)):
        return None
    return real if abs(imaginary) <= _BOUND * abs(real) else value


def _is_numeral(value: Any) -> bool:
    return value.is_Float or value.is_Rational


def _is_zero(value: Any) -> bool:
    """Also of what could not be told from zero with many digits, which sympy marks by a precision of one bit."""
    return value == 0 or (value.is_Float and value._prec == 1)


def _close(x: Any, y: Any) -> bool:
    if _is_zero(x) or _is_zero(y):
        return bool(_is_zero(x) and _is_zero(y))
    (a, b), (c, d) = x.as_real_imag(), y.as_real_imag()
    size = max(abs(part) for part in (a, b, c, d))
    return bool(max(abs(a - c), abs(b - d)) <= _BOUND * size)
