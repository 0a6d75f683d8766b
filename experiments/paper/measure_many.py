"""Dispatch among the experts of many procedural kinds: who answers best, kinds that are seen or left out."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from experiments.paper.measure import choices, experts_of, rights_of
from experiments.paper.studies import Study
from experiments.paper.tasks import own_label, task, telling_apart
from sva.adaptation import dispatchers
from sva.adaptation.adaptive_lm import adaptive
from sva.evaluation import evaluate as evaluation
from sva.generation import chat
from sva.generation.frozen import merge_expert
from sva.generation.lm import LM
from sva.spectral.expert import Expert
from sva.utils.padding import batch_bucket, left_pad, length_bucket, pad_rows

if TYPE_CHECKING:
    from experiments.paper.training import Trainer

EXAMPLES = 20  # training prompts a kind, whose hidden states stand for it
_ROWS = 32


def many(trainer: "Trainer", study: Study) -> dict[str, Any]:
    """Rights of every expert on every kind's prompts, and what each first pass chose.

    `seen`: every kind's own expert is among those to choose from. `unseen`: it is left out, kind by kind, so that the
    others must do. The paper's question is asked of seen ones only: without a label it would be another question.
    """
    lm, kinds = trainer.lm, list(study["tasks"])
    experts = [_labelled(expert, kind) for expert, kind in zip(experts_of(trainer, study.needs), kinds, strict=True)]
    items = evaluation.mixed([task(kind) for kind in kinds], "test", study["size"])
    of_items = [item.task.name for item in items]
    rights = {"base": rights_of(lm, items)}
    for kind, expert in zip(kinds, experts, strict=True):
        rights[kind] = rights_of(merge_expert(lm, expert, progress=False), items)
    asked = choices(adaptive(lm, experts, progress=False).by("prompt"), items)
    examples = {kind: states_of(lm, [task(kind).question(row) for row in _first(kind)]) for kind in kinds}
    asking = states_of(lm, [item.question for item in items])
    places = {kind: [i for i, name in enumerate(of_items) if name == kind] for kind in kinds}
    seen = {name: by(asking, examples) for name, by in ROUTERS.items()}
    unseen = {name: [""] * len(items) for name in ROUTERS}
    for kind in kinds:
        others = {name: states for name, states in examples.items() if name != kind}
        for name, by in ROUTERS.items():
            for place, choice in zip(places[kind], by(asking[places[kind]], others), strict=True):
                unseen[name][place] = choice
    names = {own_label(kind)["label"]: kind for kind in kinds}
    seen["prompt"] = [names.get(label, "base") for label in asked]
    return {"n": len(items), "tasks": of_items, "rights": rights, "seen": seen, "unseen": unseen}


def classified(trainer: "Trainer", study: Study) -> dict[str, Any]:
    """What a classification expert of all kinds, the last of the cells, chose for every kind's prompts."""
    kinds = list(study["tasks"])
    *of_kinds, judge = experts_of(trainer, study.needs)
    *apart, _ = telling_apart(kinds).tasks
    experts = [_called(expert, x.label, x.description) for expert, x in zip(of_kinds, apart, strict=True)]
    items = evaluation.mixed([task(kind) for kind in kinds], "test", study["size"])
    asked = choices(adaptive(trainer.lm, experts, classifier=judge, progress=False).by("classifier"), items)
    names = {of.label: kind for of, kind in zip(apart, kinds, strict=True)}
    chosen = [names.get(label, "base") for label in asked]
    return {"n": len(items), "tasks": [item.task.name for item in items], "chosen": chosen}


def by_regression(states: np.ndarray, examples: dict[str, np.ndarray]) -> list[str]:
    """The kind that a linear classifier of the examples' states gives each of states [n, D]."""
    kinds = list(examples)
    owners = [place for place, kind in enumerate(kinds) for _ in examples[kind]]
    router = dispatchers.fit_router(jax.numpy.asarray(np.concatenate(list(examples.values()))), owners, len(kinds))
    scores = states @ np.asarray(router.weights) + np.asarray(router.bias)
    return [kinds[i] for i in scores.argmax(axis=1)]


def by_task_embedding(states: np.ndarray, examples: dict[str, np.ndarray]) -> list[str]:
    """The kind whose mean example points most nearly the same way: nothing is trained (as LoRAuter, arXiv 2601.21795).

    All are taken from the mean over kinds, because hidden states share a large common part.
    """
    kinds = list(examples)
    if len(kinds) == 1:
        return kinds * len(states)
    means = np.stack([each.mean(axis=0) for each in examples.values()])
    centre = means.mean(axis=0)
    a, b = states - centre, means - centre
    cosines = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    return [kinds[i] for i in cosines.argmax(axis=1)]


ROUTERS = {"embedding": by_regression, "task embedding": by_task_embedding}


def states_of(lm: LM, questions: Sequence[str]) -> np.ndarray:
    """[n, D] float32 means of the base's last hidden states over each question's prompt."""
    found = []
    for start in range(0, len(questions), _ROWS):
        batch = questions[start : start + _ROWS]
        ids, mask = chat.encode(lm, [chat.render(lm, question) for question in batch])
        ids, mask = left_pad(ids, mask, length_bucket(ids.shape[1]))
        rows = batch_bucket(len(batch))
        found.append(np.asarray(_embed(lm.model, lm.params, pad_rows(ids, rows), pad_rows(mask, rows)))[: len(batch)])
    return np.concatenate(found)


@partial(jax.jit, static_argnames=("model",))
def _embed(model: Any, params: Any, ids: Any, mask: Any) -> jax.Array:
    return dispatchers.embed(model, params, ids, mask)


def _first(kind: str) -> Sequence[Any]:
    return task(kind).source("train")[:EXAMPLES]


def _labelled(expert: Expert, kind: str) -> Expert:
    """The expert with a label of its own: several kinds share one in `sva.tasks`."""
    return _called(expert, **own_label(kind))


def _called(expert: Expert, label: str, description: str) -> Expert:
    return dataclasses.replace(expert, metadata={**expert.metadata, "label": label, "description": description})


MEASURES = {"many": many, "classified": classified}
