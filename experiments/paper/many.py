"""Dispatch at scale: experts of every procedural kind, who chooses among them best, and whether a mixture is better.

Both on seen kinds and on left-out ones. A classification expert is not among those who choose: several kinds share a
label, so that `sva.tasks.routing` does not tell them apart.

    python -m experiments.paper.many --scale smol
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.paper import command, render, systems
from experiments.paper.command import Context
from experiments.paper.scores import Group
from experiments.paper.systems import System
from sva.tasks.sources import kinds

NAME, STAGES = "many", ("scout", "rates", "kinds")
ROUTERS = {"seen": ("embedding", "task embedding", "prompt"), "unseen": ("embedding", "task embedding")}
BOUNDS = ("best single", "oracle")  # chosen on the test prompts
AMONG = {"seen": "all", "unseen": "others"}  # the experts that few-shot search mixes
ALL = "all kinds"


def make(context: Context, out: Path) -> str:
    """Writes many.md, .tex and .json; returns the Markdown."""
    group = context.studies("many", "kinds")
    tables, data = [], {}
    for when in ROUTERS:
        about = {ALL: group}
        found = {name: systems.system(about, _of(when, name), is_hindsight=name in BOUNDS) for name in _names(when)}
        found["few-shot"] = _mixture(context, when, group)
        title = f"Dispatch among {len(kinds.KINDS)} experts, {when} kinds"
        notes = (
            "Best single: the one expert that is best on all kinds together; oracle: of each kind the expert, or the "
            "base, that is best on it.",
            "On unseen kinds a kind's own expert is left out, of those two as well: its prompts go to the best single "
            "one of the others. Mean over kinds.",
            *_where(group, found["few-shot"], found["best single"]),
        )
        table, numbers = systems.table(title, found, (ALL,), {}, notes)
        tables.append(table)
        data[when] = numbers
    return render.write(NAME, tables, data, context.command, out)


def _mixture(context: Context, when: str, dispatch: Group) -> System:
    """Each kind's prompts answered by the mixture that few-shot search found for it, in the order of the dispatch."""
    groups = {kind: context.studies("search", "kinds", task=kind, among=AMONG[when]) for kind in kinds.KINDS}
    missing = [group for group in groups.values() if not group.records]
    if not dispatch.records or len(missing) == len(groups):
        return System({}, {ALL: (missing or [dispatch])[0].status})
    if missing:
        return System({}, {ALL: f"{len(missing)} of {len(groups)} kinds not run"})
    turns = {kind: iter(group.records[0]["rights"]["few-shot"]) for kind, group in groups.items()}
    ((seed, record),) = dispatch.found
    return System({ALL: {seed: np.array([next(turns[kind]) for kind in record["tasks"]], bool)}}, {ALL: ""})


def _where(dispatch: Group, mixture: System, single: System) -> list[str]:
    """A sentence that says on which kinds the mixture has more right answers than the best single expert."""
    if not mixture.rights or not single.rights:
        return []
    tasks = np.array(dispatch.records[0]["tasks"])
    (a,), (b,) = (each.rights[ALL].values() for each in (mixture, single))
    better, worse = (
        [str(kind) for kind in dict.fromkeys(tasks) if sign * (a[tasks == kind].mean() - b[tasks == kind].mean()) > 0]
        for sign in (1, -1)
    )
    return [
        f"Few-shot is above the best single expert on {', '.join(better) or 'no kind'}; below on {len(worse)} kinds."
    ]


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
