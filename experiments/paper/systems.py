"""Tables of systems that answer the same prompts: dispatchers, mixtures, moved experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.paper import scores
from experiments.paper.render import Table, p_value, percent, points
from sva.evaluation.significance import paired_bootstrap

Rights = Mapping[str, Mapping[str, np.ndarray]]  # {system: {task: [S, n]}}


def stacked(records: Sequence[Mapping[str, Any]], system: str, task: str) -> np.ndarray:
    """[S, n] rights of a system on a task's prompts, from dispatch records, one a seed."""
    rows = []
    for record in records:
        places = [i for i, name in enumerate(record["tasks"]) if name == task]
        rows.append([record["rights"][system][i] for i in places])
    return np.array(rows, bool)


def table(
    title: str, rights: Rights, tasks: Sequence[str], paper: Mapping[str, Sequence[float]], notes: Sequence[str] = ()
) -> tuple[Table, dict[str, Any]]:
    """(a row a system, data): scores, the difference from the base over all tasks, and the paper's numbers.

    Args:
      rights: "base" among the systems; one that a task lacks is "not run" there.
    """
    differences = {}
    for system, by_task in rights.items():
        both = [task for task in tasks if task in by_task and task in rights["base"]]
        if system != "base" and both:
            mine, base = (np.concatenate([_seeds(rights[name], t) for t in both], axis=1) for name in (system, "base"))
            differences[system] = paired_bootstrap(mine, base[: len(mine)])
    corrected = dict(zip(differences, scores.corrected(list(differences.values())), strict=True))
    rows, data = [], {}
    for system, by_task in rights.items():
        found = {task: scores.score_of(by_task[task]) for task in tasks if task in by_task}
        texts = [percent(found.get(task)) for task in tasks]
        difference = differences.get(system)
        beside = " / ".join(f"{x:.2f}" for x in paper.get(system, ()))
        rows.append((system, *texts, points(difference), p_value(corrected.get(system)), beside))
        data[system] = {"scores": found, "less_base": difference, "p_holm": corrected.get(system)}
    sizes = sorted({by_task[task].shape for by_task in rights.values() for task in by_task})
    about = f"Seeds x prompts a task: {', '.join(f'{s} x {n}' for s, n in sizes) or 'none'}; 95 % intervals over both."
    header = ("system", *tasks, "less base, points", "p (Holm)", "the paper's")
    return Table(title, header, tuple(rows), (about, *notes)), {"systems": data}


def _seeds(by_task: Mapping[str, np.ndarray], task: str) -> np.ndarray:
    return np.atleast_2d(by_task[task])
