"""Tables of systems that answer the same prompts: dispatchers, mixtures, moved experts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.paper import scores
from experiments.paper.render import Table, basis, beside, p_value, percent, points
from experiments.paper.scores import Group
from sva.evaluation.significance import Comparison, paired_bootstrap

BySeed = Mapping[int, np.ndarray]  # {seed: [n] rights}


class System(NamedTuple):
    """What answers: its rights where there are any, and what is missing where not."""

    rights: Mapping[str, BySeed]  # by task
    status: Mapping[str, str]  # by task; "" where every seed is there
    is_hindsight: bool = False  # the test prompts themselves chose it: a bound, whose difference has no p


def system(groups: Mapping[str, Group], rights: Callable[[Mapping[str, Any], str], Any], *, is_hindsight: bool = False):
    """The system whose rights on a task are `rights(record, task)` of each record of the task's group."""
    found = {
        task: {seed: np.array(rights(record, task), bool) for seed, record in group.by_seed.items()}
        for task, group in groups.items()
    }
    return System(found, {task: group.status for task, group in groups.items()}, is_hindsight)


def either(a: System, b: System) -> System:
    """The base of two studies of the same tasks, which it answers alike: a's rights, and b's where a has none."""
    rights = {task: {**b.rights[task], **found} for task, found in a.rights.items()}
    return System(rights, {task: status and b.status[task] for task, status in a.status.items()})


def of_task(record: Mapping[str, Any], name: str, task: str) -> list[int]:
    """[n] rights of one system of a dispatch record on a task's prompts."""
    return [right for right, of in zip(record["rights"][name], record["tasks"], strict=True) if of == task]


def table(
    title: str,
    systems: Mapping[str, System],
    tasks: Sequence[str],
    paper: Mapping[str, Sequence[float]],
    notes: Sequence[str] = (),
) -> tuple[Table, dict[str, Any]]:
    """(a row a system, data): scores, the difference from the base over all tasks, and the paper's numbers.

    Args:
      systems: "base" among them; one that was not run is a row that says so.
      paper: "base" among them, where it is not empty; those that `systems` lacks are rows of their own.
    """
    differences = {name: _less(each, systems["base"], tasks) for name, each in systems.items() if name != "base"}
    tested = [name for name in differences if not systems[name].is_hindsight]
    corrected = dict(zip(tested, scores.corrected([differences[name] for name in tested]), strict=True))
    rows, data = [], {}
    for name, each in systems.items():
        found = {task: scores.score_of(np.stack(list(each.rights[task].values()))) for task in _there(each, tasks)}
        difference, p = differences.get(name), corrected.get(name)
        texts = [percent(found.get(task), each.status.get(task, "")) for task in tasks]
        judged = "in hindsight" if each.is_hindsight and difference else p_value(p)
        rows.append((name, *texts, points(difference), basis(difference), judged, beside(name, paper)))
        about = {"scores": found, "status": each.status, "less_base": difference, "p_holm": p}
        data[name] = {**about, "is_hindsight": each.is_hindsight}
    more = [name for name in paper if name not in systems]
    rows += [(f"the paper's {name}", *[""] * (len(tasks) + 3), beside(name, paper)) for name in more]
    header = ("system", *tasks, "less base, points", "seeds x n", "p (Holm)", "the paper's")
    if not paper:
        header, rows = header[:-1], [row[:-1] for row in rows]
    about = "95 % intervals over items and seeds, over items alone where there is one seed."
    hindsight = [name for name, each in systems.items() if each.is_hindsight]
    if hindsight:
        about += f" Chosen on the test prompts, so bounds without a p: {', '.join(hindsight)}."
    return Table(title, header, tuple(rows), (about, *notes)), {"systems": data}


def _there(each: System, tasks: Sequence[str]) -> list[str]:
    return [task for task in tasks if each.rights.get(task)]


def _less(a: System, b: System, tasks: Sequence[str]) -> Comparison | None:
    """a's rights less b's on the tasks and seeds that both have; None where there are none."""
    both = [task for task in _there(a, tasks) if b.rights.get(task)]
    by_task = [a.rights[task].keys() & b.rights[task].keys() for task in both]
    common = sorted(set.intersection(*map(set, by_task))) if by_task else []
    if not common:
        return None
    first, second = (
        np.stack([np.concatenate([x.rights[task][seed] for task in both]) for seed in common]) for x in (a, b)
    )
    return paired_bootstrap(first, second)
