"""Scores answers to reasoning-gym's questions: a program of its own, for some of its scorers hand text to sympy.

Lines of JSON come in on stdin and go out on stdout: {"name", "seed", "size", "index", "answer", "cpu_secs"} to
{"equal", "note"}. What could be more than an expression is not handed on (`is_plain`). Limits as in `math_worker.py`.
"""

import json
import re
import resource
import signal
import sys
from functools import cache
from typing import Any

_MEMORY = 4 * 2**30
_FUNCTIONS = r"(?:sin|cos|tan|exp|log|sqrt|abs|Abs)"


@cache
def environment(name: str, seed: int, size: int) -> Any:
    """The environment's questions."""
    import reasoning_gym  # pyright: ignore[reportMissingImports]  # an extra

    return reasoning_gym.create_dataset(name, seed=seed, size=size)


def is_plain(answer: str) -> bool:
    """Whether a text names no attribute and calls nothing but a few functions, so that evaluating it does no harm."""
    rest = re.sub(rf"\b{_FUNCTIONS}\(", "(", answer)
    named = r"__|[\w)\]]\s*\.\s*[A-Za-z_]|[\"'`@;\\]|\b(?:lambda|import|exec|eval)\b"
    called, power = r"[A-Za-z_\])]\w*\s*\(", r"\*\*\s*\S+\s*\*\*"
    return len(answer) <= 1_000 and re.search(f"{named}|{called}|{power}", rest) is None


def main() -> None:
    """Answers until stdin ends."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        ask = json.loads(line)
        questions = environment(ask["name"], ask["seed"], ask["size"])
        entry = questions[ask["index"]]
        signal.setitimer(signal.ITIMER_PROF, ask["cpu_secs"])
        try:
            equal, note = float(questions.score_answer(ask["answer"], entry)) == 1.0, ""
        except Exception as error:
            equal, note = False, f"unreadable: {type(error).__name__}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps({"equal": equal, "note": note}), file=out, flush=True)


if __name__ == "__main__":
    main()
