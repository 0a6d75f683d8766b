"""Whether a function answers as a reference does: evalplus' rules, its special oracles and tolerances among them.

From evalplus 0.3.1 (Apache-2.0; github.com/evalplus/evalplus, evalplus/eval). This file's text runs beside the tests in
the sandbox, so it imports the standard library alone. Deviations: an input has four times the reference's time, as
there, but at least 5 s instead of 1, for machines that are busy; Mbpp/164, where evalplus takes any answer, wants the
right one or True, which the reference's own faults leave open, so that a stub does not pass; numpy's `allclose` is
written out.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

_AS_SETS = "similar_elements find_char_long common_in_nested_lists extract_singly larg_nnum intersection_array"
AS_SETS = frozenset([*_AS_SETS.split(), "find_dissimilar", "Diff"])
"""Functions whose answers are compared as sets."""
IS_FOUND = frozenset(["check_str", "text_match_three", "text_starta_endb"])
"""Functions of which only matters whether they answer None (or, where they answer a truth value, which)."""
_RTOL = 1e-7
_TIMES_REFERENCE, _LEAST_SECS = 4.0, 5.0


def matches(name: str, args: Sequence[Any], out: Any, expected: Any, atol: float) -> bool:
    """Whether `out` is right for the function `name` where the reference gives `expected`.

    `atol` is the task's absolute tolerance; 0 becomes 1e-6 where a float, or a list or tuple of floats, is expected.
    """
    if name == "find_zero":
        return abs(sum(c * math.pow(out, i) for i, c in enumerate(args[0]))) <= atol
    if name in AS_SETS:
        exact = set(out) == set(expected)
    elif name in IS_FOUND:
        exact = out == expected if isinstance(out, bool) else (out is not None) == expected
    else:
        exact = out == expected or _is_special(name, args, out, atol)
    if exact:
        return True
    if atol == 0 and _are_floats(expected):
        atol = 1e-6
    return atol != 0 and type(out) is type(expected) and _are_close(out, expected, atol)


def _is_special(name: str, args: Sequence[Any], out: Any, atol: float) -> bool:
    """Whether it is another right answer than the reference's, for the tasks that have one."""
    if name == "are_equivalent":
        return out is True
    if name == "sum_div":
        return out == 0
    if name == "surface_Area":  # a pyramid's, `height` taken from base to apex
        base, height = args
        return abs(out - round(base**2 + 2 * base * math.hypot(base / 2, height))) <= atol
    if name == "digit_distance_nums":  # both numbers filled up with zeros to the same length
        first, second = (str(number) for number in args)
        width = max(len(first), len(second))
        return out == sum(abs(int(a) - int(b)) for a, b in zip(first.zfill(width), second.zfill(width), strict=True))
    return False


def _are_floats(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def _are_close(out: Any, expected: Any, atol: float) -> bool:
    if isinstance(expected, (list, tuple)):
        same = isinstance(out, (list, tuple)) and len(out) == len(expected)
        return same and all(_are_close(a, b, atol) for a, b in zip(out, expected, strict=True))
    if not isinstance(out, (int, float, complex)) or not isinstance(expected, (int, float, complex)):
        return False
    return out == expected or abs(out - expected) <= atol + _RTOL * abs(expected)


def compare(call_within: Callable[..., Any], data: dict[str, Any]) -> None:
    """Raises AssertionError at the first input where the program does not answer as the reference.

    Args:
      data: the function's `name`, the `reference`'s source, `inputs` (a list of argument lists) and `atol`.
    """
    name, names = data["name"], {}
    exec(compile(data["reference"], "<reference>", "exec"), names)
    for args in data["inputs"]:
        started = time.monotonic()
        expected = names[name](*copy.deepcopy(args))
        secs = max(_LEAST_SECS, _TIMES_REFERENCE * (time.monotonic() - started))
        if name in IS_FOUND:
            expected = expected is not None
        out = call_within(secs, name, *args)
        if not matches(name, args, out, expected, data["atol"]):
            shown = ", ".join(repr(arg)[:60] for arg in args)
            raise AssertionError(f"wrong: {name}({shown}) gave {out!r:.60}, not {expected!r:.60}")
