"""Whether two answers to a MATH problem are equal: a program of its own, apart from the process that runs JAX.

Lines of JSON come in on stdin and go out on stdout: {"policy", "gold", "answer", "cpu_secs"} to {"equal", "note"}.
Of sva only the package `math_values` is imported, and no text is evaluated: expressions are parsed to trees. A request
that takes more than its CPU seconds ends the program (SIGPROF), and so does memory beyond the limit, or the end of
whoever asks.
"""

import ast
import json
import logging
import math
import re
import resource
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # for `math_values`; last, behind the standard modules
_MEMORY = 2 * 2**30


# --- strict: equal in value ---


def strict(gold: str, answer: str) -> tuple[bool, str]:
    """Whether the two have the same value (`math_values`), and "unreadable: why" where that cannot be told."""
    # As a package of its own: by way of sva it would bring JAX along.
    from math_values.compare import same  # pyright: ignore[reportMissingImports]
    from math_values.parts import Unreadable  # pyright: ignore[reportMissingImports]

    try:
        return same(gold, answer), ""
    except Unreadable as error:
        return False, f"unreadable: {error}"


# --- reference: the public code's verdict, without evaluating ---


def reference(gold: str, answer: str) -> tuple[bool, str]:
    """The verdict of SakanaAI/self-adaptive-llms (commit 03a41ae) on a pair of answers.

    That code hands what it cannot compare as text to sympy's parse_expr, which evaluates it as Python; here the same
    translation is walked as a tree of numbers, names and functions, and anything else is not an expression. Its first
    try, sympy's LaTeX parser, fails where it is installed as it asks (hydra needs antlr 4.9, that parser 4.11).
    """
    try:
        a, b = _stripped(gold), _stripped(answer)
        return _same(a, b) or a == b, ""
    except (AssertionError, TypeError, ValueError):
        return _same(gold, answer) or gold == answer, ""
    except IndexError:
        return False, "the public code ends with an error"


def _stripped(text: str) -> str:
    for old, new in (
        *(("\n", ""), ("\\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac"), ("\\left", "")),
        *(("\\right", ""), ("^{\\circ}", ""), ("^\\circ", ""), ("\\$", "")),
    ):
        text = text.replace(old, new)
    before, *units = text.split("\\text{ ")
    if len(units) > 1:
        raise ValueError("two units")
    text = (before if units else text).replace("\\\\%", "").replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = f"0{text}" if text[0] == "." else text
    sides = text.split("=")
    text = sides[1] if len(sides) == 2 and len(sides[0]) <= 2 else text
    first, *rest = text.split("\\sqrt")
    text = first + "".join("\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in rest)
    text = _fractions(text.replace(" ", ""))
    text = "\\frac{1}{2}" if text == "0.5" else text
    ratio = re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text, re.ASCII)
    return f"\\frac{{{ratio[1]}}}{{{ratio[2]}}}" if ratio else text


def _fractions(text: str) -> str:
    """ "\\frac12" as "\\frac{1}{2}"."""
    first, *rest = text.split("\\frac")
    braced = ""
    for part in rest:
        if part[0] == "{":
            braced += f"\\frac{part}"
        elif len(part) < 2:
            return text
        else:
            braced += f"\\frac{{{part[0]}}}" + (part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}")
    return first + braced


def _float(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _same(prediction: str, right: str) -> bool:
    x, y = _float(prediction), _float(right)
    if x is not None and y is not None:
        return any(math.isclose(value, x, rel_tol=1e-4) for value in (y / 100, y, y * 100))
    if not prediction:
        return False
    prediction, right = prediction.strip(), right.strip()
    square, round_ = _within(prediction, "[]"), _within(prediction, "()")
    bare = [prediction, right]
    if (square and not right.startswith("(")) or (round_ and not right.startswith("[")):
        bare = [text.strip("[]()") for text in bare]
    if len({re.sub(r"[{}()]", "", text) for text in bare}) == 1:
        return True
    if (square and _within(right, "[]")) or (round_ and _within(right, "()")):
        parts, others = prediction[1:-1].split(","), right[1:-1].split(",")
        if len(parts) == len(others) and all(_same(a, b) for a, b in zip(parts, others, strict=True)):
            return True
    return _same_expression(prediction, right)


def _within(text: str, brackets: str) -> bool:
    return text.startswith(brackets[0]) and text.endswith(brackets[1])


def _same_expression(prediction: str, right: str) -> bool:
    from sympy import simplify
    from sympy.parsing.sympy_parser import convert_xor, rationalize, standard_transformations

    read = [_expression(text, standard_transformations) for text in (prediction, right)]
    try:
        if simplify(read[0] - read[1]) == 0:  # pyright: ignore[reportOptionalOperand]
            return True
    except Exception:
        pass
    exact = (*standard_transformations, rationalize, convert_xor)
    try:
        values = [
            _expression(text, exact) if tree is None else tree
            for text, tree in zip((prediction, right), read, strict=True)
        ]
        return math.isclose(*(float(value.evalf(15)) for value in values), rel_tol=1e-3)
    except Exception:
        return False


def _expression(text: str, transformations: tuple[Any, ...]) -> Any:
    """The expression that `parse_expr` makes of a text, from its parts; None where it is more than that."""
    import sympy
    from sympy.parsing.sympy_parser import stringify_expr

    names = dict(vars(sympy)) | {"abs": abs, "max": sympy.Max, "min": sympy.Min}
    try:
        code = stringify_expr(text, {}, names, transformations)
        return _built(ast.parse(code.strip(), mode="eval").body, names)
    except Exception:
        return None


_OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
    ast.Mod: lambda a, b: a % b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.BitXor: lambda a, b: a ^ b,
}


def _built(node: ast.AST, names: dict[str, Any]) -> Any:
    import sympy

    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_built(node.left, names), _built(node.right, names))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _built(node.operand, names)
        return -value if isinstance(node.op, ast.USub) else +value
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Name):
        value = names.get(node.id)
        if isinstance(value, sympy.Expr):  # pi, E, I, oo
            return value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        made = names.get(node.func.id)
        if made is None:
            raise ValueError(f"no function {node.func.id}")
        if made in (sympy.Symbol, sympy.Float, sympy.Integer, sympy.Rational):  # what the translation writes
            return made(*(arg.value if isinstance(arg, ast.Constant) else _built(arg, names) for arg in node.args))
        # A function of numbers; never of a string, which sympy would evaluate.
        known = made in (abs, sympy.sqrt, sympy.cbrt, sympy.root, sympy.Max, sympy.Min)
        if known or (isinstance(made, type) and issubclass(made, sympy.Function)):
            return made(*(_built(arg, names) for arg in node.args))
    raise ValueError(f"no expression: {ast.dump(node)[:100]}")


# --- the program ---


def main() -> None:
    """Answers until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    logging.disable()
    warnings.simplefilter("ignore")
    sys.setrecursionlimit(2_000)
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        import sympy  # noqa: F401  # outside the time limit

        signal.setitimer(signal.ITIMER_PROF, request["cpu_secs"])
        try:
            decide = strict if request["policy"] == "strict" else reference
            equal, note = decide(request["gold"], request["answer"])
        except (Exception, RecursionError) as error:
            equal, note = False, f"unreadable: {type(error).__name__}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"equal": bool(equal), "note": note}), file=out, flush=True)


if __name__ == "__main__":
    main()
