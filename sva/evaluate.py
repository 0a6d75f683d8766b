"""Greedy answers to held-out prompts, graded, one record each."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sva import chat
from sva.files import write_atomically
from sva.lm import LM
from sva.tasks.base import Example, Task


class Item(NamedTuple):
    """One held-out prompt and the task that grades it."""

    task: Task
    example: Example

    @property
    def question(self) -> str:
        """The user turn."""
        return self.task.question(self.example)


class Record(NamedTuple):
    """One graded answer."""

    task: str
    question: str
    completion: str
    answer: str | None  # as the grader read it
    correct: bool
    tokens: int


def items(task: Task, split: str, size: int) -> list[Item]:
    """The first `size` prompts of a split, all where it has fewer."""
    source = task.source(split)
    return [Item(task, source[i]) for i in range(min(size, len(source)))]


def batches(todo: Sequence[Item], batch_size: int, title: str, *, progress: bool = True) -> Iterator[Sequence[Item]]:
    """The items in order, batch by batch, with a progress bar on stderr."""
    with tqdm(total=len(todo), desc=title, unit="prompt", file=sys.stderr, disable=not progress) as bar:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            yield batch
            bar.update(len(batch))


def grade(batch: Sequence[Item], completions: Sequence[str], lengths: Any) -> list[Record]:
    """One record an item."""
    records = []
    for (task, example), text, length in zip(batch, completions, np.asarray(lengths), strict=True):
        verdict = task.grade(text, example)
        question = task.question(example)
        records.append(Record(task.name, question, text, verdict.answer, verdict.correct, int(length)))
    return records


def evaluate(
    lm: LM,
    todo: Sequence[Item],
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    title: str = "evaluate",
    progress: bool = True,
) -> list[Record]:
    """One record an item, in order: greedy answers of `lm` (merge an expert first to evaluate it).

    Args:
      max_new_tokens: of every answer; by default the largest budget among the items' tasks.
    """
    budget = max_new_tokens or max(item.task.max_new_tokens for item in todo)
    eos = chat.end_tokens(lm)
    records = []
    for batch in batches(todo, batch_size, title, progress=progress):
        ids, mask = chat.encode(lm, [chat.render(lm, item.question) for item in batch])
        out = lm.generate(ids, mask, budget, eos)
        records += grade(batch, chat.decode(lm, out.tokens, out.lengths), out.lengths)
    return records


def kept(path: Path, todo: Sequence[Item], answers: Callable[[], list[Record]]) -> list[Record]:
    """The records at `path` where they answer these items in this order; otherwise those that `answers` makes, kept.

    Whose answers they are is for the caller to put into the path.
    """
    if path.exists():
        records = [Record(**json.loads(line)) for line in path.read_text().splitlines()]
        if [(record.task, record.question) for record in records] == [(item.task.name, item.question) for item in todo]:
            return records
    records = answers()
    text = "".join(json.dumps(record._asdict()) + "\n" for record in records)
    write_atomically(path, lambda p: p.write_text(text))
    return records
