"""HumanEval: functions from their docstrings (Chen et al., arXiv 2107.03374), evalplus' tests where a file has them."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sva.tasks import code
from sva.tasks.base import Example
from sva.tasks.sources import upstream
from sva.utils.errors import UserError
from sva.utils.paths import data_dir

FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
CALL_SECS = 5  # of wall time; the slowest reference takes a tenth of a second
PLUS_FILE, PLUS_FIELDS = "humanevalplus.jsonl.gz", ("plus_input", "atol")
FILE = upstream.File("humaneval", "b19293e42932e70278b8e5ed83f8c82879cf34e0d3a44cc580f060b7cdaba4f8")
_PUBLISHED = (
    "https://raw.githubusercontent.com/openai/human-eval/"
    "6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz"
)


def rows() -> list[upstream.Row]:
    """All 164 rows, with the fields of evalplus' tests where the user's folder of data has `PLUS_FILE`.

    Raises:
      UserError: there is no data, or a file is damaged or lacks a task.
    """
    plain = upstream.read(FILE, FIELDS, "github.com", lambda: upstream.json_lines(_PUBLISHED))
    path = (data_dir() or Path()) / PLUS_FILE
    if not path.is_file():
        return plain
    try:
        plus = {row["task_id"]: row for row in map(json.loads, gzip.decompress(path.read_bytes()).splitlines())}
        return [row | {name: plus[row["task_id"]][name] for name in PLUS_FIELDS} for row in plain]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or lacks a task ({error}); delete it or copy it anew") from error


@dataclass(frozen=True, kw_only=True)
class HumanEval(code.CodeTask):
    """The 164 functions, all of them to test on; under reference splits for the few-shot search too, as there."""

    name: str = "humaneval"
    licence: str = "MIT"
    origin: str = "github.com/openai/human-eval"
    is_continued: bool = True

    def _rows(self, split: str) -> Sequence[Example]:
        if split != "test" and self.splits != "reference":
            raise UserError(f"task {self.name} has no split {split!r}; all of it is for testing")
        return rows()

    def prefill(self, example: Example) -> str:
        return f"```python\n{example['prompt']}"

    def question(self, example: Example) -> str:
        if self.prompt == "reference":
            return f"```python\n{example['prompt'].strip()}\n```"
        return (
            f"Complete this function:\n```python\n{example['prompt'].strip()}\n```\n\n"
            "Answer with one block of Python code that holds the whole function."
        )

    def tests(self, example: Example) -> list[tuple[str, Any]]:
        name = example["entry_point"]
        calling = f"\ncandidate = {name} = lambda *args: call_within({CALL_SECS}, {name!r}, *args)\ncheck(candidate)\n"
        base = (example["prompt"] + "\n" + example["test"] + calling, None)
        if "plus_input" not in example:
            return [base]
        reference = example["prompt"] + example["canonical_solution"]
        return [base, code.comparison(name, reference, example["plus_input"], example["atol"])]
