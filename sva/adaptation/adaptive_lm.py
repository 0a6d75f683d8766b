"""A language model with experts loaded: questions in, answers out, in two passes."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sva.adaptation import dispatchers, label_scoring
from sva.adaptation.dispatchers import DispatchBatch, Dispatcher, Scored, ServingState, Work
from sva.adaptation.experts import OTHER_LABEL, labels_and_slots
from sva.adaptation.label_scoring import Choice, Hard, Soft, Template, TokenBatch
from sva.adaptation.two_pass import Decision, Request, first_pass, second_pass, two_pass
from sva.generation import chat
from sva.generation.decode import Generation
from sva.generation.decompose import spectra_of
from sva.generation.finite import check_finite
from sva.generation.lm import LM
from sva.generation.loaded_model import require_weights
from sva.generation.merge import nested_slots, shared_form
from sva.generation.prompts import check_prompts, pad_eos, row_keys
from sva.generation.sampling import Greedy, Sampling
from sva.models.flops import met
from sva.parallel.processes import to_host
from sva.parallel.sharding import rows_bucket
from sva.spectral import serving_plan
from sva.spectral.expert import Expert, require_mixable
from sva.spectral.mixing import bank, mixture
from sva.spectral.serving_plan import Plan
from sva.tasks.labels import OTHER, Label
from sva.utils.errors import UserError
from sva.utils.padding import budget_bucket, left_pad, length_bucket, pad_rows, round_up
from sva.utils.timing import Stopwatch

ROWS = 32  # of the first pass
SLOTS = 8  # a bank has a multiple of these: the base, experts, and room for more without recompiling the second pass
DISPATCHERS = ("prompt", "classifier", "generated", "embedding", "random", "oracle", "uniform")


class Answer(NamedTuple):
    """One question's answer."""

    text: str
    label: str  # see `AdaptiveLM.named`
    prob: float  # of the likeliest label, calibrated
    tokens: int


class Cost(NamedTuple):
    """Time, tokens and FLOPs of a pass over one question."""

    seconds: float  # its share of the batch's
    read: int  # tokens given
    drawn: int  # tokens generated
    flops: float  # see `sva.adaptation.dispatchers.work`


class Measured(NamedTuple):
    """An answer, and the cost of each of the two passes."""

    answer: Answer
    first: Cost
    second: Cost


@dataclasses.dataclass(frozen=True)
class AdaptiveLM:
    """Everything that two passes need, made once by `adaptive`."""

    lm: LM
    labels: tuple[Label, ...]
    serving: ServingState
    template: Template  # the classification question
    dispatcher: Dispatcher
    plans: Mapping[str, Plan]  # by weight name: the form it runs in, and what that leaves out
    own_labels: tuple[Label, ...]  # as the experts themselves bring them, and "other"; a classifier may order others
    classifier: jax.Array | None = None  # [E_max], the mixture that is the classification expert

    def by(self, name: str, *, examples: Sequence[tuple[str, str]] = (), seed: int = 0) -> "AdaptiveLM":
        """The same model with another dispatcher.

        Args:
          name: prompt (the base scores the labels), classifier (the classification expert does), generated (the base
            answers freely, as in the paper), embedding (a linear classifier of hidden states), or a baseline: random,
            oracle, uniform (the average of all experts), fixed:LABEL (one expert for every prompt; fixed:other is the
            base).
          examples: (question, label) pairs to fit the embedding's classifier on.
          seed: of the random one.
        Raises:
          UserError: no such dispatcher or label, no classification expert, or no examples.
        """
        check_dispatcher(name)
        kind, _, label = name.partition(":")
        places = len(self.serving.slots)
        serving = self.serving
        if kind in ("prompt", "generated"):
            return self._asking(kind)
        if kind == "classifier":
            if self.classifier is None:
                raise UserError("the dispatcher 'classifier' needs a classification expert (--classifier)")
            dispatcher = _scored(self.lm, self.labels, serving.bank, self.classifier)
        elif kind == "embedding":
            dispatcher = self._router(examples)
        elif kind == "random":
            dispatcher = dispatchers.at_random(self.labels, places, seed)
        elif kind == "oracle":
            dispatcher = dispatchers.Oracle()
        elif kind == "uniform":
            dispatcher, serving = dispatchers.uniform(self.labels, places), dataclasses.replace(serving, choice=Soft())
        else:
            dispatcher = dispatchers.fixed(self.labels, label, places)
        return dataclasses.replace(self, dispatcher=dispatcher, serving=serving)

    def _asking(self, kind: str) -> "AdaptiveLM":
        """With the base asked for one of the experts' own labels, in their order, also where there is a classifier."""
        labels = self.own_labels
        if kind == "prompt":
            dispatcher: Scored | dispatchers.Generated = _scored(self.lm, labels, self.serving.bank, None)
        else:
            scoring = label_scoring.prepare(self.lm, labels, calibrate=False)
            dispatcher = dispatchers.generated(self.lm, labels, scoring)
        slots_of = _padded([*range(1, len(labels)), 0], len(self.serving.slots))
        return dataclasses.replace(
            self,
            labels=labels,
            serving=dataclasses.replace(self.serving, slots=slots_of),
            template=label_scoring.template(self.lm, labels),
            dispatcher=dispatcher,
        )

    def _router(self, examples: Sequence[tuple[str, str]]) -> Dispatcher:
        names = [label.name for label in self.labels]
        kept = [(question, names.index(label)) for question, label in examples if label in names]
        if not kept:
            raise UserError("the dispatcher 'embedding' needs examples of the labels that it tells apart")
        states = []
        for start in range(0, len(kept), ROWS):
            batch = [question for question, _ in kept[start : start + ROWS]]
            rows = self.rows(batch)
            found = _embed(self.lm.model, self.lm.params, rows.prompts.ids, rows.prompts.mask)
            states.append(to_host(found)[: len(batch)])
            check_finite(self.lm, states[-1], "embedding of example", start)
        return dispatchers.fit_router(
            jnp.asarray(np.concatenate(states)), [place for _, place in kept], len(self.serving.slots)
        )

    def rows(
        self,
        questions: Sequence[str],
        right: Sequence[str] | None = None,
        prompts: Sequence[chat.Rendered] | None = None,
    ) -> DispatchBatch:
        """The prompts as a dispatcher reads them, in their buckets.

        Args:
          questions: at least one.
          right: the right label of each, for the oracle; a name that is not a label of these experts is "other".
          prompts: what the second pass answers, rendered; by default the questions, each as the user's turn.
        """
        if not questions:
            raise UserError("there is no question to answer; give at least one")
        if right is None and isinstance(self.dispatcher, dispatchers.Oracle):
            raise UserError("the oracle needs the right label of every question")
        answer_tokens = dispatchers.answer_tokens(self.dispatcher)
        if answer_tokens is not None:
            label_scoring.check_fits(self.lm, self.template, questions, answer_tokens)
        classified = label_scoring.encode(self.lm, self.template, questions)
        if answer_tokens is None:  # none of ours reads them then: no shape more for it
            classified = classified._replace(token_indices=None)
        prompts = prompts or [chat.render(self.lm, question) for question in questions]
        ids, mask = chat.encode(self.lm, prompts)
        asked = TokenBatch(*_pad(*left_pad(ids, mask, length_bucket(ids.shape[1]))))
        names = [label.name for label in self.labels]
        places = [names.index(name if name in names else OTHER) for name in right or [OTHER] * len(questions)]
        known = jnp.asarray(pad_rows(np.asarray(places, np.int32), len(asked.ids)))
        return DispatchBatch(classified, asked, known)

    def ends_that_fit(self, questions: Sequence[str]) -> list[str]:
        """The questions, each without the beginning that is too long for the first pass."""
        tokens = dispatchers.answer_tokens(self.dispatcher) or 0
        return [label_scoring.end_that_fits(self.lm, self.template, question, tokens) for question in questions]

    def shortest_first(self, questions: Sequence[str]) -> list[int]:
        """The places of the questions in order of their tokens, so that batches of neighbours have little padding."""
        lengths = [len(row) for row in chat.tokenize(self.lm, questions, follows=True)]
        return np.argsort(lengths, kind="stable").tolist()

    def choose(self, questions: Sequence[str], right: Sequence[str] | None = None) -> Decision:
        """The first pass alone over any number of questions, the shortest first in batches of 32: host arrays."""
        order = self.shortest_first(questions)
        found = []
        for start in range(0, max(len(questions), 1), ROWS):
            batch = order[start : start + ROWS]
            rows = self.rows([questions[i] for i in batch], right and [right[i] for i in batch])
            decision = first_pass(self.serving, self.dispatcher, rows)
            found.append(self._decided(decision, len(batch)))
        back = np.argsort(order, kind="stable")
        return jax.tree.map(lambda *parts: np.concatenate(parts)[back], *found)

    def _decided(self, decision: Decision, rows: int) -> Decision:
        """The decision on the host, of the first rows and without the places that no label has."""
        found = jax.tree.map(lambda x: x[:rows], to_host(decision))
        check_finite(self.lm, found.probs, "first pass of question")
        return found._replace(probs=found.probs[:, : len(self.labels)])

    def named(self, decision: Decision) -> list[tuple[str, float]]:
        """(label, calibrated probability) of each row: the likeliest label's, named "other" where the base answers."""
        labels = [self.labels[i].name for i in decision.probs.argmax(axis=1)]
        answers = decision.alphas.any(axis=1)
        names = [label if expert else OTHER for label, expert in zip(labels, answers, strict=True)]
        return list(zip(names, decision.probs.max(axis=1).tolist(), strict=True))

    def answer(
        self,
        questions: Sequence[str],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        key: jax.Array | None = None,
        right: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Both passes over one batch of questions, in one compiled call; `right` as in `rows`.

        Raises:
          UserError: no question, an empty one, one that is too long for the context, or sampling without a key.
        """
        rows = self.rows(questions, right)
        request = self._request(rows, len(questions), max_new_tokens, sampling or Greedy(), key)
        out = two_pass(self.serving, self.dispatcher, rows, request)
        return self._answers(out.decision, out.generation, len(questions))

    def measured_choice(
        self, questions: Sequence[str], stopwatch: Stopwatch, right: Sequence[str] | None = None
    ) -> tuple[Decision, list[Cost]]:
        """The first pass alone over one batch, as host arrays, and its cost for each question."""
        rows, size = self.rows(questions, right), len(questions)
        decision, seconds = stopwatch(first_pass, self.serving, self.dispatcher, rows)
        return self._decided(decision, size), _costs(decision.work, seconds, size)

    def measured(
        self,
        questions: Sequence[str],
        max_new_tokens: int,
        stopwatch: Stopwatch,
        right: Sequence[str] | None = None,
        stops: Sequence[Sequence[str]] | None = None,
        prompts: Sequence[chat.Rendered] | None = None,
    ) -> list[Measured]:
        """`answer`, greedily and one pass after the other, with the cost of each.

        Args:
          stops: the stop strings that each answer is cut at; none by default.
          prompts: as in `rows`.
        """
        rows, size = self.rows(questions, right, prompts), len(questions)
        request = self._request(rows, size, max_new_tokens, Greedy(), None)
        decision, first = stopwatch(first_pass, self.serving, self.dispatcher, rows)
        generation, second = stopwatch(second_pass, self.serving, decision.alphas, request)
        read, drawn = rows.prompts.mask.sum(axis=1), generation.lengths
        work = _work(self.lm.model, self.serving.bank, read, drawn, unembedded=drawn)
        costs = _costs(decision.work, first, size), _costs(work, second, size)
        return list(map(Measured, self._answers(decision, generation, size, stops), *costs))

    def _request(
        self, rows: DispatchBatch, size: int, max_new_tokens: int, sampling: Sampling, key: jax.Array | None
    ) -> Request:
        lengths = np.asarray(rows.prompts.mask)[:size].sum(axis=1)
        check_prompts(lengths, max_new_tokens, self.lm.model.cfg)
        return Request(
            rows.prompts,
            jnp.asarray(max_new_tokens, jnp.int32),
            pad_eos(chat.end_tokens(self.lm)),
            row_keys(key, size, len(rows.prompts.ids), sampling),
            max_new_tokens=budget_bucket(max_new_tokens),
            sampling=sampling,
        )

    def _answers(
        self,
        decision: Decision,
        generation: Generation,
        size: int,
        stops: Sequence[Sequence[str]] | None = None,
    ) -> list[Answer]:
        tokens, logprobs, lengths = (x[:size] for x in to_host(generation))
        check_finite(self.lm, logprobs, "question")
        texts, lengths, _ = chat.decode_until(self.lm, tokens, lengths, stops or [()] * size)
        named = self.named(self._decided(decision, size))
        return [Answer(text, *label, int(length)) for text, label, length in zip(texts, named, lengths, strict=True)]


def _costs(work: Work, seconds: float, size: int) -> list[Cost]:
    """Costs of the first `size` rows, which share the seconds."""
    read, drawn, flops = (x[:size].tolist() for x in to_host(work))
    return [Cost(seconds / size, *each) for each in zip(read, drawn, flops, strict=True)]


_embed = jax.jit(dispatchers.embed, static_argnames=("model",))
_work = jax.jit(dispatchers.work, static_argnames=("model",))


def adaptive(
    lm: LM,
    experts: Sequence[Expert],
    *,
    classifier: Expert | None = None,
    choice: Choice = Hard(),  # noqa: B008 (frozen)
    calibrate: bool = True,
    tolerance: float = 0.0,
    exact_base: bool = False,
    progress: bool = True,
) -> AdaptiveLM:
    """The model with these experts in the slots of one static bank, every matrix in its cheapest form.

    A matrix runs factored, or as its dense product and a change of k components, whichever is predicted to read fewer
    bytes a decoded token (`sva.spectral.serving_plan.plan`).

    Args:
      lm: the base model of all of them.
      experts: at least one; each one's metadata gives its label and its description.
      classifier: the expert that the first pass runs on (the paper's second dispatcher); None for the base model.
      choice: `Hard` (the likeliest expert), `Soft` (all, by probability) or `Threshold` (unsure: the base).
      calibrate: see `label_scoring.prepare`.
      tolerance: components that no expert moves by more than this part of the matrix's largest singular value may be
        dropped; 0 is exact.
      exact_base: rows that no expert answers are the base model's bit for bit, for more bytes.
      progress: show a bar while missing spectra are decomposed, and say on stderr which forms were taken.
    Raises:
      UserError: no experts, two of one label, one without a label, a classifier of other labels, a tolerance that
        is negative or not a number, or a model loaded `without` its target weights.
    """
    if not experts:
        raise UserError("two passes need at least one expert; train one with sva train")
    require_weights(lm, "a bank of experts")
    labels, places = labels_and_slots(experts, classifier)
    everyone = [*experts, *([classifier] if classifier else [])]
    require_mixable(everyone)
    names = list(dict.fromkeys(name for expert in everyone for name in expert.names))
    spectra = spectra_of(lm, names, progress=progress)
    zs = [expert.z(spectra) for expert in everyone]
    plans = serving_plan.plan(
        spectra, zs, tolerance, exact_base=exact_base, kind=lambda name: shared_form(lm.model, name)
    )
    if progress:
        print(f"sva: experts by row: {serving_plan.summary(plans, partial(met, lm.model.cfg))}", file=sys.stderr)
    num_slots = round_up(len(everyone) + 1, SLOTS)
    nested = nested_slots(lm.model, spectra, bank(zs, spectra, num_slots), plans)
    alphas = jax.nn.one_hot(len(everyone), num_slots) if classifier else None
    dispatcher = _scored(lm, labels, nested, alphas, calibrate=calibrate)
    serving = ServingState(
        lm.model, lm.params, nested, num_slots, _padded(places, len(dispatcher.scoring.bias)), choice
    )
    own, _ = labels_and_slots(experts, None)
    return AdaptiveLM(lm, labels, serving, label_scoring.template(lm, labels), dispatcher, plans, own, alphas)


def without_experts(lm: LM, labels: Sequence[Label]) -> AdaptiveLM:
    """A first pass alone: it says which of these labels a question belongs to, "other" added, and has no expert.

    Raises:
      UserError: as `label_scoring.prepare`.
    """
    labels = (*(label for label in labels if label.name != OTHER), OTHER_LABEL)
    dispatcher = _scored(lm, labels, {}, None)
    slots = _padded([*range(1, len(labels)), 0], len(dispatcher.scoring.bias))
    serving = ServingState(lm.model, lm.params, {}, round_up(len(labels), SLOTS), slots)
    return AdaptiveLM(lm, labels, serving, label_scoring.template(lm, labels), dispatcher, {}, labels)


def _padded(places: Sequence[int], size: int) -> jax.Array:
    """[size] int32, the slot of each place for a label; spare ones have the base's."""
    return jnp.asarray(np.pad(np.asarray(places, np.int32), (0, size - len(places))))


def _scored(
    lm: LM, labels: Sequence[Label], bank: Mapping[str, Any], expert: jax.Array | None, *, calibrate: bool = True
) -> Scored:
    adapter = None if expert is None else mixture(bank, expert[None, :])
    return Scored(label_scoring.prepare(lm, labels, adapter=adapter, calibrate=calibrate), expert)


def check_dispatcher(name: str) -> None:
    """Raises UserError unless `AdaptiveLM.by` knows the name."""
    if name not in DISPATCHERS and not name.startswith("fixed:"):
        raise UserError(f"no dispatcher {name!r}; there is {', '.join(DISPATCHERS)} and fixed:LABEL")


def _pad(ids: np.ndarray, mask: np.ndarray) -> tuple[jax.Array, jax.Array]:
    rows = rows_bucket(len(ids))
    return jnp.asarray(pad_rows(ids, rows)), jnp.asarray(pad_rows(mask, rows))
