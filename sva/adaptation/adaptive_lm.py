"""A language model with experts loaded: questions in, answers out, in two passes."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sva.adaptation import dispatchers
from sva.adaptation import label_scoring as dispatch
from sva.adaptation import two_pass as adapt
from sva.adaptation.dispatchers import Dispatcher, Scored, Work
from sva.adaptation.label_scoring import Choice, Hard, Soft, Template
from sva.adaptation.two_pass import Decision, Prompts, Request, Rows, Served
from sva.generation import chat
from sva.generation.decode import Generation
from sva.generation.decompose import spectra_of
from sva.generation.finite import check_finite
from sva.generation.lm import LM
from sva.generation.loaded_model import require_weights
from sva.generation.merge import shared_form
from sva.generation.prompts import check_prompts, pad_eos, row_keys
from sva.generation.sampling import Greedy, Sampling
from sva.spectral import serving_plan
from sva.spectral.expert import Expert
from sva.spectral.mixing import bank, mixture, slots
from sva.spectral.serving_plan import Plan
from sva.tasks.labels import OTHER, Label
from sva.utils.errors import UserError
from sva.utils.padding import batch_bucket, budget_bucket, left_pad, length_bucket, pad_rows, round_up
from sva.utils.timing import Stopwatch

ROWS = 32  # of the first pass
SLOTS = 8  # a bank has a multiple of these: the base, experts, and room for more without recompiling the second pass
OTHER_LABEL = Label(OTHER, "anything else")
DISPATCHERS = ("prompt", "classifier", "generated", "embedding", "random", "oracle", "uniform")


class Answer(NamedTuple):
    """One question's answer."""

    text: str
    label: str  # see `AdaptiveLM.named`
    prob: float  # of the likeliest label, calibrated
    tokens: int


class Cost(NamedTuple):
    """What a pass over one question took."""

    seconds: float  # its share of the batch's
    read: int  # tokens given
    drawn: int  # tokens generated
    flops: float  # see `sva.adaptation.dispatchers.work`


class Measured(NamedTuple):
    """An answer, and what each of the two passes took."""

    answer: Answer
    first: Cost
    second: Cost


@dataclasses.dataclass(frozen=True)
class AdaptiveLM:
    """Everything that two passes need, made once by `adaptive`."""

    lm: LM
    labels: tuple[Label, ...]
    served: Served
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
        places = len(self.served.slots)
        served = self.served
        if kind in ("prompt", "generated"):
            return self._asking(kind)
        if kind == "classifier":
            if self.classifier is None:
                raise UserError("the dispatcher 'classifier' needs a classification expert (--classifier)")
            dispatcher = _scored(self.lm, self.labels, served.bank, self.classifier)
        elif kind == "embedding":
            dispatcher = self._router(examples)
        elif kind == "random":
            dispatcher = dispatchers.lots(self.labels, places, seed)
        elif kind == "oracle":
            dispatcher = dispatchers.Oracle()
        elif kind == "uniform":
            dispatcher, served = dispatchers.uniform(self.labels, places), dataclasses.replace(served, choice=Soft())
        else:
            dispatcher = dispatchers.everywhere(self.labels, label, places)
        return dataclasses.replace(self, dispatcher=dispatcher, served=served)

    def _asking(self, kind: str) -> "AdaptiveLM":
        """With the base asked for one of the experts' own labels, in their order, also where there is a classifier."""
        labels = self.own_labels
        if kind == "prompt":
            dispatcher: Scored | dispatchers.Generated = _scored(self.lm, labels, self.served.bank, None)
        else:
            first = dispatch.prepare(self.lm, labels, calibrate=False)
            dispatcher = dispatchers.generated(self.lm, labels, first)
        slots_of = _padded([*range(1, len(labels)), 0], len(self.served.slots))
        return dataclasses.replace(
            self,
            labels=labels,
            served=dataclasses.replace(self.served, slots=slots_of),
            template=dispatch.template(self.lm, labels),
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
            states.append(_embed(self.lm.model, self.lm.params, *rows.prompts)[: len(batch)])
            check_finite(self.lm, np.asarray(states[-1]), "embedding of example", start)
        return dispatchers.fit(jnp.concatenate(states), [place for _, place in kept], len(self.served.slots))

    def rows(self, questions: Sequence[str], right: Sequence[str] | None = None) -> Rows:
        """What the first pass may look at, in its buckets.

        Args:
          questions: at least one.
          right: the right label of each, for the oracle; a name that is no label of these experts is "other".
        """
        if not questions:
            raise UserError("there is no question to answer; give at least one")
        if right is None and isinstance(self.dispatcher, dispatchers.Oracle):
            raise UserError("the oracle needs the right label of every question")
        ids, mask = chat.encode(self.lm, [chat.render(self.lm, question) for question in questions])
        prompts = Prompts(*_pad(*left_pad(ids, mask, length_bucket(ids.shape[1]))))
        names = [label.name for label in self.labels]
        places = [names.index(name if name in names else OTHER) for name in right or [OTHER] * len(questions)]
        known = jnp.asarray(pad_rows(np.asarray(places, np.int32), len(prompts.ids)))
        return Rows(dispatch.encode(self.lm, self.template, questions), prompts, known)

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
            decision = adapt.choose(self.served, self.dispatcher, rows)
            found.append(self._decided(decision, len(batch)))
        back = np.argsort(order, kind="stable")
        return jax.tree.map(lambda *parts: np.concatenate(parts)[back], *found)

    def _decided(self, decision: Decision, rows: int) -> Decision:
        """The decision on the host, of the first rows and without the places that no label has."""
        found = jax.tree.map(lambda x: np.asarray(x)[:rows], decision)
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
        out = adapt.two_pass(self.served, self.dispatcher, rows, request)
        return self._answers(out.decision, out.generation, len(questions))

    def measured_choice(
        self, questions: Sequence[str], stopwatch: Stopwatch, right: Sequence[str] | None = None
    ) -> tuple[Decision, list[Cost]]:
        """The first pass alone over one batch, as host arrays, and what it took of each question."""
        rows, size = self.rows(questions, right), len(questions)
        decision, seconds = stopwatch(adapt.choose, self.served, self.dispatcher, rows)
        return self._decided(decision, size), _costs(decision.work, seconds, size)

    def measured(
        self,
        questions: Sequence[str],
        max_new_tokens: int,
        stopwatch: Stopwatch,
        right: Sequence[str] | None = None,
        stops: Sequence[Sequence[str]] | None = None,
    ) -> list[Measured]:
        """`answer`, greedily and one pass after the other, with what each of them took.

        Args:
          stops: the stop strings that each answer is cut at; none by default.
        """
        rows, size = self.rows(questions, right), len(questions)
        request = self._request(rows, size, max_new_tokens, Greedy(), None)
        decision, first = stopwatch(adapt.choose, self.served, self.dispatcher, rows)
        generation, second = stopwatch(adapt.answer, self.served, decision.alphas, request)
        read, drawn = rows.prompts.mask.sum(axis=1), generation.lengths
        work = _work(self.lm.model, self.served.bank, read, drawn, unembedded=drawn)
        costs = _costs(decision.work, first, size), _costs(work, second, size)
        return list(map(Measured, self._answers(decision, generation, size, stops), *costs))

    def _request(
        self, rows: Rows, size: int, max_new_tokens: int, sampling: Sampling, key: jax.Array | None
    ) -> Request:
        lengths = np.asarray(rows.prompts.mask)[:size].sum(axis=1)
        check_prompts(lengths, max_new_tokens, self.lm.model.cfg.max_position_embeddings)
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
        tokens, logprobs, lengths = (np.asarray(x)[:size] for x in generation)
        check_finite(self.lm, logprobs, "question")
        texts, lengths, _ = chat.decode_until(self.lm, tokens, lengths, stops or [()] * size)
        named = self.named(self._decided(decision, size))
        return [Answer(text, *label, int(length)) for text, label, length in zip(texts, named, lengths, strict=True)]


def _costs(work: Work, seconds: float, size: int) -> list[Cost]:
    """Of the first `size` rows, which share the seconds."""
    read, drawn, flops = (np.asarray(x)[:size].tolist() for x in work)
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
      choice: `dispatch.Hard` (the likeliest expert), `Soft` (all, by probability) or `Threshold` (unsure: the base).
      calibrate: see `dispatch.prepare`.
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
    labels, places = arrange(experts, classifier)
    everyone = [*experts, *([classifier] if classifier else [])]
    names = list(dict.fromkeys(name for expert in everyone for name in expert.names))
    spectra = spectra_of(lm, names, progress=progress)
    zs = [expert.z(spectra) for expert in everyone]
    plans = serving_plan.plan(
        spectra, zs, tolerance, exact_base=exact_base, kind=lambda name: shared_form(lm.model, name)
    )
    if progress:
        print(f"sva: {serving_plan.summary(plans)}", file=sys.stderr)
    num_slots = round_up(len(everyone) + 1, SLOTS)
    nested = lm.model.nest(slots(spectra, bank(zs, spectra, num_slots), plans))
    alphas = jax.nn.one_hot(len(everyone), num_slots) if classifier else None
    dispatcher = _scored(lm, labels, nested, alphas, calibrate=calibrate)
    served = Served(lm.model, lm.params, nested, num_slots, _padded(places, len(dispatcher.first.bias)), choice)
    own, _ = arrange(experts, None)
    return AdaptiveLM(lm, labels, served, dispatch.template(lm, labels), dispatcher, plans, own, alphas)


def _padded(places: Sequence[int], size: int) -> jax.Array:
    """[size] int32, the slot of each place for a label; spare ones have the base's."""
    return jnp.asarray(np.pad(np.asarray(places, np.int32), (0, size - len(places))))


def _scored(
    lm: LM, labels: Sequence[Label], bank: Mapping[str, Any], expert: jax.Array | None, *, calibrate: bool = True
) -> Scored:
    adapter = None if expert is None else mixture(bank, expert[None, :])
    return Scored(dispatch.prepare(lm, labels, adapter=adapter, calibrate=calibrate), expert)


def check_dispatcher(name: str) -> None:
    """Raises UserError unless `AdaptiveLM.by` knows the name."""
    if name not in DISPATCHERS and not name.startswith("fixed:"):
        raise UserError(f"no dispatcher {name!r}; there is {', '.join(DISPATCHERS)} and fixed:LABEL")


def load_experts(
    lm: LM, paths: Sequence[Path], classifier: Path | None = None, *, skip_foreign: bool = False
) -> tuple[list[Expert], Expert | None]:
    """(the experts of these files, the classification expert) for `lm`.

    Args:
      skip_foreign: leave out experts of another base, naming them on stderr; never the classification expert.
    Raises:
      UserError: a file that is none, experts of another base (all are named), or none left.
    """
    found = [Expert.load(path) for path in paths]
    of = [expert.metadata.get("fingerprint") for expert in found]
    foreign = [
        f"{path} ({expert.metadata.get('base')})"
        for path, expert, known in zip(paths, found, of, strict=True)
        if known != lm.fingerprint
    ]
    if foreign and (not skip_foreign or len(foreign) == len(found)):
        rest = "; leave them out, or pass --skip-foreign" if len(foreign) < len(found) else ""
        raise UserError(
            f"{len(foreign)} of {len(found)} experts were not trained on {lm.name} ({lm.fingerprint[:12]}): "
            f"{', '.join(foreign)}{rest}"
        )
    if foreign:
        print(f"sva: left out, for they were not trained on {lm.name}: {', '.join(foreign)}", file=sys.stderr)
    judge = Expert.load(classifier, fingerprint=lm.fingerprint, base=lm.name) if classifier else None
    return [expert for expert, known in zip(found, of, strict=True) if known == lm.fingerprint], judge


def arrange(experts: Sequence[Expert], classifier: Expert | None) -> tuple[tuple[Label, ...], list[int]]:
    """(C labels, the bank's slot of each): the experts' in order and then "other", or as the classifier learnt them.

    A classification expert was trained on one question, so its labels keep their order and their descriptions.
    """
    labels = [Label(expert.metadata.get("label", ""), expert.metadata.get("description", "")) for expert in experts]
    if not all(label.name for label in labels):
        raise UserError("an expert carries no label; train it again with a task that has one")
    labels = (*labels, OTHER_LABEL)
    slots = [*range(1, len(labels)), 0]
    if classifier is None:
        return labels, slots
    learnt = tuple(Label(*pair) for pair in classifier.metadata.get("labels", {}).items())
    place = {label.name: slot for label, slot in zip(labels, slots, strict=True)}
    if sorted(label.name for label in learnt) != sorted(label.name for label in labels):
        told, needed = (", ".join(label.name for label in group) or "nothing" for group in (learnt, labels))
        raise UserError(
            f"the classification expert tells apart {told}; these experts need {needed}: load experts of its labels, "
            "or train a classification expert with task: routing"
        )
    return learnt, [place[label.name] for label in learnt]


def _pad(ids: np.ndarray, mask: np.ndarray) -> tuple[jax.Array, jax.Array]:
    rows = batch_bucket(len(ids))
    return jnp.asarray(pad_rows(ids, rows)), jnp.asarray(pad_rows(mask, rows))
