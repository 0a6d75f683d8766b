"""Whether a finished run had anything to learn from; where it had not, what to try."""

from collections.abc import Mapping, Sequence
from typing import Any

from sva.evaluation.evaluate import Record

_READINGS, _WIDTH = 3, 60  # answers shown, and characters of each


def nothing_learned(rows: Sequence[Mapping[str, Any]], before: Sequence[Record]) -> list[str]:
    """One line where no sampled answer of a run was ever right, or else every advantage was zero; usually none.

    Args:
      rows: the metrics of all its steps; those of given answers, which have no `accuracy`, are no sign of either.
      before: the base model's graded answers, of which some show how the grader reads.
    """
    sampled = [row for row in rows if row.get("accuracy") is not None]
    if not sampled:
        return []
    steps = f"{len(sampled)} step{'s' if len(sampled) > 1 else ''}"
    if not any(row["accuracy"] for row in sampled):
        return [
            f"no sampled answer was right in {steps}, so nothing said what a right one is; try an easier task or more "
            f"samples (rollout.samples), or look whether the grader reads answers as you mean them{_readings(before)}"
        ]
    if all(row.get("zero_advantages") == 1 for row in sampled):
        return [
            f"every advantage was zero in {steps}: all samples of a prompt earned the same reward, so nothing was "
            "learned from them; try more samples (rollout.samples), a higher rollout.temperature, a task that is "
            "neither too easy nor too hard, or reinforce.baseline=batch"
        ]
    return []


def _readings(records: Sequence[Record]) -> str:
    """How the grader read the first few answers: ": 'it is 4' as 4 (right), 'five' as nothing (wrong)"."""
    shown = [
        f"{_short(record.completion)} as {'nothing' if record.answer is None else _short(record.answer)} "
        f"({'right' if record.correct else 'wrong'})"
        for record in records[:_READINGS]
    ]
    return f": the base's first answers were read {', '.join(shown)}" if shown else ""


def _short(text: str) -> str:
    return repr(text if len(text) <= _WIDTH else f"{text[: _WIDTH // 2]} ... {text[-_WIDTH // 2 :]}")
