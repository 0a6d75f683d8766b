"""The answers that the public code reads from completions of GSM8K, ARC and MATH."""

import random
import re
from collections.abc import Sequence

from sva.tasks.labels import OTHER

_LABELS = "ABCDE"


def number(text: str) -> float | None:
    """GSM8K: the last run of digits with at most one point; signs are dropped and "1,080" reads 80."""
    found = re.findall(r"\d*\.?\d+", text)
    return float(found[-1]) if found else None


def gold_number(solution: str) -> int | None:
    """GSM8K's right answer by the same rule, cut to a whole number: of "#### 1,080" it is 80."""
    gold = number(solution)
    return None if gold is None else int(gold)


def letter(text: str) -> str | None:
    """ARC: what follows "answer is", with no word boundary ("answer is Because" reads B); else "Answer:"; else the
    last capital A to J that stands alone."""
    if said := re.search(r"answer is \(?([A-J])", text):
        return said[1]
    # The last one in the first line that has any; the letter may stand in a later line.
    line_end = None
    found = None
    for match in re.finditer(r"(?=[aA]nswer:\s*([A-J]))", text):
        if line_end is None:
            line_end = text.find("\n", match.start()) % (len(text) + 1)
        if match.start() < line_end:
            found = match[1]
    if found:
        return found
    for match in re.finditer(r"\b[A-J]\b", text):
        found = match[0]
    return found


def lucky(num_options: int) -> str:
    """The option that counts as chosen where nothing was: always the same one, A of 4 or 5 and C of 3."""
    return _LABELS[random.Random(42).randint(0, num_options - 1)]


def solution_answer(completion: str) -> str | None:
    """MATH: what follows the last "The answer is: " up to a full stop at a line's end, else the last \\boxed{}."""
    _, said, rest = completion.rpartition("The answer is: ")
    if said:
        return rest.partition(".\n")[0].strip().removesuffix(".").strip()
    return boxed(completion)


def boxed(text: str) -> str | None:
    """MATH's right answer: what the last \\boxed{} of the solution holds; None where the last is not written so."""
    start = text.rfind("\\boxed")
    if start < 0 or not text.startswith("\\boxed{", start):
        return None
    depth = 0
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + len("\\boxed{") : start + brace.start()]
    return None


def category(text: str, categories: Sequence[str]) -> str:
    """The first pass: the first boxed word, where it is one of the lower-case names letter for letter; else "other"."""
    found = re.search(r"\\boxed\{([^{}]*)\}", text)
    return found[1] if found and found[1] in categories else OTHER
