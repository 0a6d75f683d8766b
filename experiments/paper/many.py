"""Dispatch at scale: experts of every procedural kind, and who chooses among them best, seen kinds and left-out ones.

python -m experiments.paper.many --scale smol
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.paper import command, render, systems
from experiments.paper.command import Context
from sva.tasks.sources import kinds

NAME, STAGES = "many", ("scout", "rates", "kinds")
ROUTERS = {"seen": ("embedding", "task embedding", "prompt"), "unseen": ("embedding", "task embedding")}
BOUNDS = ("best single", "oracle")  # chosen on the test prompts
ALL = "all kinds"


def make(context: Context, out: Path) -> str:
    """Writes many.md, .tex and .json; returns the Markdown."""
    group = context.studies("many")
    tables, data = [], {}
    for when in ROUTERS:
        about = {ALL: group}
        found = {name: systems.system(about, _of(when, name), is_hindsight=name in BOUNDS) for name in _names(when)}
        title = f"Dispatch among {len(kinds.KINDS)} experts, {when} kinds"
        notes = (
            "Best single: the one expert that is best on all kinds together; oracle: of each kind the expert, or the "
            "base, that is best on it.",
            "On unseen kinds a kind's own expert is left out, of those two as well: its prompts go to the best single "
            "one of the others. Mean over kinds.",
        )
        table, numbers = systems.table(title, found, (ALL,), {}, notes)
        tables.append(table)
        data[when] = numbers
    return render.write(NAME, tables, data, context.command, out)


def _names(when: str) -> tuple[str, ...]:
    return ("base", "best single", *ROUTERS[when], "oracle")


def _of(when: str, name: str) -> Callable[[Mapping[str, Any], str], np.ndarray]:
    return lambda record, _: answers(record, when)[name]


def answers(record: Mapping[str, Any], when: str) -> dict[str, np.ndarray]:
    """{system: [n] rights}, from who was chosen and how each expert answers."""
    of_items = np.array(record["tasks"])
    everyone = {name: np.array(found, bool) for name, found in record["rights"].items()}
    experts = [name for name in everyone if name != "base"]
    may_answer = {name: of_items != name if when == "unseen" else np.full(len(of_items), True) for name in experts}
    order = sorted(experts, key=lambda name: -everyone[name][may_answer[name]].mean())
    single, ideal = {}, {}
    for kind in dict.fromkeys(of_items):
        allowed = [name for name in order if when == "seen" or name != kind]
        single[kind] = allowed[0]
        ideal[kind] = max([*allowed, "base"], key=lambda name: everyone[name][of_items == kind].mean())
    return {
        "base": everyone["base"],
        "best single": _taken(everyone, [single[kind] for kind in of_items]),
        **{name: _taken(everyone, chosen) for name, chosen in record[when].items()},
        "oracle": _taken(everyone, [ideal[kind] for kind in of_items]),
    }


def _taken(everyone: Mapping[str, np.ndarray], chosen: Sequence[str]) -> np.ndarray:
    return np.array([everyone[name][i] for i, name in enumerate(chosen)])


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
