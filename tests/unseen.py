"""The strict graders over tests/completions/unseen: completions in the manner of small models, with a reader's verdict.

Each row has `completion`, the verdict that it deserves (`strict`) and the reason for it (`why`); the rest is its task.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sva.tasks
from sva.tasks import mbpp
from sva.tasks.base import Example, Grade, Task

FILES = ("gsm8k", "arc", "math", "programs")
_FOLDER = Path(__file__).parent / "completions" / "unseen"
_LEVEL = "best-effort"  # these programs are our own
_CALL_SECS = 5  # what HumanEval's tests give a call


def rows(file: str) -> list[dict[str, Any]]:
    """The completions of one of `FILES`, in the order of its lines."""
    return [json.loads(line) for line in (_FOLDER / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()]


def wrong(file: str) -> list[dict[str, Any]]:
    """The rows of a file that the strict grader gets wrong: its line, what is expected and what it said."""
    table = rows(file)
    grades = _grades(file, table)
    return [
        {
            "line": number,
            "expected": "right" if row["strict"] else "wrong",
            "got": "right" if grade.correct else "wrong",
            "why": row["why"],
            "gold": row.get("gold") or row["function"],
            "answer": grade.answer,
            "reason": grade.reason,
        }
        for number, (row, grade) in enumerate(zip(table, grades, strict=True), start=1)
        if grade.correct != row["strict"]
    ]


def _grades(file: str, table: list[dict[str, Any]]) -> list[Grade]:
    if file != "programs":
        task = sva.tasks.task({"arc": "arc_challenge"}.get(file, file), "strict")
        return task.grade_many([row["completion"] for row in table], [_example(file, row) for row in table])
    grades: dict[int, Grade] = {}
    for name, task in _program_tasks().items():
        places = [i for i, row in enumerate(table) if row["task"] == name]
        completions = [table[i]["completion"] for i in places]
        examples = [_program_example(table[i]) for i in places]
        grades |= zip(places, task.grade_many(completions, examples), strict=True)
    return [grades[i] for i in range(len(table))]


def _example(file: str, row: dict[str, Any]) -> Example:
    """The question as a row of the benchmark."""
    if file == "gsm8k":
        return {"question": row["question"], "answer": f"Some reasoning.\n#### {row['gold']}"}
    if file == "math":
        return {"problem": row["problem"], "solution": f"Some reasoning gives $\\boxed{{{row['gold']}}}$."}
    choices = {"label": list(row["labels"]), "text": row["options"]}
    return {"question": row["question"], "choices": choices, "answerKey": row["gold"]}


def _program_example(row: dict[str, Any]) -> Example:
    """A row of HumanEval, whose tests are a function `check`; MBPP's take the same (see `_Mbpp`)."""
    check = "def check(candidate):\n" + "".join(f"    {line}\n" for line in row["tests"])
    return {"entry_point": row["function"], "prompt": row["prompt"], "test": check}


@dataclass(frozen=True, kw_only=True)
class _Mbpp(mbpp.Mbpp):
    """MBPP with assertions for tests instead of a reference's answers to inputs."""

    def tests(self, example: Example) -> list[tuple[str, Any]]:
        name = example["entry_point"]
        calls = f"{name} = lambda *args: call_within({_CALL_SECS}, {name!r}, *args)\ncheck({name})\n"
        return [(example["test"] + calls, None)]


def _program_tasks() -> dict[str, Task]:
    humaneval = sva.tasks.task("humaneval", "strict", sandbox=_LEVEL)
    return {"mbpp": _Mbpp(grader="strict", sandbox=_LEVEL), "humaneval": humaneval}
