"""The base and the three views as systems that answer questions: what each loads, and how each answers.

| view          | is loaded                                          | answers                                      |
|---------------|----------------------------------------------------|----------------------------------------------|
| base          | one model                                          | itself                                       |
| macro         | K whole models                                     | the one that a router over embeddings picks  |
| micro         | one model whose layers hold K modules and a router | itself; its routers pick for every token     |
| self-adaptive | one model, its spectra, and K sets of z            | in two passes: which expert, then its answer |

The routers of macro (on its first model) and self-adaptive (on the base) are fitted to the same labelled questions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.paper.three_views.trained import ALL, Cell, Shop, chosen_rate
from sva.adaptation.adaptive_lm import AdaptiveLM, adaptive
from sva.adaptation.by_two_passes import by_two_passes
from sva.ensembles.ensemble import Ensemble, ensemble
from sva.evaluation import evaluate as evaluation
from sva.evaluation.evaluate import Answer, Item, Record
from sva.generation import chat
from sva.generation.frozen import merge_expert
from sva.generation.lm import LM
from sva.generation.load import load
from sva.models.moe import balance

VIEWS = ("base", "macro", "micro", "self-adaptive")
ROWS = 32  # that decode at a time, in every view
Read = Callable[[Sequence[Item]], Mapping[str, Any]]


class System(NamedTuple):
    """A view that is loaded."""

    answer: Answer
    batch: int | None  # questions that are handed over at a time; None for all
    parts: Callable[[], Mapping[str, LM]]  # by label: each whole model, or the base with each expert merged
    read: Read  # what else is worth knowing of how it routes these questions


def cells(shop: Shop, view: str, seed: int) -> list[Cell]:
    """What was trained for a view."""
    if view == "base":
        return []
    method = "svf" if view == "self-adaptive" else "full"
    lr = chosen_rate(shop, method)
    found = [Cell(method, name, lr, seed) for name in shop.size.tasks]
    return [*found, Cell("router", ALL, chosen_rate(shop, "router"), seed)] if view == "micro" else found


def opened(shop: Shop, view: str, seed: int) -> System:
    """The view, loaded from disk and ready for its first question."""
    return {"base": _base, "macro": _macro, "micro": _micro, "self-adaptive": _adaptive}[view](shop, seed)


def held_out(shop: Shop) -> list[Item]:
    """The test prompts of every task, one of each in turn."""
    return evaluation.mixed(list(shop.tasks.values()), "test", shop.size.held_out)


def budget(shop: Shop) -> int:
    """Tokens of an answer at most."""
    return max(task.max_new_tokens for task in shop.tasks.values())


def _base(shop: Shop, seed: int) -> System:
    del seed
    return System(evaluation.by_generation(shop.base, budget(shop)), ROWS, dict, lambda todo: {})


def _macro(shop: Shop, seed: int) -> System:
    whole = cells(shop, "macro", seed)
    members = {shop.tasks[cell.task].label: load(str(shop.place(cell)), progress=False) for cell in whole}
    described = {task.label: task.description for task in shop.tasks.values()}
    group = ensemble(members, descriptions=described).by("embedding", examples=_examples(shop))

    def answer(batch: Sequence[Item]) -> list[Record]:
        found = group.answer([item.question for item in batch], budget(shop), rows=ROWS)
        prompts = [chat.render_example(members[a.member], *item) for a, item in zip(found, batch, strict=True)]
        records = evaluation.grade(batch, [a.text for a in found], [a.tokens for a in found], prompts)
        return [
            record._replace(label=a.member, prob=a.prob, right_label=item.task.label)
            for record, a, item in zip(records, found, batch, strict=True)
        ]

    return System(answer, None, lambda: members, lambda todo: {"asked": _asked(group.by("prompt"), todo)})


def _micro(shop: Shop, seed: int) -> System:
    router = cells(shop, "micro", seed)[-1]
    untrained = load(str(shop.mixture(seed)), progress=False)
    lm = merge_expert(untrained, shop.expert(router), progress=False)
    del untrained

    def read(todo: Sequence[Item]) -> Mapping[str, Any]:
        return {"load": {name: _load(lm, [item for item in todo if item.task.name == name]) for name in shop.tasks}}

    return System(evaluation.by_generation(lm, budget(shop)), ROWS, dict, read)


def _adaptive(shop: Shop, seed: int) -> System:
    base = shop.base
    experts = {shop.tasks[cell.task].label: shop.expert(cell) for cell in cells(shop, "self-adaptive", seed)}
    model = adaptive(base, list(experts.values()), progress=False).by("embedding", examples=_examples(shop))

    def parts() -> Mapping[str, LM]:
        return {label: merge_expert(base, expert, progress=False) for label, expert in experts.items()}

    def read(todo: Sequence[Item]) -> Mapping[str, Any]:
        return {"asked": _asked(model.by("prompt"), todo)}

    return System(by_two_passes(model, budget(shop)), ROWS, parts, read)


def _examples(shop: Shop) -> list[tuple[str, str]]:
    """(question, label) of the first training prompts of every task."""
    todo = [item for task in shop.tasks.values() for item in evaluation.items(task, "train", shop.size.examples)]
    return [(item.question, item.task.label) for item in todo]


def _asked(router: Ensemble | AdaptiveLM, todo: Sequence[Item]) -> list[str]:
    """The label that each question is sent to where the router is only asked, and was shown no labelled question."""
    questions = [item.question for item in todo]
    if isinstance(router, Ensemble):
        return [name for name, _ in router.choose(questions)]
    return [name for name, _ in router.named(router.choose(questions))]


def _load(lm: LM, todo: Sequence[Item]) -> list[float]:
    """[K] each module's share of the prompts' tokens, in the mean over layers; those of a token count alike."""
    prompts = [chat.render_example(lm, *item) for item in todo[:ROWS]]
    shares = balance(lm.model, lm.params, *chat.encode(lm, prompts))
    return np.mean(list(shares.values()), axis=0).round(4).tolist()


def bytes_live() -> int:
    """Bytes of all arrays that this process holds on its device."""
    return sum(array.nbytes for array in jax.live_arrays())
