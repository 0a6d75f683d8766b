"""The first pass of a server: which of the loaded experts each question needs, whatever experts there are just now."""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from sva.adaptation import label_scoring
from sva.adaptation.dispatchers import DispatchBatch, Scored, ServingState
from sva.adaptation.experts import OTHER_LABEL
from sva.adaptation.label_scoring import Choice, Template
from sva.adaptation.two_pass import first_pass
from sva.generation.finite import check_finite
from sva.generation.lm import LM
from sva.parallel.processes import to_host
from sva.serving.bank import Bank, Entry
from sva.serving.cost import Cost
from sva.serving.tickets import Question
from sva.tasks.labels import OTHER, Label
from sva.utils.errors import UserError


class Chosen(NamedTuple):
    """What the first pass made of one question."""

    weights: Mapping[str, float]  # of the experts, by name; none is the base
    label: str  # the likeliest, "other" where the base answers
    prob: float  # calibrated, of the likeliest label
    probs: Mapping[str, float]  # of every label
    cost: Cost


class FirstPass:
    """Scores the labels of the bank's experts; made again when these change. For the thread that owns JAX."""

    def __init__(self, lm: LM, bank: Bank) -> None:
        self._lm, self._bank = lm, bank
        self._labels: tuple[Label, ...] = ()
        self._scored: Scored | None = None
        self._template: Template | None = None

    def choose(self, questions: Sequence[Question]) -> list[Chosen]:
        """The experts for each question by its own choice.

        Raises:
          UserError: no expert carries a label, or a question is too long.
        """
        experts = _by_label(self._bank.entries)
        if not experts:
            raise UserError("two passes need an expert that carries a label; load one, or ask another model")
        scored, form = self._prepared(tuple(Label(x.label, x.description) for x in experts.values()))
        started = time.perf_counter()
        texts = [question.text for question in questions]
        label_scoring.check_fits(self._lm, form, texts, scored.answer_tokens)
        tokens = label_scoring.encode(self._lm, form, texts)
        places = len(scored.scoring.bias)
        rows = DispatchBatch(tokens, tokens, jnp.zeros(len(tokens.ids), jnp.int32))
        serving = ServingState(self._lm.model, self._lm.params, {}, 1, jnp.zeros(places, jnp.int32))
        decision = to_host(first_pass(serving, scored, rows))
        check_finite(self._lm, decision.probs[: len(questions)], "first pass of question")
        seconds = (time.perf_counter() - started) / len(questions)
        found = []
        for number, question in enumerate(questions):
            read, drawn, flops = (x[number].item() for x in decision.work)
            cost = Cost(seconds, int(read), int(drawn), flops)
            found.append(self._chosen(decision.probs[number], question.choice, list(experts.values()), cost))
        return found

    def _chosen(self, probs: np.ndarray, choice: Choice, experts: Sequence[Entry], cost: Cost) -> Chosen:
        weights = np.asarray(choice(jnp.asarray(probs[None])))[0]
        named = {entry.name: float(weight) for entry, weight in zip(experts, weights, strict=False) if weight}
        names = [*(entry.label for entry in experts), OTHER]
        best = int(probs.argmax())
        by_label = {name: float(prob) for name, prob in zip(names, probs, strict=False)}
        return Chosen(named, names[best] if named else OTHER, float(probs[best]), by_label, cost)

    def _prepared(self, labels: tuple[Label, ...]) -> tuple[Scored, Template]:
        if labels != self._labels or self._scored is None or self._template is None:
            asked = [*labels, OTHER_LABEL]
            self._scored = Scored(label_scoring.prepare(self._lm, asked))
            self._template = label_scoring.template(self._lm, asked)
            self._labels = labels
        return self._scored, self._template


def _by_label(entries: Sequence[Entry]) -> dict[str, Entry]:
    """{label: the expert that came first with it}, of those that carry one."""
    found: dict[str, Entry] = {}
    for entry in entries:
        if entry.label and entry.label != OTHER:
            found.setdefault(entry.label, entry)
    return found
