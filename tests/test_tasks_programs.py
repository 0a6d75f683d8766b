"""Programs in completions: the case of code at top level, and a table of completions with their verdicts."""

from pathlib import Path
from typing import NamedTuple

import pytest

from sva.sandbox import Job
from sva.tasks import code

LEVEL = "best-effort"  # what CI's machine can do is for test_sandbox.py to say
TABLE = Path(__file__).parent / "completions" / "programs.txt"
PROMPT = 'from typing import List\n\ndef helper(a):\n    return a\n\n\ndef add(a, b):\n    """Add."""\n'


class Row(NamedTuple):
    title: str
    completion: str
    name: str
    prompt: str
    test: str
    is_right: bool


def rows() -> list[Row]:
    """The table; a name with a plus continues `PROMPT`."""
    made = []
    for part in TABLE.read_text().removeprefix("#### ").split("\n#### "):
        head, _, completion = part.partition("\n")
        verdict, name, test, title = head.split(" | ")
        assert verdict in ("passed", "failed")
        prompt = PROMPT if name.endswith("+") else ""
        made.append(Row(title, completion.removesuffix("\n"), name.rstrip("+"), prompt, test, verdict == "passed"))
    return made


def verdicts(table: list[Row]):
    """Whether each program passes, and why not, run as the tasks run theirs."""
    programs = [code.extract(row.completion, row.name, row.prompt) for row in table]
    jobs = [
        Job(program or "", f"{row.name} = lambda *args: call_within(5, {row.name!r}, *args)\nassert {row.test}")
        for program, row in zip(programs, table, strict=True)
    ]
    return code.shared_sandbox(LEVEL).run(jobs, code.LIMITS)


def wrong(table: list[Row]) -> list[tuple[str, str]]:
    """The rows whose verdict is not theirs."""
    ran = verdicts(table)
    return [(row.title, v.reason or "passed") for row, v in zip(table, ran, strict=True) if v.passed != row.is_right]


def test_every_completion_of_the_table_gets_its_verdict():
    table = rows()
    assert len(table) >= 80
    assert sum(not row.is_right for row in table) >= 15
    assert wrong(table) == []
