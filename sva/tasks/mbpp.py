"""MBPP+: short programs from a sentence and an assertion (Austin et al., arXiv 2108.07732; tests: arXiv 2305.01210)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sva.tasks import code
from sva.tasks.base import Example
from sva.tasks.sources import upstream
from sva.utils.errors import UserError

FIELDS = ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol", "assertion")
FILES = {
    "0.1.0": upstream.File("mbppplus_v0.1.0", "f2a15aca330a76099dfa799ca59cd57fc616715adb89de4e19973b91dc6455a8"),
    "0.2.0": upstream.File("mbppplus", "af42b005370f2a5caf11bdfd1ac66d8a9f344fb915670d89cedf7789372b3255"),
}
_PUBLISHED = "https://github.com/evalplus/mbppplus_release/releases/download/v{version}/MbppPlus.jsonl.gz"
_POOL, _TRAIN = 300, 200  # of version 0.1.0, in file order


@cache
def upstream_rows(version: str) -> list[upstream.Row]:
    """All rows of a version, in its order; inputs as JSON has them (see `restored`)."""
    url = _PUBLISHED.format(version=version)
    return upstream.read(FILES[version], FIELDS, "github.com", lambda: upstream.json_lines(url))


@cache
def split_of() -> dict[str, str]:
    """The split of each task of version 0.1.0: the first 300 shuffled, 200 to train and 100 to validate; the rest test.

    So does the public code of Transformer-Squared (SakanaAI/self-adaptive-llms, commit 03a41ae, Mbpp2Task).
    """
    ids = [row["task_id"] for row in upstream_rows("0.1.0")]
    order = list(range(_POOL))
    random.Random(16).shuffle(order)  # what random.seed(16) does for the module's own generator
    pool = {ids[i]: "train" if place < _TRAIN else "validation" for place, i in enumerate(order)}
    return {name: pool.get(name, "test") for name in ids}


# Tasks by where their inputs have tuples that JSON made lists (evalplus 0.3.1, evalplus/data/mbpp.py).
_ARGUMENTS = {
    2,
    116,
    132,
    143,
    222,
    261,
    273,
    394,
    399,
    421,
    424,
    429,
    470,
    560,
    579,
    596,
    616,
    630,
    726,
    740,
    744,
    809,
}
_ITEMS = {63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780}
_ARGUMENTS_AND_ITEMS = {259, 278, 401, 445}
_FIRST = {250, 307, 405, 446, 617, 720, 763, 808}
_ITEMS_OF_FIRST = {75, 413, 444, 753}
_SECOND = {106, 750}
_ALL = {580, 615, 791}


def _tupled(value: Any, depth: int) -> Any:
    """Lists as tuples, down to `depth` levels below this one."""
    if not isinstance(value, list):
        return value
    return tuple(_tupled(item, depth - 1) if depth else item for item in value)


def _items_tupled(value: Any) -> Any:
    return [_tupled(item, 0) for item in value]


def restored(task_id: str, args: Sequence[Any]) -> list[Any]:
    """One input with the types that it had before it was written as JSON."""
    number, (first, *rest) = int(task_id.rpartition("/")[2]), args
    if number in _ARGUMENTS:
        return [_tupled(arg, 0) for arg in args]
    if number in _ITEMS:
        return [_items_tupled(arg) for arg in args]
    if number in _ARGUMENTS_AND_ITEMS:
        return [_tupled(arg, 1) for arg in args]
    if number in _ALL:
        return [_tupled(arg, 99) for arg in args]
    if number in _FIRST:
        return [_tupled(first, 0), *rest]
    if number in _ITEMS_OF_FIRST:
        return [_items_tupled(first), *rest]
    if number in _SECOND:
        return [first, *(_tupled(arg, 0) for arg in rest)]
    if number == 115:  # sets; an empty one is a dict, as there
        return [[set(item) if isinstance(item, list) and item else {} for item in first]]
    if number == 124:
        return [float(first), *(complex(arg) for arg in rest)]
    if number == 252:
        return [complex(first)]
    if number == 722:
        return [{key: tuple(value) for key, value in first.items()}, *rest]
    return list(args)


@dataclass(frozen=True, kw_only=True)
class Mbpp(code.CodeTask):
    """MBPP+ of a version: "0.2.0", or "0.1.0", which has 21 tasks more that upstream took back as faulty.

    Both are split as the public code splits 0.1.0 (`split_of`); under reference splits the rows are 0.1.0's.
    """

    name: str = "mbpp"
    licence: str = "Apache-2.0 (MBPP: CC BY 4.0)"
    origin: str = "github.com/evalplus/mbppplus_release"
    version: str = "0.2.0"

    def _rows(self, split: str) -> Sequence[Example]:
        if self.version not in FILES:
            raise UserError(f"task {self.name}: version={self.version!r}; there are {', '.join(FILES)}")
        splits, version = split_of(), "0.1.0" if self.splits == "reference" else self.version
        return [row for row in upstream_rows(version) if splits[row["task_id"]] == split]

    def prefill(self, example: Example) -> str:
        return "```python"

    def question(self, example: Example) -> str:
        text, _, assertion = example["prompt"].strip().strip('"').strip().partition("assert")
        if self.prompt == "reference":
            text = text.strip()
            return f"{text if text.endswith('.') else text + '.'}\n```python\nassert{assertion}\n```"
        return (
            f"{text.strip()}\n\nYour code should satisfy this assertion:\n```python\nassert{assertion}\n```\n\n"
            "Answer with one block of Python code."
        )

    def tests(self, example: Example) -> list[tuple[str, Any]]:
        reference = example["prompt"] + example["canonical_solution"]
        kinds = [example["base_input"], example["plus_input"]]
        inputs = [[restored(example["task_id"], args) for args in kind] for kind in kinds]
        return [code.comparison(example["entry_point"], reference, part, example["atol"]) for part in inputs]
