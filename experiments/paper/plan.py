"""The list of cells, most telling first: what is decided by earlier ones comes after them.

scout      SVF and LoRA on every candidate task: they choose the tasks (`tasks.chosen`)
rates      three learning rates a method, on the first task and one seed: the best on validation is the method's own
main       SVF, LoRA and IA3 x 8, 32 and 128 prompts x the tasks, seed 0 before seed 1 before seed 2
more_rates as rates, for the other methods
variants   the other methods at the middle number of prompts, seed by seed
studies    the classification expert, dispatch, few-shot search and moved experts, on the experts of main
prompts    the other numbers of prompts
fidelity   SVF with other settings
kinds      SVF on every procedural kind, one seed, for dispatch among many and mixtures of them

Cells of scout, rates and more_rates have a seed of their own (100) and are measured on validation; all others on test.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.paper import tasks
from experiments.paper.cells import Cell
from experiments.paper.methods import FIDELITY, MAIN, METHODS
from experiments.paper.records import Failure
from experiments.paper.scales import OF_KINDS, Scale
from experiments.paper.studies import Study
from sva.tasks.labels import OTHER
from sva.tasks.sources import kinds

DECIDING = ("scout", "rates", "more_rates")
STAGES = ("scout", "rates", "main", "more_rates", "variants", "studies", "prompts", "fidelity", "kinds")
FIRST = ("prompt", "classifier", "generated", "embedding")  # first passes that are compared
OF_A_KIND = 25  # held-out prompts a kind of the study of many experts
ROUTES = 100  # training prompts of the classification expert, and held-out prompts a task of a dispatch study
SEARCHES = ((10, 20), (3, 20), (5, 20), (20, 20), (3, 5))  # shots and generations: tables 8 and 10
_SCOUTS = ("svf", "lora")

Get = Callable[[Any], Mapping[str, Any] | Failure | None]


class Decided(NamedTuple):
    """What the records of scout and rates say; empty where they do not say it yet."""

    tasks: tuple[str, ...]
    rates: Mapping[str, float]  # by method
    unseen: tuple[str, ...] = ()  # the candidates that follow, for what no expert is trained on


@functools.cache
def cell(scale: Scale, stage: str, method: str, task: str, *, examples: int | None, seed: int, lr: float) -> Cell:
    """A cell of a stage, measured on the split of its stage."""
    split = "validation" if stage in DECIDING else "test"
    return Cell(scale, stage, method, task, examples, seed, lr, split)


def scout(scale: Scale) -> list[Cell]:
    """The cells that choose the tasks; none where there is nothing to choose."""
    if len(scale.candidates) <= scale.tasks:
        return []
    at = {"examples": scale.tuning_examples, "seed": scale.tuning_seed}
    return [
        cell(scale, "scout", method, task, lr=METHODS[method].rates[1], **at)
        for task in scale.candidates
        for method in _SCOUTS
    ]


def rates(scale: Scale, task: str) -> list[Cell]:
    """The cells that choose each method's learning rate, those of the main methods first."""
    at = {"examples": scale.tuning_examples, "seed": scale.tuning_seed}
    return [
        cell(scale, "rates" if method in MAIN else "more_rates", method, task, lr=lr, **at)
        for method in (*MAIN, *(name for name in METHODS if name not in MAIN))
        if not METHODS[method].rate_of
        for lr in dict.fromkeys(tried_rates(scale, method))
    ]


def tried_rates(scale: Scale, method: str) -> tuple[float, ...]:
    """The learning rates that a method's own is chosen from."""
    return dict(scale.rates).get(method, METHODS[method].rates)


def presumed(scale: Scale, get: Get, only: Sequence[str] | None = None) -> list[Cell | Study]:
    """All cells of a scale that scouts nothing, or those of some stages.

    Each method has the learning rate that the records choose or, before they do, its middle one, so that the list has
    all that there would be to do before anything is decided.
    """
    middle_rates = {method: sorted(tried_rates(scale, method)) for method in METHODS}
    own = {method: each[len(each) // 2] for method, each in middle_rates.items()} | decided(scale, get).rates
    own |= {name: own[of] for name, method in METHODS.items() if (of := method.rate_of)}
    known = Decided(scale.candidates, own, scale.unseen)
    listed: list[Cell | Study] = [*rates(scale, known.tasks[0]), *main(scale, known), *variants(scale, known)]
    listed += [*studies(scale, known), *prompts(scale, known), *fidelity(scale, known)]
    return _each_once(listed, only)


def decided(scale: Scale, get: Get) -> Decided:
    """The tasks and the learning rates that the records so far choose."""
    ordered = _tasks(scale, get)
    if not ordered:
        return Decided((), {})
    chosen, unseen = ordered[: scale.tasks], ordered[scale.tasks :]
    found: dict[str, list[tuple[float, float]]] = {}
    missing = set()
    for each in rates(scale, chosen[0]):
        record = get(each)
        if record is None:
            missing.add(each.method)
        elif not isinstance(record, Failure):
            found.setdefault(each.method, []).append((record["after"]["mean"], -each.lr))
    own = {method: -max(scores)[1] for method, scores in found.items() if method not in missing}
    taken = {name: own[of] for name, method in METHODS.items() if (of := method.rate_of) in own}
    return Decided(chosen, own | taken, unseen)


def _tasks(scale: Scale, get: Get) -> tuple[str, ...]:
    """The chosen tasks, and as many that follow; empty where the scouting cells are not all there."""
    cells = scout(scale)
    if not cells:
        return scale.candidates[: scale.tasks]
    ends: dict[str, dict[str, float]] = {}
    bases: dict[str, float] = {}
    for each in cells:
        record = get(each)
        if record is None:
            return ()
        if not isinstance(record, Failure):
            ends.setdefault(each.task, {})[each.method] = record["after"]["mean"]
            bases[each.task] = record["before"]["mean"]
    whole = {name: tasks.Scouted(bases[name], by) for name, by in ends.items() if len(by) == len(_SCOUTS)}
    return tasks.chosen(whole, 2 * scale.tasks)


def main(scale: Scale, known: Decided, methods: tuple[str, ...] = MAIN) -> Iterator[Cell]:
    """The main cells of methods whose learning rate is decided."""
    for seed in scale.seeds:
        for examples in sorted(scale.examples, reverse=True):
            for task in known.tasks:
                for method in methods:
                    if method in known.rates:
                        at = {"examples": examples, "seed": seed, "lr": known.rates[method]}
                        yield cell(scale, "main", method, task, **at)


def variants(scale: Scale, known: Decided) -> Iterator[Cell]:
    """Every other method at the middle number of prompts."""
    examples = middle(scale)
    for seed in scale.seeds:
        for method in METHODS:
            for task in known.tasks:
                if method in known.rates and method not in MAIN and method not in FIDELITY:
                    at = {"examples": examples, "seed": seed, "lr": known.rates[method]}
                    yield cell(scale, "variants", method, task, **at)


def prompts(scale: Scale, known: Decided) -> Iterator[Cell]:
    """The main methods and full fine-tuning at the other numbers of prompts, on the first task first."""
    for task in known.tasks:
        for seed in scale.seeds:
            for method in (*MAIN, "full"):
                numbers = scale.more_examples if method in MAIN else (*scale.examples, *scale.more_examples)
                for examples in numbers:
                    if method in known.rates:
                        at = {"examples": examples, "seed": seed, "lr": known.rates[method]}
                        yield cell(scale, "prompts", method, task, **at)


def fidelity(scale: Scale, known: Decided) -> Iterator[Cell]:
    """SVF with other settings, at the middle number of prompts."""
    for seed in scale.seeds:
        for method in FIDELITY:
            for task in known.tasks:
                if method in known.rates:
                    at = {"examples": middle(scale), "seed": seed, "lr": known.rates[method]}
                    yield cell(scale, "fidelity", method, task, **at)


def studies(scale: Scale, known: Decided) -> Iterator[Cell | Study]:
    """What is measured on the experts of the main cells with the most prompts, seed by seed."""
    if not known.unseen or not {"svf", "full_next"} <= known.rates.keys():
        return
    for seed in scale.seeds:
        at = {"examples": max(scale.examples), "seed": seed, "lr": known.rates["svf"]}
        experts = tuple(cell(scale, "main", "svf", task, **at) for task in known.tasks)
        judge = _judge(scale, seed, known.rates["svf"], known.tasks)
        yield judge
        seen = {"trained": known.tasks, "first": FIRST, "size": ROUTES}
        for listed in ((*known.tasks, OTHER), known.unseen):
            yield _study(scale, "dispatch", (*experts, judge), tasks=listed, **seen)
        for task in known.unseen:
            for shots, generations in SEARCHES if task == known.unseen[0] else SEARCHES[:1]:
                about = {"task": task, "shots": shots, "generations": generations, "seed": seed}
                yield _study(scale, "search", experts, **about, size=scale.held_out)
        tuning = {"examples": max(scale.examples), "seed": seed, "lr": known.rates["full_next"]}
        other = cell(scale, "studies", "full_next", scale.other_model, **tuning)
        listed = {"trained": known.tasks, "tasks": (*known.tasks, *known.unseen), "seed": seed}
        yield _study(scale, "moved", (*experts, other), **listed, size=scale.held_out)


@functools.cache
def _judge(scale: Scale, seed: int, lr: float, trained: tuple[str, ...]) -> Cell:
    """The cell of the classification expert."""
    return Cell(scale, "studies", "svf", "routing", ROUTES, seed, lr, "test", trained)


@functools.cache
def _made(
    scale: Scale, method: str, settings: tuple[tuple[str, Any], ...], needs: tuple[Cell, ...], stage: str
) -> Study:
    return Study(scale, method, settings, needs, stage)


def _study(scale: Scale, method: str, needs: tuple[Cell, ...], *, stage: str = "studies", **settings: Any) -> Study:
    return _made(scale, method, tuple(settings.items()), needs, stage)


def of_kinds(scale: Scale, known: Decided) -> Iterator[Cell | Study]:
    """SVF on every procedural kind, dispatch among all of these experts, and mixtures of them.

    A few-shot search for every kind, among the experts of the `others`, its own left out, and then among `all`.
    """
    if scale.name == "toy" or "svf" not in known.rates:
        return
    experts = [cell(scale, "kinds", "svf", kind, lr=known.rates["svf"], **OF_KINDS) for kind in kinds.KINDS]
    yield from experts
    yield _study(scale, "many", tuple(experts), stage="kinds", tasks=tuple(kinds.KINDS), size=OF_A_KIND)
    shots, generations = SEARCHES[0]
    for among in ("others", "all"):
        for kind in kinds.KINDS:
            mixed = tuple(each for each in experts if among == "all" or each.task != kind)
            about = {"task": kind, "among": among, "shots": shots, "generations": generations, "seed": mixed[0].seed}
            yield _study(scale, "search", mixed, stage="kinds", **about, size=OF_A_KIND)


def every(scale: Scale, get: Get, only: Sequence[str] | None = None) -> list[Cell | Study]:
    """All cells that can be named yet, or those of some stages, in the order in which they should be run, each once."""
    known = decided(scale, get)
    listed: list[Cell | Study] = [*scout(scale)]
    if known.tasks:
        tried = rates(scale, known.tasks[0])
        first = [each for each in tried if each.method in MAIN]
        if any(get(each) is None for each in first):  # nothing later may keep the main cells waiting
            return _each_once([*listed, *first, *main(scale, known)], only)
        listed += first
        listed += main(scale, known)
        listed += [each for each in tried if each.method not in MAIN]
        listed += [*variants(scale, known), *studies(scale, known), *prompts(scale, known)]
        listed += [*fidelity(scale, known), *of_kinds(scale, known)]
    return _each_once(listed, only)


def _each_once(listed: list[Cell | Study], only: Sequence[str] | None) -> list[Cell | Study]:
    """Those of the stages `only`, without a second one of the same key, which another stage may have."""
    found: dict[str, Cell | Study] = {}
    for each in listed:
        if not only or each.stage in only:
            found.setdefault(each.key, each)
    return list(found.values())


def middle(scale: Scale) -> int:
    """The middle one of the main cells' numbers of prompts."""
    return sorted(scale.examples)[len(scale.examples) // 2]
