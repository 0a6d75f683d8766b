"""The program that the public code reads from a completion of MBPP+ or HumanEval."""

import re

from sva.tasks.grading.python_text import parse


def program(completion: str, name: str, prompt: str) -> str:
    """The program that the public code makes of a completion; it may be no Python.

    As its evaluation/fishfarm/fishfarm/tasks/evalplus does: what was generated before a closing fence, behind the
    prompt, cut by lines. Functions count only if they have a "return" indented by four. There the prompt ends in an
    opening fence; here, where the model writes one, what comes before it is dropped.
    """
    opened = re.search(r"```[^\n]*\n", completion)
    body = completion[opened.end() if opened else 0 :].partition("```")[0]
    first, *pieces = re.split(rf"def {re.escape(name)}\s*\(", "\n" + f"{prompt}\n{body}".strip())
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
