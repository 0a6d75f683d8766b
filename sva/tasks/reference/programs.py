"""The program that the public code reads from a completion of MBPP+; HumanEval's is the prompt and the completion."""

import ast
import re
import warnings

from sva.tasks.grading.python_text import parse


def body(completion: str, *, is_open: bool) -> str:
    """The code in a completion: what was generated before the first fence.

    Args:
      is_open: the prompt ends in an opening fence, as the public code's do. Where it does not (`prompt=own`) and the
        model writes one, what comes before that is dropped.
    """
    opened = None if is_open else re.search(r"```[^\n]*\n", completion)
    return completion[opened.end() if opened else 0 :].partition("```")[0]


def by_four(source: str) -> str:
    """A program with its lines indented by four, which `sanitised` asks for; its comments are lost.

    Of MBPP+ 0.1.0's 399 canonical solutions 176 are indented by other steps, and what the public code makes of those
    as they stand is wrong.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # of escapes such as X
        return ast.unparse(ast.parse(source))


def sanitised(text: str, name: str) -> str:
    """The program that the public code makes of MBPP's prompt and the code behind it; it may be no Python.

    As its evaluation/fishfarm/fishfarm/tasks/evalplus does, by lines. Functions count only if they have a "return"
    indented by four.
    """
    first, *pieces = re.split(rf"def {re.escape(name)}\s*\(", "\n" + text.strip())
    bodies = [piece for piece in pieces if "    return " in piece.split("\ndef")[0]]
    head = f"def {name}("
    lines = (head + head.join(bodies)).splitlines() if bodies else []
    kept = []
    for number, line in enumerate(" " + line if len(line) - len(line.lstrip()) == 3 else line for line in lines):
        is_flush = bool(line.strip()) and not line.startswith((" ", "\t", "def ", "import ", "from "))
        if number and is_flush and line.startswith(('"""', "if", "print")):
            break
        if not number or not is_flush:
            kept.append(line)
    parts = (first + "\n".join(kept)).split("\ndef ")
    own = (f"{name} ", f"{name}(")
    parts[1:] = [p for p in parts[1:] if p.strip().startswith(own) or not isinstance(parse("\ndef " + p), int)]
    return "\ndef ".join(parts).strip()
