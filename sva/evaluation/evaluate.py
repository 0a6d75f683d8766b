"""Greedy answers to held-out prompts, graded, one record each."""

import contextlib
import itertools
import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sva.evaluation.grading import grade_many
from sva.evaluation.likelihood import BATCH_TOKENS, option_logprobs
from sva.generation import chat
from sva.generation.complete import CompleteOptions, complete
from sva.generation.engine import EngineConfig, prompts_at_once
from sva.generation.lm import LM
from sva.generation.stop_strings import cut
from sva.tasks.base import Example, Grade, Task, reason
from sva.utils.files import read_lines, write_atomically
from sva.utils.jsonl import Records
from sva.utils.progress import progress_bar

_REFILL = 64  # tokens of budget from which on a row that ends early is worth refilling
_ROUNDS = 16  # times the rows that decode together, handed to the engine at once
_FILLED = 4  # times the prompts that are read together, handed over at once to be scored
_TOKENS = 64  # of a prompt with options, about


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
    reason: str = ""  # see `sva.tasks.base.reason`
    prompt: str = ""  # the text that the model was given
    scores: tuple[float, ...] = ()  # nats of each option, where options were scored
    right_option: int = -1  # the place of the right one among them
    label: str = ""  # of two passes: what the first one chose,
    prob: float = 0.0  # how sure it was,
    right_label: str = ""  # what it should have chosen,
    first: dict[str, Any] | None = None  # and what each pass took: seconds, tokens, flops
    second: dict[str, Any] | None = None


def items(task: Task, split: str, size: int) -> list[Item]:
    """The first `size` prompts of a split, all where it has fewer."""
    source = task.source(split)
    return [Item(task, source[i]) for i in range(min(size, len(source)))]


def mixed(tasks: Sequence[Task], split: str, size: int) -> list[Item]:
    """The first `size` prompts of each task, one of each in turn."""
    rows = [items(task, split, size) for task in tasks]
    return [item for turn in itertools.zip_longest(*rows) for item in turn if item is not None]


def batches(
    todo: Sequence[Item], batch_size: int, title: str, *, progress: bool = True
) -> Generator[Sequence[Item], None, None]:
    """The items in order, batch by batch, with a progress bar on stderr."""
    with progress_bar(title, len(todo), "prompt", hidden=not progress) as bar:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            yield batch
            bar.update(len(batch))


def grade(
    batch: Sequence[Item], completions: Sequence[str], lengths: Any, prompts: Sequence[str] | None = None
) -> list[Record]:
    """One record an item; what follows a task's stop text is not part of the answer."""
    texts = [cut(text, item.task.stop) for text, item in zip(completions, batch, strict=True)]
    verdicts: dict[int, Grade] = {}
    for task in dict.fromkeys(item.task for item in batch):
        places = [i for i, item in enumerate(batch) if item.task == task]
        found = grade_many(task, [texts[i] for i in places], [batch[i].example for i in places])
        verdicts |= zip(places, found, strict=True)
    prompts = prompts or [""] * len(batch)
    return [
        Record(
            item.task.name,
            item.question,
            text,
            verdict.answer,
            verdict.correct,
            int(length),
            reason(verdict),
            prompt,
        )
        for item, text, verdict, length, prompt in zip(
            batch, texts, map(verdicts.__getitem__, range(len(batch))), np.asarray(lengths), prompts, strict=True
        )
    ]


Answer = Callable[[Sequence[Item]], list[Record]]
"""A function that answers and grades one batch of items; the one place that knows how answers come about."""


def greedy(lm: LM, max_new_tokens: int, rows: int, *, progress: bool = True) -> tuple[Answer, int]:
    """Greedy answers by `lm`, `rows` at a time, and the number of items that it wants in a batch.

    Answers with a long budget end at very different lengths: through the engine a row that ends takes the next
    prompt, in batches of many times the rows. Short ones wait for their longest.
    """
    if max_new_tokens < _REFILL:
        return by_generation(lm, max_new_tokens), rows
    return by_refilling(lm, max_new_tokens, rows, progress=progress), _ROUNDS * rows


def by_refilling(lm: LM, max_new_tokens: int, rows: int, *, progress: bool = True) -> Answer:
    """Greedy answers of `lm`, through the chat template and the engine, with `rows` decoded at once."""
    cfg = EngineConfig(rows=rows, prompts=prompts_at_once(rows))
    options = CompleteOptions(engine=cfg, title="answers" if progress else None)

    def answer(batch: Sequence[Item]) -> list[Record]:
        prompts = _prompts(lm, batch)
        done = complete(lm, chat.tokenize(lm, prompts), max_new_tokens, stops=stops_of(lm, batch), options=options)
        found = sorted(done, key=lambda completion: completion.prompt)
        return grade(batch, [each.text for each in found], [len(each.tokens) for each in found], prompts)

    return answer


def stops_of(lm: LM, batch: Sequence[Item]) -> list[tuple[str, ...]]:
    """The stop texts of each item."""
    return [chat.stops(lm, item.task) for item in batch]


def _prompts(lm: LM, batch: Sequence[Item]) -> list[str]:
    """The rendered prompt of each item."""
    return [chat.render_example(lm, task, example) for task, example in batch]


def by_generation(lm: LM, max_new_tokens: int) -> Answer:
    """Greedy answers of `lm`, through the chat template, in one batch that runs until its longest answer ends."""

    def answer(batch: Sequence[Item]) -> list[Record]:
        prompts, stops = _prompts(lm, batch), stops_of(lm, batch)
        of_all = [stop for stop in stops[0] if all(stop in each for each in stops)]
        out = lm.generate(*chat.encode(lm, prompts), max_new_tokens, chat.end_tokens(lm, of_all))
        found = chat.decode_until(lm, out.tokens, out.lengths, stops)
        return grade(batch, found.texts, found.lengths, prompts)

    return answer


def choosing(lm: LM, rows: int) -> tuple[Answer, int]:
    """`by_likelihood`, the tokens of `rows` prompts read together, and the number of items that it wants in a batch.

    Rows of many prompts are filled as far as they can be, so it wants several times as many.
    """
    return by_likelihood(lm, rows * _TOKENS), rows * _FILLED


def by_likelihood(lm: LM, batch_tokens: int = BATCH_TOKENS) -> Answer:
    """The option that `lm` finds likeliest per character, as public leaderboards' normalised accuracy has it.

    A record's `scores` hold the nats of every option, so that `likeliest` gives the unnormalised choice as well.
    """

    def answer(batch: Sequence[Item]) -> list[Record]:
        asked = [item.task.options(item.example) for item in batch]
        prompts, texts = [ask.prompt for ask in asked], [ask.texts for ask in asked]
        scores = option_logprobs(lm, prompts, texts, batch_tokens=batch_tokens)
        records = []
        for item, ask, nats in zip(batch, asked, scores, strict=True):
            chosen = likeliest(nats, [len(text) for text in ask.texts])
            right = chosen == ask.right
            verdict = ("right" if right else "wrong", ask.prompt, nats, ask.right)
            text = ask.texts[chosen]
            records.append(Record(item.task.name, item.question, text, ask.labels[chosen], right, 0, *verdict))
        return records

    return answer


def likeliest(nats: Sequence[float], lengths: Sequence[int] | None = None) -> int:
    """The place of the highest log-probability, per character where lengths are given; the first of equals."""
    values = nats if lengths is None else [x / n for x, n in zip(nats, lengths, strict=True)]
    return max(range(len(values)), key=values.__getitem__)


def recorded(
    file: Records,
    todo: Sequence[Item],
    answer: Answer,
    batch_size: int,
    title: str = "evaluate",
    *,
    progress: bool = True,
    numbers: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """The rows of every item, in order: those of `file`, and those that `answer` makes, appended batch by batch.

    A batch is always the same items, so that a run that was stopped ends with what it would have ended with.

    Args:
      numbers: the `index` of each item's row, where they are not 0, 1, 2, ...
    """
    numbers = range(len(todo)) if numbers is None else numbers
    places_of = {number: place for place, number in enumerate(numbers)}
    rows = {places_of[record["index"]]: record for record in file.records}
    with progress_bar(title, len(todo), "prompt", initial=len(rows), hidden=not progress) as bar:
        for start in range(0, len(todo), batch_size):
            places = range(start, min(start + batch_size, len(todo)))
            missing = [i for i in places if i not in rows]
            records = answer([todo[i] for i in places]) if missing else []
            for i in missing:
                rows[i] = file.add({"index": numbers[i], **records[i - start]._asdict()})
            bar.update(len(missing))
    return [rows[i] for i in range(len(todo))]


def evaluate(
    lm: LM,
    todo: Task | Sequence[Item],
    *,
    split: str = "test",
    size: int = 200,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    title: str = "evaluate",
    progress: bool = True,
) -> list[Record]:
    """One record an item, in order: greedy answers of `lm` (merge an expert first to evaluate it).

    Args:
      todo: a task, or the items themselves.
      split: of a task, the split whose rows are asked.
      size: of a task, rows at most, from the start of the split.
      batch_size: prompts that are answered at once.
      max_new_tokens: of every answer; by default the largest budget among the items' tasks.
      title: of the progress bar on stderr.
    """
    todo = items(todo, split, size) if isinstance(todo, Task) else todo
    budget = max_new_tokens or max(item.task.max_new_tokens for item in todo)
    answer, rows = greedy(lm, budget, batch_size, progress=progress)
    with contextlib.closing(batches(todo, rows, title, progress=progress)) as parts:  # an error ends the bar first
        return [record for batch in parts for record in answer(batch)]


def stored(path: Path) -> list[Record]:
    """The records that `kept` wrote to a file."""
    rows = [json.loads(line) for line in read_lines(path) if line.strip()]
    return [Record(**row | {"scores": tuple(row.get("scores", ()))}) for row in rows]


def kept_before(path: Path, todo: Sequence[Item]) -> list[Record] | None:
    """The records at `path` where they answer these items in this order, else None."""
    if not path.exists():
        return None
    records = stored(path)
    asked = [(item.task.name, item.question) for item in todo]
    return records if [(record.task, record.question) for record in records] == asked else None


def kept(path: Path, todo: Sequence[Item], answers: Callable[[], list[Record]]) -> list[Record]:
    """The records at `path` where they answer these items in this order; otherwise those that `answers` makes, kept.

    Whose answers they are is for the caller to put into the path.
    """
    records = kept_before(path, todo)
    if records is not None:
        return records
    records = answers()
    text = "".join(json.dumps(record._asdict()) + "\n" for record in records)
    write_atomically(path, lambda p: p.write_text(text))
    return records
