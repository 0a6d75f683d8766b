"""What each kind of study does with trained experts: dispatch between them, search a mixture, move them to a model."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments.paper.cells import Cell
from experiments.paper.studies import Study
from experiments.paper.tasks import task
from sva.adaptation import few_shot
from sva.adaptation.adaptive_lm import AdaptiveLM, adaptive
from sva.adaptation.by_two_passes import by_two_passes
from sva.evaluation import evaluate as evaluation
from sva.evaluation.evaluate import Item
from sva.generation.decompose import spectra_of
from sva.generation.frozen import merge_expert
from sva.generation.lm import LM
from sva.generation.merge import merge
from sva.spectral.expert import Expert
from sva.spectral.transfer import transfer
from sva.tasks.labels import OTHER
from sva.training.search import CEM

if TYPE_CHECKING:
    from experiments.paper.training import Trainer

BATCH = 300
ROUTER_EXAMPLES = 100  # training prompts a task that the embedding router is fitted to
POPULATION = 32


def experts_of(trainer: "Trainer", cells: Sequence[Cell]) -> list[Expert]:
    """The trained experts of these cells, for the loaded model."""
    return [Expert.load(trainer.store.expert_path(cell), fingerprint=trainer.lm.fingerprint) for cell in cells]


def rights_of(lm: LM, items: Sequence[Item]) -> list[int]:
    """1 for each item that the model answers rightly, greedily, else 0."""
    return [int(record.correct) for record in evaluation.evaluate(lm, items, batch_size=BATCH, progress=False)]


def dispatch(trainer: "Trainer", study: Study) -> dict[str, Any]:
    """Every first pass on prompts of several tasks: what it chose, and who answered rightly.

    A row's answer depends on the expert that answers it alone, so each expert answers every prompt once, and a first
    pass takes the answer of the one that it chose.
    """
    lm = trainer.lm
    *of_tasks, judge = experts_of(trainer, study.needs)
    items = evaluation.mixed([task(name) for name in study["tasks"]], "test", study["size"])
    model = adaptive(lm, of_tasks, classifier=judge, progress=False)
    labels = [label.name for label in model.own_labels if label.name != OTHER]
    right = [item.task.label if item.task.label in labels else OTHER for item in items]
    everywhere = {OTHER: rights_of(lm, items)}
    for label, expert in zip(labels, of_tasks, strict=True):
        everywhere[label] = rights_of(merge_expert(lm, expert, progress=False), items)
    examples = [
        (made.question(row), made.label)
        for made in map(task, (*study["trained"], OTHER))
        for row in made.source("train")[:ROUTER_EXAMPLES]
    ]
    chosen = {name: choices(model.by(name, examples=examples), items) for name in study["first"]}
    chosen["oracle"] = right
    systems = {name: [everywhere[label][i] for i, label in enumerate(found)] for name, found in chosen.items()}
    return {
        "n": len(items),
        "tasks": [item.task.name for item in items],
        "right_labels": right,
        "labels": [*labels, OTHER],
        "chosen": chosen,
        "rights": {**{f"{label} everywhere": found for label, found in everywhere.items()}, **systems},
        "costs": _costs(model.by("prompt"), items),
    }


def choices(model: AdaptiveLM, items: Sequence[Item]) -> list[str]:
    """The label that a first pass chooses for each item."""
    found: list[str] = []
    for start in range(0, len(items), BATCH):
        decision = model.choose([item.question for item in items[start : start + BATCH]])
        found += [label for label, _ in model.named(decision)]
    return found


def _costs(model: AdaptiveLM, items: Sequence[Item]) -> dict[str, dict[str, float]]:
    """{task: seconds of the first and of the second pass over its items}, without compiling."""
    answer = by_two_passes(model, max(item.task.max_new_tokens for item in items))
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(item.task.name for item in items):
        some = [item for item in items if item.task.name == name]
        rows = [row for start in range(0, len(some), BATCH) for row in answer(some[start : start + BATCH])]
        found[name] = {when: sum(getattr(row, when)["seconds"] for row in rows) for when in ("first", "second")}
    return found


def search(trainer: "Trainer", study: Study) -> dict[str, Any]:
    """The mixture that a few solved examples of a task find (CEM), and what it answers on held-out prompts."""
    lm, of = trainer.lm, task(study["task"])
    pool = few_shot.pool(lm, experts_of(trainer, study.needs), progress=False)
    shots = few_shot.draw(of, "train", study["shots"], study["seed"])
    cem = CEM(population=POPULATION, low=0.0, high=1.0)
    settings = few_shot.FewShotConfig()
    state, key = cem.init(pool.start()), jax.random.key(study["seed"])
    generations = range(1, study["generations"] + 1)
    steps = list(few_shot.adapt(lm, pool, shots, cem, settings, key, state=state, generations=generations))
    history = [dict(step.row) for step in steps]
    alphas = steps[-1].alphas if few_shot.is_found(history) else np.zeros_like(steps[-1].alphas)
    items = evaluation.items(of, "test", study["size"])
    return {
        "n": len(items),
        "alphas": alphas.tolist(),
        "best": [row["best"] for row in history],
        "rights": {"few-shot": rights_of(few_shot.mixed(lm, pool, alphas), items), "base": rights_of(lm, items)},
    }


def moved(trainer: "Trainer", study: Study) -> dict[str, Any]:
    """Experts of the base on another model: one that was fully fine-tuned on another task.

    The i-th z goes to the i-th singular value there (`ordered`); the control shuffles each vector first.
    """
    *cells, tuning = study.needs
    experts = dict(zip(study["trained"], experts_of(trainer, cells), strict=True))
    other = trainer.tuned(tuning)
    rights: dict[str, list[int]] = {}
    names = [name for expert in experts.values() for name in expert.names]
    spectra = spectra_of(other, list(dict.fromkeys(names)), progress=False)
    ranks = {name: len(spectrum.s) for name, spectrum in spectra.items()}
    of_base = spectra_of(trainer.lm, list(ranks), progress=False)
    for name in study["tasks"]:
        items = evaluation.items(task(name), "test", study["size"])
        rights[f"base/{name}"] = rights_of(other, items)
        for trained, expert in experts.items():
            if name in experts and name != trained:
                continue  # on a training task its own expert alone; on another all of them
            for how, shuffle in (("ordered", None), ("shuffled", study["seed"])):
                z = transfer(expert.z({name: of_base[name] for name in expert.names}), ranks, shuffle)
                rights[f"{how}/{name}/{trained}"] = rights_of(merge(other, spectra, z), items)
    return {"n": len(next(iter(rights.values()))), "rights": rights}


MEASURES: Mapping[str, Callable[["Trainer", Study], dict[str, Any]]] = {
    "dispatch": dispatch,
    "search": search,
    "moved": moved,
}
