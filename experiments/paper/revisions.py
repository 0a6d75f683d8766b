"""Two numbers, raised by hand, that say which cells may stand beside each other.

Raise TRAINING when a change alters what training a cell comes to, GRADING when it alters which answers are right.
`tests/test_paper_revisions.py` trains a tiny cell and grades fixed texts, and fails until the number is raised and
`revisions.json` made anew:

    python -m experiments.paper.revisions
"""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from sva.tasks.grading import answers
from sva.tasks.sources import kinds

TRAINING = 1
GRADING = 1

TINY = ("svf", "lora", "ia3", "svf_next")  # methods of the tiny cells
EXPECTED = Path(__file__).with_name("revisions.json")


class Revisions(NamedTuple):
    """The pair, as a record holds it."""

    training: int
    grading: int


CURRENT = Revisions(TRAINING, GRADING)


def tiny_training() -> dict[str, list[float]]:
    """What two steps of the toy model come to: {method: loss and gradient norm of each step}.

    Numbers and no hash of them, because another processor rounds otherwise; compare to a relative 1e-3.
    """
    from experiments.paper.plan import cell
    from experiments.paper.scales import TOY
    from experiments.paper.training import Trainer

    found = {}
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(TOY, Path(directory))
        for name in TINY:
            each = cell(TOY, "main", name, "name_a_colour", examples=8, seed=0, lr=1e-2)
            rows = trainer.run(each)["curve"]
            found[name] = [row[number] for row in rows for number in ("loss", "grad_norm")]
    return found


def tiny_grading() -> dict[str, str]:
    """{task: one digit a text, 1 where it is right} of fixed texts beside fixed examples."""
    found = {}
    for name in kinds.KINDS:
        rows = kinds.rows(name, "validation")[:4]
        digits = ""
        for row, other in zip(rows, [*rows[1:], rows[0]], strict=True):
            right, also = row["answer"], [row["answer"], *row["also"]]
            for text in (right, f"The answer is {right}.", f"**{right}**", other["answer"], f"{right} or no", ""):
                digits += str(int(answers.grade(text, kinds.KINDS[name].form, also).correct))
        found[name] = digits
    return found


def current() -> dict[str, Any]:
    """What `revisions.json` should hold."""
    return {**CURRENT._asdict(), "tiny_training": tiny_training(), "tiny_grading": tiny_grading()}


if __name__ == "__main__":
    EXPECTED.write_text(json.dumps(current(), indent=1) + "\n")
    print(f"wrote {EXPECTED.name} of training revision {TRAINING} and grading revision {GRADING}")
