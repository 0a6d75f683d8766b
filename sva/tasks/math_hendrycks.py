"""MATH: competition mathematics, answered by an expression (Hendrycks et al., arXiv 2103.03874)."""

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sva.tasks import math_answers, public_rules, splits, upstream
from sva.tasks.base import Example, Grade, Task
from sva.tasks.worker import Verdict, shared
from sva.utils.errors import UserError
from sva.utils.paths import data_dir

_LONGEST = 1_000  # characters of an answer; the longest right one of MATH has 159
FIELDS = ("problem", "level", "type", "solution")


def place() -> Path:
    """The user's copy: a folder MATH (train/ and test/, a JSON file for each problem) or math_train.jsonl[.gz] and
    math_test.jsonl[.gz], in `data_dir()`.

    Raises:
      UserError: neither is there; MATH is not fetched, for its publisher has withdrawn it.
    """
    folder = data_dir()
    if folder and (folder / "MATH" / "test").is_dir():
        return folder / "MATH"
    if folder and _file(folder, "test"):
        return folder
    searched = folder or "$SVA_DATA (not set)"
    raise UserError(
        f"no data: neither a folder MATH with train/ and test/ nor math_test.jsonl is in {searched}; set $SVA_DATA "
        "to a folder that has one"
    )


def _file(folder: Path, split: str) -> Path | None:
    return next((path for end in ("", ".gz") if (path := folder / f"math_{split}.jsonl{end}").is_file()), None)


def _files(split: str) -> list[Path]:
    root = place()
    if root.name == "MATH":
        return sorted((root / split).glob("*/*.json"), key=lambda path: (path.parent.name, len(path.name), path.name))
    file = _file(root, split)
    return [file] if file else []


def fingerprint() -> str:
    """Changes with the user's files: their names, sizes and times."""
    content = hashlib.blake2s(digest_size=6)
    for split in ("train", "test"):
        for path in _files(split):
            content.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}\n".encode())
    return content.hexdigest()


def upstream_rows(split: str) -> list[upstream.Row]:
    """All problems of upstream's train or test part, by subject and number, or in the order of the file.

    Raises:
      UserError: there are none, a file is damaged, or a problem has no boxed answer; each by its file and line.
    """
    files = _files(split)
    if not files:
        raise UserError(f"no data: {place()} has no {split} problems of MATH")
    rows = []
    for path in files:
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (OSError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}); copy it anew") from error
        lines = [content] if path.suffix == ".json" else content.splitlines()
        for number, line in enumerate(lines, start=1):
            where = str(path) if path.suffix == ".json" else f"{path}, line {number}"
            try:
                row = json.loads(line)
                row = {name: str(row.get(name, "")) for name in FIELDS} | {
                    name: str(row[name]) for name in ("problem", "solution")
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"{where} is no problem of MATH ({error!r}); it needs problem and solution") from error
            if math_answers.boxed(row["solution"]) is None:
                raise UserError(f"{where}: the solution has no \\boxed{{}} answer")
            rows.append(row)
    return rows


@lru_cache(maxsize=4)
def _clean(split: str, fingerprint: str) -> tuple[int, ...]:
    """The rows of upstream's train part that make up train or validation, of the files with that fingerprint."""
    from sva.tasks import builders

    train, test = ([row["problem"] for row in builders.math(part)] for part in ("train", "test"))
    validation = [i for i in splits.apart(train, test) if i % 10 == 9]
    if split == "validation":
        return tuple(validation)
    later = [*test, *(train[i] for i in validation)]
    return tuple(i for i in splits.apart(train, later) if i % 10 != 9)


@dataclass(frozen=True, kw_only=True)
class Math(Task):
    """Every tenth problem of upstream's train part validates, the others train; upstream's test part tests.

    Problems that occur again in a later part are left out. Under reference splits the test part is all there is: the
    public code only tests on MATH.
    """

    name: str = "math"
    label: str = "math"
    description: str = "a mathematical problem"
    max_new_tokens: int = 1024
    licence: str = "MIT"
    origin: str = "github.com/hendrycks/math"

    def _rows(self, split: str) -> Sequence[Example]:
        from sva.tasks import builders  # tensorflow-datasets takes half a second to import

        if split == "test" or self.splits == "reference":
            return builders.math("test")
        return builders.Rows(builders.math("train"), _clean(split, fingerprint()))

    @property
    def system(self) -> str:
        if self.prompt != "reference":
            return ""
        return "Solve the question below by reasoning step by step,and put the final answer within \\boxed{}."

    def text(self, example: Example) -> str:
        return example["problem"]

    def question(self, example: Example) -> str:
        if self.prompt == "reference":
            return example["problem"]
        return f"{example['problem']}\n\nSolve this step by step and put the final answer in \\boxed{{}}."

    def answer(self, example: Example) -> str:
        return example["solution"]

    def grade(self, completion: str, example: Example) -> Grade:
        return (reference if self.grader == "reference" else strict)(completion, gold(example))


def gold(example: Example) -> str:
    """The right answer: what the last box of the solution holds."""
    found = math_answers.boxed(example["solution"])
    assert found is not None, example
    return found


def compare(policy: str, gold: str, answer: str) -> Verdict:
    """Whether two answers, LaTeX without the dollars around it or plain text, are equal under that policy."""
    if len(answer) > _LONGEST:
        return Verdict(False, "unreadable: too long")
    return shared("math_worker.py").ask({"policy": policy, "gold": gold, "answer": answer})


def strict(completion: str, gold: str) -> Grade:
    """Right if the completion's final answer equals `gold` in value, whatever its spelling; words word for word."""
    answer = math_answers.final_answer(completion)
    if answer is None:
        return Grade(False, None)
    right = math_answers.tidy(gold) or gold
    if answer == right or math_answers.same_words(answer, right):
        return Grade(True, answer)
    if math_answers.is_wording(gold):
        return Grade(False, answer)
    equal, note = compare("strict", right, answer)
    return Grade(equal, answer, note)


def reference(completion: str, gold: str) -> Grade:
    """The public code's verdict (`sva.tasks.public_rules`)."""
    answer = public_rules.solution_answer(completion)
    if answer is None:
        return Grade(False, None)
    equal, note = compare("reference", gold, answer)
    return Grade(equal, answer, note)
