"""A user's own task: a file with one {"prompt": ..., "answer": ...} a line."""

import codecs
import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sva.tasks import math_hendrycks
from sva.tasks.base import SPLITS, Example, Grade, Task
from sva.tasks.grading import amounts, answers
from sva.tasks.labels import OTHER
from sva.tasks.splits import normalised
from sva.utils.errors import UserError
from sva.utils.files import decoded
from sva.utils.remote import local_path

GRADERS = {
    "exact": "text",
    **{form: form for form in answers.FORMS if form != "text"},
    "solution": "solution",
    "math": "math",
}
"""Values of a line's "grader": "exact" compares whole texts (but for case, quotes, a trailing full stop),
a form of `answers.FORMS` the one answer of that form, "solution" the number that a solution ends in, "math"
the expression that it ends in, compared by value."""


def split_of(prompt: str) -> str:
    """Which split a prompt belongs to: 80 % train, 10 % validation, 10 % test, by a hash of its words.

    A line keeps its split whatever other lines the file has; case and white space do not matter, so a prompt
    that occurs twice is never in two splits.
    """
    words = " ".join(prompt.casefold().split())
    share = int.from_bytes(hashlib.blake2s(words.encode(), digest_size=4).digest(), "big") % 100
    return "train" if share < 80 else "validation" if share < 90 else "test"


@dataclass(frozen=True, kw_only=True)
class Jsonl(Task):
    """The lines of a file; made by `from_jsonl`."""

    path: str
    form: str = "exact"  # the grader of lines that name none; one of `GRADERS`

    def _rows(self, split: str) -> Sequence[Example]:
        rows = read(Path(self.path), self.form)
        places: dict[str, str] = {}
        for row in rows:
            place = split_of(row["prompt"])
            if places.setdefault(normalised(row["prompt"]), place) != place:
                raise UserError(
                    f"{self.path}: {row['prompt']!r} is in two splits, but for punctuation; keep one of them"
                )
        chosen = [row for row in rows if split_of(row["prompt"]) == split]
        if not chosen:
            sizes = Counter(split_of(row["prompt"]) for row in rows)
            counts = ", ".join(f"{name} {sizes[name]}" for name in SPLITS)
            raise UserError(f"{self.path}: none of its {len(rows)} lines falls in {split} ({counts}); add lines")
        return chosen

    def question(self, example: Example) -> str:
        return example["prompt"]

    def grade(self, completion: str, example: Example) -> Grade:
        return _grade(completion, example)


def read(path: Path, grader: str) -> list[Example]:
    """The rows of a file, checked: prompt, answer and grader (`grader` where a line names none) are texts.

    Raises:
      UserError: no such file, or a line that is not what it should be, by its number.
    """
    if not path.is_file():
        raise UserError(f"task file {path} does not exist")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            rows.append(_row(line, grader, f"{path}, line {number}"))
    if not rows:
        raise UserError(f'{path} is empty; write one {{"prompt": ..., "answer": ...}} a line')
    return rows


def _row(line: bytes, grader: str, where: str) -> Example:
    try:
        row: Any = json.loads(decoded(line, "it"))
    except ValueError as error:
        raise UserError(f"{where} is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f'{where} is not an object like {{"prompt": ..., "answer": ...}}')
    return checked(row, grader, where)


def checked(row: Example, grader: str, where: str) -> Example:
    """The row with its answer as text and its grader, `grader` where it names none.

    Raises:
      UserError: it lacks a field, or its answer cannot be read by its grader; `where` names the row.
    """
    for name in ("prompt", "answer"):
        if name not in row:
            raise UserError(f"{where} has no {name!r}; it has {', '.join(map(repr, row)) or 'nothing'}")
    for name in difflib.get_close_matches("grader", row.keys() - {"grader"}):
        raise UserError(f"{where} has {name!r}; did you mean 'grader'?")
    answer = row["answer"]
    is_integer = isinstance(answer, int) and not isinstance(answer, bool)
    fields: dict[str, Any] = {"grader": grader, **row, "answer": str(answer) if is_integer else answer}
    for name in ("prompt", "answer", "grader"):
        if not isinstance(fields[name], str) or not fields[name].strip():
            raise UserError(f"{where}: {name!r} is {fields[name]!r}, not a text")
    if fields["grader"] not in GRADERS:
        raise UserError(f"{where}: no grader {fields['grader']!r}; there are {', '.join(GRADERS)}")
    if _grade(fields["answer"], fields).answer is None:
        raise UserError(f"{where}: {_unreadable(fields)}")
    return fields


def _unreadable(row: Example) -> str:
    """The message for an answer that its grader cannot read, with the graders that can."""
    gold = row["answer"]
    able = [name for name in GRADERS if _grade(gold, {**row, "grader": name}).answer is not None]
    mend = f'these can: {", ".join(able)} (the line\'s "grader")' if able else "no grader can; write it in another way"
    return f"the grader {row['grader']!r} cannot read the answer {gold!r}; {mend}"


def _grade(completion: str, row: Example) -> Grade:
    form = GRADERS[row["grader"]]
    if form == "math":
        return math_hendrycks.strict(completion, row["answer"])
    if form != "solution":
        return answers.grade(completion, form, [row["answer"]])
    answer = amounts.final_number(completion)
    return Grade(answer is not None and answer == amounts.final_number(row["answer"]), answer)


def from_jsonl(
    path: str | Path,
    *,
    grader: str = "exact",
    label: str | None = None,
    description: str = "",
    max_new_tokens: int = 64,
) -> Jsonl:
    """A task from a file with one {"prompt": ..., "answer": ...} a line; a line may name its own "grader".

    Lines are split by `split_of`: 80 % train, 10 % validation, 10 % test.

    Args:
      grader: for lines that name none; one of `GRADERS`.
      label: the one word that a dispatcher answers with, and `description` explains; by default the file's name, for
        the label its letters and digits alone.
    Raises:
      UserError: no such file; a line that is not JSON or lacks a field; an answer its grader cannot read.
    """
    path = local_path(path, "a task's file")
    word = re.sub(r"[\W_]", "", path.stem.lower())
    task = Jsonl(
        name=path.stem,
        label=label or ("own" if word in ("", OTHER) else word),
        description=description or path.stem.replace("_", " "),
        max_new_tokens=max_new_tokens,
        licence="the user's own",
        origin=path.name,
        path=str(path),
        form=grader,
    )
    read(path, grader)
    return task
