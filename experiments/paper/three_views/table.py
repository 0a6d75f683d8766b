"""The table, its numbers and the picture, from the seeds of which every view is measured.

Each seed's experts and models answer the same held-out prompts, so that differences are paired over prompts and seeds
(`sva.evaluation.significance`). The best single model and the best single expert are the ones that answer these very
prompts best, and oracles know every prompt's task: both are bounds and no systems that one could run.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from experiments.paper import render, scores
from experiments.paper.records import ANSWER, devices, read
from experiments.paper.render import Table, millions, p_value, percent
from experiments.paper.three_views import measure, picture
from experiments.paper.three_views.trained import ALL, Cell, Shop, chosen_rate
from experiments.paper.three_views.views import ROWS, VIEWS, cells
from sva.evaluation.significance import paired_bootstrap

NAME, COMMAND = "three_views", "python -m experiments.paper.three_views"
BASE, MACRO, MICRO, ADAPTIVE = "base", "macro: whole models, routed", "micro: one mixture", "self-adaptive: two passes"
VIEW_OF = {BASE: "base", MACRO: "macro", MICRO: "micro", ADAPTIVE: "self-adaptive"}
BEST = {"macro": "best whole model alone", "self-adaptive": "best expert alone"}
ORACLE = {"macro": "whole models, each task's own", "self-adaptive": "experts, each task's own"}
ORDER = (BASE, BEST["macro"], MACRO, ORACLE["macro"], MICRO, BEST["self-adaptive"], ADAPTIVE, ORACLE["self-adaptive"])
PAIRS = ((MACRO, ADAPTIVE), (MICRO, ADAPTIVE), (MACRO, MICRO))
Found = Mapping[str, Mapping[str, Any]]  # by view


def make(shop: Shop, directory: Path) -> str:
    """Writes three_views.md, .tex, .json, .png and .svg; returns the text, or none where no seed is complete."""
    found = {seed: of_seed(shop, seed) for seed in shop.size.seeds}
    complete = {seed: views for seed, views in found.items() if views is not None}
    if not complete:
        return ""
    data = numbers(shop, complete)
    tables = [_accuracies(data), _differences(data), _costs(data), _tried(data)]
    picture.write(data, directory)
    return render.write(NAME, tables, data, COMMAND, directory, records="experiments/paper/results/three_views")


def of_seed(shop: Shop, seed: int) -> Found | None:
    """What was measured of each view; None where one is missing."""
    paths = {view: measure.path_of(shop, view, seed) for view in VIEWS}
    return {view: read(path) for view, path in paths.items()} if all(x.exists() for x in paths.values()) else None


def numbers(shop: Shop, found: Mapping[int, Found]) -> dict[str, Any]:
    """Everything that the tables and the picture show."""
    first = next(iter(found.values()))
    tasks = np.array(first["base"]["tasks"])
    by_seed = [systems(each) for each in found.values()]
    rights = {name: np.stack([each[name] for each in by_seed]) for name in ORDER}
    rights[BASE] = rights[BASE][:1]  # the same for every seed
    less_base = {name: paired_bootstrap(rights[name], rights[BASE]) for name in ORDER if name != BASE}
    between = {pair: paired_bootstrap(rights[pair[0]], rights[pair[1]]) for pair in PAIRS}
    tested = [None if name in BEST.values() else difference for name, difference in less_base.items()]
    corrected = iter(scores.corrected([*tested, *between.values()]))
    return {
        "model": shop.size.model,
        "n": len(tasks),
        "views": {view: name for name, view in VIEW_OF.items()},
        "tasks": {name: shop.tasks[name].label for name in shop.size.tasks},
        "seeds": list(found),
        "device": devices([record for views in found.values() for record in views.values()]),
        "systems": {
            name: {
                "score": scores.score_of(rights[name]),
                "by_task": {task: scores.score_of(rights[name][:, tasks == task]) for task in shop.size.tasks},
                "routed_right": _routed(name, list(found.values())),
            }
            for name in ORDER
        },
        "less_base": [
            {"system": name, **difference._asdict(), "p_holm": next(corrected)}
            for name, difference in less_base.items()
        ],
        "between": [
            {"system": one, "less": other, **difference._asdict(), "p_holm": next(corrected)}
            for (one, other), difference in between.items()
        ],
        "asked_right": {
            view: _share([(x[view]["asked"], x[view]["right"]) for x in found.values()])
            for view in ("macro", "self-adaptive")
        },
        "module_load": [x["micro"]["load"] for x in found.values()],
        "costs": {view: _cost(shop, view, found) for view in VIEWS},
        "tried": {method: _tries(shop, method) for method, _ in shop.size.rates},
    }


def systems(found: Found) -> dict[str, np.ndarray]:
    """[n] booleans of one seed, which held-out prompts each system answers rightly."""
    rights = {name: _rights(found[view]["answers"]) for name, view in VIEW_OF.items()}
    for view in BEST:
        alone = {label: _rights(rows) for label, rows in found[view]["alone"].items()}
        rights[BEST[view]] = max(alone.values(), key=np.mean)
        rights[ORACLE[view]] = np.array([alone[label][at] for at, label in enumerate(found[view]["right"])])
    return rights


def _rights(rows: Sequence[Sequence[Any]]) -> np.ndarray:
    return np.array([bool(row[ANSWER.index("correct")]) for row in rows])


def _routed(name: str, found: Sequence[Found]) -> float | None:
    """The share of prompts that were sent to their own model or expert, of a system that sends prompts anywhere."""
    view = VIEW_OF.get(name)
    if view not in BEST:
        return None
    return _share([(each[view]["chosen"], each[view]["right"]) for each in found])


def _share(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> float:
    return fmean(a == b for chosen, right in pairs for a, b in zip(chosen, right, strict=True))


def _cost(shop: Shop, view: str, found: Mapping[int, Found]) -> dict[str, float]:
    """What a view takes: the training of a seed in sum, the rest as measured; means over seeds."""
    trained = [[shop.record(cell) or {} for cell in cells(shop, view, seed)] for seed in found]
    sums = {
        name: fmean(sum(record[name] for record in records) for records in trained)
        for name in ("updates", "prompts", "answer_tokens", "train_seconds", "parameters")
    }
    names = ("stored_parameters", "stored_bytes", "bytes_held", "first_answer_seconds", "evaluation_seconds")
    means = {name: fmean(each[view][name] for each in found.values()) for name in names}
    peaks = [each[view]["peak_bytes"] for each in found.values() if "peak_bytes" in each[view]]
    return sums | means | {"peak_bytes": fmean(peaks), "peaks": len(peaks)}


def _tries(shop: Shop, method: str) -> dict[str, Any]:
    """Validation accuracy at every rate that was tried, and the one that was chosen."""
    seed = shop.size.seeds[0]
    records = {lr: shop.record(Cell(method, ALL, lr, seed)) or {} for lr in shop.size.rates_of(method)}
    return {
        "chosen": chosen_rate(shop, method),
        "n": next(iter(records.values()))["n"],
        "before": next(iter(records.values()))["before"]["mean"],
        "after": {f"{lr:g}": record["after"]["mean"] for lr, record in records.items()},
    }


def _accuracies(data: Mapping[str, Any]) -> Table:
    less = {each["system"]: each for each in data["less_base"]}
    rows = []
    for name, each in data["systems"].items():
        routed = each["routed_right"]
        difference = less.get(name)
        rows.append(
            (
                name,
                *(percent(score) for score in each["by_task"].values()),
                percent(each["score"]),
                _points(difference),
                "in hindsight" if name in BEST.values() else p_value(difference["p_holm"]) if difference else "",
                "" if routed is None else f"{100 * routed:.1f} %",
            )
        )
    asked = ", ".join(f"{view} {100 * share:.1f} %" for view, share in data["asked_right"].items())
    notes = (
        f"{data['model']}, seeds: {len(data['seeds'])}, {data['n']} held-out prompts, as many of each task; accuracy "
        "in %, greedy answers, 95 % intervals over prompts and seeds.",
        "Routers are linear, over embeddings of labelled training questions. Asked for the label by a prompt alone, "
        f"with no such question, they are right for: {asked}.",
        "The best alone is the best on these prompts; each task's own is what a router that never errs would give. "
        "Both are bounds.",
        f"p by Holm over all {len(data['less_base']) + len(data['between']) - len(BEST)} differences of this page but "
        "those of the best alone, which these prompts chose.",
    )
    header = ("system", *data["tasks"], "all", "less the base, points", "p", "sent to the right one")
    return Table("Three views: right answers", header, tuple(rows), notes)


def _points(difference: Mapping[str, float] | None) -> str:
    if difference is None:
        return ""
    mean, low, high = (100 * difference[name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _differences(data: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            f"{each['system']} less {each['less']}",
            _points(each),
            p_value(each["p_holm"]),
            f"{100 * each['detectable']:.1f}",
        )
        for each in data["between"]
    )
    notes = ("The last column is the true difference that would show in four experiments of five like these.",)
    return Table("Three views: differences between them", ("difference", "points", "p", "detectable"), rows, notes)


def _costs(data: Mapping[str, Any]) -> Table:
    names = {view: name for name, view in VIEW_OF.items()}
    rows = []
    for view, cost in data["costs"].items():
        trained = [
            f"{cost['updates']:.0f}",
            f"{cost['prompts']:.0f}",
            f"{cost['answer_tokens']:.0f}",
            f"{cost['train_seconds'] / 60:.1f}",
            millions(round(cost["parameters"])),
        ]
        rows.append(
            (
                names[view],
                *(trained if cost["updates"] else [""] * len(trained)),
                f"{millions(round(cost['stored_parameters']))}, {cost['stored_bytes'] / 1e6:.0f}",
                f"{cost['bytes_held'] / 1e6:.0f}",
                f"{cost['peak_bytes'] / 1e6:.0f}",
                f"{cost['first_answer_seconds']:.1f}",
                f"{cost['evaluation_seconds']:.1f}",
            )
        )
    notes = (
        f"Means over seeds on {data['device']}, each view in a process of its own; training is the sum of all that a "
        "view needs, its specialists too, in minutes with compiling.",
        "First answer: from files to the first answer, nothing compiled before, Python and JAX imported. All answers: "
        f"the {data['n']} prompts, {ROWS} at a time, compiled before.",
        "Held: all arrays after the first answer. Peak: the process's resident memory until then; a part of what is "
        "held may be mapped from a file, and what loading needed is in it. Measured of "
        f"{min(cost['peaks'] for cost in data['costs'].values())} of the seeds.",
        "A router over embeddings is one more matrix, fitted in seconds; it is in no column but held and the times.",
    )
    header = ("view", "updates", "prompts seen", "answer tokens", "minutes", "trained numbers", "stored numbers, MB")
    header += ("held, MB", "peak, MB", "first answer, s", f"{data['n']} answers, s")
    return Table("Three views: what they take", header, tuple(rows), notes)


def _tried(data: Mapping[str, Any]) -> Table:
    rows = tuple(
        (
            method,
            "; ".join(f"{lr}: {100 * share:.1f}" for lr, share in each["after"].items()),
            f"{100 * each['before']:.1f}",
            f"{each['chosen']:g}",
        )
        for method, each in data["tried"].items()
    )
    notes = (
        f"Accuracy in % on {next(iter(data['tried'].values()))['n']} validation prompts after training on the three "
        "tasks in turn, first seed; of equals the lowest. Full and svf at the updates of one specialist.",
        "full: whole models; svf: experts; router: of the mixture, before it is trained where it says before.",
    )
    return Table("Three views: learning rates", ("trained", "rate: accuracy", "before", "chosen"), rows, notes)
