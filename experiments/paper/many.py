"""Dispatch at scale: experts of every procedural kind, and who chooses among them best, seen kinds and left-out ones.

python -m experiments.paper.many --scale smol
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.paper import command, render, systems
from experiments.paper.command import Context

NAME, STAGES = "many", ("scout", "rates", "kinds")


def make(context: Context, out: Path) -> str:
    """Writes many.md, .tex and .json; returns the Markdown."""
    records = context.studies("many")
    tables, data = [], {}
    for when in ("seen", "unseen"):
        rights: dict[str, dict[str, np.ndarray]] = {"base": {}}
        if records:
            rights = {name: {"all kinds": found[None]} for name, found in answers(records[0], when).items()}
        kinds = len(dict.fromkeys(records[0]["tasks"])) if records else 0
        title = f"Dispatch among {kinds} experts, {when} kinds"
        notes = (
            "Best single: the one expert that is best on all kinds together, in hindsight; oracle: of each kind the "
            "expert that is best on it (its own, where that is seen or not worse).",
            "On unseen kinds a kind's own expert is left out. Mean over kinds of one seed.",
        )
        table, numbers = systems.table(title, rights, ("all kinds",), {}, notes)
        tables.append(table)
        data[when] = numbers
    return render.write(NAME, tables, data, context.command, out)


def answers(record: dict[str, Any], when: str) -> dict[str, np.ndarray]:
    """{system: [n] rights}, from who was chosen and how each expert answers."""
    of_items = record["tasks"]
    everyone = {name: np.array(found, bool) for name, found in record["rights"].items()}
    kinds = [name for name in everyone if name != "base"]
    allowed = {kind: [other for other in kinds if when == "seen" or other != kind] for kind in kinds}
    best = max(kinds, key=lambda name: everyone[name].mean())
    by_kind = {kind: np.array([name == kind for name in of_items]) for kind in dict.fromkeys(of_items)}
    ideal = {kind: max(allowed[kind], key=lambda name: everyone[name][by_kind[kind]].mean()) for kind in by_kind}
    systems_ = {"base": everyone["base"], f"best single ({best})": everyone[best]}
    for name, chosen in record[when].items():
        systems_[name] = _taken(everyone, chosen)
    return systems_ | {"oracle": _taken(everyone, [ideal[kind] for kind in of_items])}


def _taken(everyone: dict[str, np.ndarray], chosen: list[str]) -> np.ndarray:
    return np.array([everyone[name][i] for i, name in enumerate(chosen)])


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
