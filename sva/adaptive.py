"""A language model with experts loaded: questions in, answers out, in two passes."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sva import chat, dispatch
from sva.adapt import Prompts, Request, Served, choose, two_pass
from sva.buckets import batch_bucket, budget_bucket, left_pad, length_bucket, pad_rows, round_up
from sva.dispatch import Choice, Decision, FirstPass, Hard, Template
from sva.errors import UserError
from sva.lm import LM, check_prompts, pad_eos, row_keys, shared_form, spectra_of
from sva.sampling import Greedy, Sampling
from sva.spectral import truncate
from sva.spectral.expert import Expert, bank
from sva.spectral.slots import mixture, slots
from sva.spectral.truncate import Plan
from sva.tasks.labels import OTHER, Label

ROWS = 32  # of the first pass
SLOTS = 8  # a bank has a multiple of these: the base, experts, and room for more without recompiling the second pass
OTHER_LABEL = Label(OTHER, "anything else")


class Answer(NamedTuple):
    """One question's answer."""

    text: str
    label: str  # see `AdaptiveLM.named`
    prob: float  # of the likeliest label, calibrated
    tokens: int


@dataclasses.dataclass(frozen=True)
class AdaptiveLM:
    """Everything that two passes need, made once by `build`."""

    lm: LM
    labels: tuple[Label, ...]
    served: Served
    template: Template  # the classification question
    first: FirstPass
    plans: Mapping[str, Plan]  # by weight name: the form it runs in, and what that leaves out

    def asked(self, questions: Sequence[str]) -> Prompts:
        """The questions inside the classification question, in their buckets."""
        return Prompts(*_pad(*dispatch.encode(self.lm, self.template, questions)))

    def choose(self, questions: Sequence[str]) -> Decision:
        """The first pass alone over any number of questions, in batches of 32: host arrays."""
        found = []
        for start in range(0, len(questions), ROWS):
            batch = questions[start : start + ROWS]
            decision = choose(self.served, self.first, self.asked(batch))
            found.append(self._decided(decision, len(batch)))
        return Decision(*map(np.concatenate, zip(*found, strict=True)))

    def _decided(self, decision: Decision, rows: int) -> Decision:
        """The decision on the host, of the first rows and without the places that no label has."""
        probs, alphas = (np.asarray(x)[:rows] for x in decision)
        return Decision(probs[:, : len(self.labels)], alphas)

    def named(self, decision: Decision) -> list[tuple[str, float]]:
        """(label, calibrated probability) of each row: the likeliest label's, named "other" where the base answers."""
        labels = [self.labels[i].name for i in decision.probs.argmax(axis=1)]
        answers = decision.alphas.any(axis=1)
        names = [label if expert else OTHER for label, expert in zip(labels, answers, strict=True)]
        return list(zip(names, decision.probs.max(axis=1).tolist(), strict=True))

    def choose_generated(self, questions: Sequence[str], max_new_tokens: int = 8) -> list[str]:
        """The labels that the base model writes when it is asked freely, as in the paper; "other" if it names none."""
        texts = [self.template.before + self.template.space + question + self.template.after for question in questions]
        ids, mask = chat.encode(self.lm, texts)
        out = self.lm.generate(ids, mask, max_new_tokens, chat.end_tokens(self.lm))
        read = [dispatch.read_label(text, self.labels) for text in chat.decode(self.lm, out.tokens, out.lengths)]
        return [OTHER if i is None else self.labels[i].name for i in read]

    def answer(
        self,
        questions: Sequence[str],
        max_new_tokens: int,
        *,
        sampling: Sampling | None = None,
        key: jax.Array | None = None,
    ) -> list[Answer]:
        """Both passes over one batch of questions, in one compiled call.

        Raises:
          UserError: an empty question, one that is too long for the context, or sampling without a key.
        """
        sampling = sampling or Greedy()
        ids, mask = chat.encode(self.lm, [chat.render(self.lm, question) for question in questions])
        check_prompts(mask.sum(axis=1), max_new_tokens, self.lm.model.cfg.max_position_embeddings)
        prompts = Prompts(*_pad(*left_pad(ids, mask, length_bucket(ids.shape[1]))))
        keys = row_keys(key, len(questions), len(prompts.ids), sampling)
        request = Request(
            prompts,
            jnp.asarray(max_new_tokens, jnp.int32),
            pad_eos(chat.end_tokens(self.lm)),
            keys,
            max_new_tokens=budget_bucket(max_new_tokens),
            sampling=sampling,
        )
        out = two_pass(self.served, self.first, self.asked(questions), request)
        size = len(questions)
        decision = self._decided(out.decision, size)
        tokens, lengths = (np.asarray(x)[:size] for x in (out.generation.tokens, out.generation.lengths))
        texts = chat.decode(self.lm, tokens, lengths)
        return [
            Answer(text, *named, int(length))
            for text, named, length in zip(texts, self.named(decision), lengths, strict=True)
        ]


def build(
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
    bytes a decoded token (`sva.spectral.truncate.plan`).

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
      UserError: no experts, two of one label, one without a label, a classifier of other labels, or a tolerance that
        is negative or not a number.
    """
    if not experts:
        raise UserError("two passes need at least one expert; train one with sva train")
    labels, places = arrange(experts, classifier)
    everyone = [*experts, *([classifier] if classifier else [])]
    names = list(dict.fromkeys(name for expert in everyone for name in expert.names))
    spectra = spectra_of(lm, names, progress=progress)
    zs = [expert.z(spectra) for expert in everyone]
    plans = truncate.plan(spectra, zs, tolerance, exact_base=exact_base, kind=lambda name: shared_form(lm.model, name))
    if progress:
        print(f"sva: {truncate.summary(plans)}", file=sys.stderr)
    num_slots = round_up(len(everyone) + 1, SLOTS)
    nested = lm.model.nest(slots(spectra, bank(zs, spectra, num_slots), plans))
    alphas = jax.nn.one_hot(len(everyone), num_slots) if classifier else None
    adapter = mixture(nested, alphas[None, :]) if alphas is not None else None
    first = dispatch.prepare(lm, labels, places, adapter=adapter, calibrate=calibrate)
    served = Served(lm.model, lm.params, nested, num_slots, alphas, choice)
    return AdaptiveLM(lm, labels, served, dispatch.template(lm, labels), first, plans)


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
