"""What is too large to read at one sitting: `python scripts/sizes.py` lists it and exits with 1 where there is any.

In sva/, experiments/ and scripts/ no file has over 400 lines, no function over 60, no signature over 8 parameters
(`self` and `cls` do not count). Split by concept: a part with a name of its own, not a second half.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8
ROOT = Path(__file__).resolve().parent.parent


def too_large(path: Path) -> Iterator[str]:
    """One line for each thing in a Python file that is over its size."""
    text = path.read_text(encoding="utf-8")
    name, lines = path.relative_to(ROOT), text.count("\n")
    if lines > FILE_LINES:
        yield f"{name}: {lines} lines, at most {FILE_LINES}"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > FUNCTION_LINES:
            yield f"{name}:{node.lineno}: {node.name} has {length} lines, at most {FUNCTION_LINES}"
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        count = sum(each is not None and each.arg not in ("self", "cls") for each in every)
        if count > PARAMETERS:
            yield f"{name}:{node.lineno}: {node.name} has {count} parameters, at most {PARAMETERS}"


def main() -> int:
    """Prints every line; 1 where there is one."""
    found = [
        line
        for folder in ("sva", "experiments", "scripts")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in too_large(path)
    ]
    print("\n".join(found) or f"no file over {FILE_LINES} lines, function over {FUNCTION_LINES}, nor longer signature")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
