"""Several whole models of any kind and size, and a first pass that sends each question to one of them.

The router is a model with any dispatcher of `sva.adaptation.dispatchers`: it is asked which label a question belongs
to, as for experts, and has none itself.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from flax.traverse_util import flatten_dict

from sva.adaptation.adaptive_lm import AdaptiveLM, without_experts
from sva.adaptation.dispatchers import Router
from sva.generation import chat
from sva.generation.complete import CompleteOptions, complete
from sva.generation.engine import EngineConfig
from sva.generation.lm import LM
from sva.models.flops import met_at
from sva.tasks.labels import OTHER, Label
from sva.utils.errors import UserError


class RoutedAnswer(NamedTuple):
    """One question's answer."""

    text: str
    member: str  # who gave it
    prob: float  # of this member, as the router has it
    tokens: int


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """Models by label, and who chooses between them; made by `ensemble`."""

    members: Mapping[str, LM]
    router: AdaptiveLM
    fallback: str  # the member for questions that the router takes for none of the labels

    def by(self, name: str, *, examples: Sequence[tuple[str, str]] = (), seed: int = 0) -> "Ensemble":
        """The same models with another dispatcher, as `AdaptiveLM.by`; "uniform" and "classifier" are for experts.

        Raises:
          UserError: as there, or a dispatcher that mixes weights.
        """
        if name in ("uniform", "classifier"):
            raise UserError(f"the dispatcher {name!r} mixes or asks experts, and whole models have none; use another")
        return dataclasses.replace(self, router=self.router.by(name, examples=examples, seed=seed))

    def choose(self, questions: Sequence[str], right: Sequence[str] | None = None) -> list[tuple[str, float]]:
        """(the member that answers, its probability) of each question; `right`: the label of each, for the oracle."""
        decision = self.router.choose(questions, right)
        names = [label.name for label in self.router.labels]
        chosen = [names[place] for place in decision.probs.argmax(axis=1)]
        known = [name if name in self.members else self.fallback for name in chosen]
        return list(zip(known, decision.probs.max(axis=1).tolist(), strict=True))

    def answer(
        self, questions: Sequence[str], max_new_tokens: int, *, rows: int = 32, right: Sequence[str] | None = None
    ) -> list[RoutedAnswer]:
        """Greedy answers: the questions of each member are decoded together by an engine of its own.

        Args:
          questions: each the user's turn, rendered as its member's chat template has it.
          rows: questions of one member that decode at a time.
          right: as in `choose`.
        Raises:
          UserError: no question, an empty one, or one that is too long for its member's context.
        """
        chosen = self.choose(questions, right)
        found: dict[int, RoutedAnswer] = {}
        for name, lm in self.members.items():
            places = [place for place, (member, _) in enumerate(chosen) if member == name]
            prompts = [chat.render(lm, questions[place]) for place in places]
            options = CompleteOptions(engine=EngineConfig(rows=rows))
            for done in complete(lm, chat.tokenize(lm, prompts), max_new_tokens, options=options):
                place = places[done.prompt]
                found[place] = RoutedAnswer(done.text, *chosen[place], len(done.tokens))
        return [found[place] for place in range(len(questions))]


def ensemble(
    members: Mapping[str, LM],
    router: LM | None = None,
    *,
    descriptions: Mapping[str, str] | None = None,
    fallback: str | None = None,
) -> Ensemble:
    """Whole models behind one router.

    Args:
      members: by label, at least two; "other" may be one.
      router: the model that is asked whose question it is, by default the first member's. `Ensemble.by` gives it
        another dispatcher than the classification question.
      descriptions: what each label is about, for that question; the label itself by default. "other" has its own.
      fallback: the member that answers what belongs to no label; by default "other" if there is one, or the first.
    Raises:
      UserError: fewer than two members, or a description or fallback that is none of theirs.
    """
    if len(members) < 2:
        raise UserError("an ensemble needs two models or more, each under a label")
    about = dict(descriptions or {})
    if OTHER in about:
        raise UserError(f"the label {OTHER!r} stands for everything else and takes no description; leave it out")
    for name in [*about, *([fallback] if fallback else [])]:
        if name not in members:
            raise UserError(f"no model of the ensemble has the label {name!r}; there is {', '.join(members)}")
    first = next(iter(members))
    judge = without_experts(router or members[first], [Label(name, about.get(name, name)) for name in members])
    return Ensemble(dict(members), judge, fallback or (OTHER if OTHER in members else first))


def parameters_held(group: Ensemble) -> int:
    """Numbers in memory: of all members and the router, what several share counted once."""
    return sum(leaf.size for leaf in _leaves(group))


def bytes_held(group: Ensemble) -> int:
    """As `parameters_held`, in bytes."""
    return sum(leaf.nbytes for leaf in _leaves(group))


def _leaves(group: Ensemble) -> list[jax.Array]:
    trees = [lm.params for lm in (*group.members.values(), group.router.lm)]
    dispatcher = group.router.dispatcher
    own = [dispatcher] if isinstance(dispatcher, Router) else []
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves([*trees, *own])}
    return list(leaves.values())


def bytes_a_token(lm: LM) -> int:
    """Bytes of weights that one decoded token reads at batch 1.

    All but an embedding that is only looked up in and the modules that the token is not sent to.
    """
    cfg, total = lm.model.cfg, 0.0
    for path, weight in flatten_dict(dict(lm.params)).items():
        if cfg.tie_word_embeddings or path[0] != "embed_tokens":
            total += met_at(cfg, path) * sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
    return round(total)
