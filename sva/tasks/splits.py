"""Which rows are trained on, selected on and reported: two policies, and the check that they do not meet.

clean      no row of train or validation says what a row of a later split says, and `require_apart` refuses an
           expert whose training rows are among those reported on
reference  what Transformer-Squared's public code does (SakanaAI/self-adaptive-llms, commit 03a41ae), overlaps included:
           GSM8K and ARC-Easy train on the even rows of upstream's train part and select on the odd ones; ARC-Challenge
           and MATH, which it only tests on, choose their few-shot examples from the very rows that they report
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence

from sva.tasks.base import Example, Task
from sva.utils.errors import UserError

POLICIES = ("clean", "reference")

_MARKS = re.compile(r"(?<!\d)[.,;:!?\"'`()]+|[.,;:!?\"'`()]+(?!\d)")


def normalised(text: str) -> str:
    """`text` without what does not change a question: case, white space, quotes, punctuation between words."""
    text = (
        unicodedata.normalize("NFKC", text).casefold().translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
    )
    return " ".join(_MARKS.sub(" ", text).split())


def apart(rows: Sequence[str], later: Iterable[str]) -> list[int]:
    """The places of the texts in `rows` that do not occur, normalised, among `later`."""
    taken = {normalised(text) for text in later}
    return [i for i, text in enumerate(rows) if normalised(text) not in taken]


def overlap(trained: Iterable[str], reported: Iterable[str]) -> list[str]:
    """The texts of `reported` that occur, normalised, among `trained`."""
    seen = {normalised(text) for text in trained}
    return [text for text in reported if normalised(text) in seen]


def require_apart(trained: Task, reported: Task, split: str, parts: Collection[str] = ("train", "validation")) -> None:
    """Raises UserError where a row of the reported split was trained or selected on; only under `clean`.

    Args:
      trained: the task that an expert was made with.
      reported, split: what is about to be evaluated.
      parts: the splits of `trained` that were used.
    """
    if reported.splits != "clean":
        return
    if trained == reported and split in parts:
        raise UserError(
            f"task {reported.name}: split {split} was trained or selected on; evaluate another, or say splits=reference"
        )
    used = [text for part in parts for text in _texts(trained, trained.source(part))]
    both = overlap(used, _texts(reported, reported.source(split)))
    if both:
        raise UserError(
            f"task {reported.name}: {len(both)} rows of {split} are among those that {trained.name} trains or "
            f"selects on (one is {both[0][:60]!r}); leave them out, or say splits=reference"
        )


def _texts(task: Task, rows: Iterable[Example]) -> list[str]:
    return [task.text(row) for row in rows]
