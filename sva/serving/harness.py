"""What an evaluation harness asks of a model, of text and token ids alone: scores of continuations, and completions.

`Fixed` answers as one set of weights does: the base, an expert or a mixture. `TwoPasses` first chooses an expert for
each context, by its text, and then answers as that one does.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import numpy as np

from sva.adaptation.adaptive_lm import AdaptiveLM
from sva.evaluation.likelihood import Score, token_scores
from sva.generation.complete import CompleteOptions, Mixtures, complete
from sva.generation.engine import EngineConfig
from sva.generation.frozen import merge_expert
from sva.generation.lm import LM
from sva.generation.sampling import Sampling
from sva.spectral.expert import Expert
from sva.utils.padding import batch_bucket, length_bucket


@dataclasses.dataclass(frozen=True)
class Budget:
    """How completions end and are drawn; the same for all prompts of a call."""

    max_new_tokens: int
    stops: tuple[str, ...]
    sampling: Sampling
    seed: int
    rows: int  # that decode together


class Answers(Protocol):
    """Who answers a harness."""

    @property
    def lm(self) -> LM:
        """The model whose tokenizer makes the ids."""
        ...

    def scores(
        self, texts: Sequence[str], heads: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Score]]:
        """As `token_scores`, of contexts with these texts and token ids."""
        ...

    def completions(self, texts: Sequence[str], prompts: Sequence[Sequence[int]], budget: Budget) -> list[str]:
        """The text behind each prompt, without its stop string."""
        ...


@dataclasses.dataclass(frozen=True)
class Fixed:
    """One set of weights for all contexts."""

    lm: LM

    def scores(
        self, texts: Sequence[str], heads: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Score]]:
        """As the protocol says."""
        del texts
        return token_scores(self.lm, heads, tails)

    def completions(self, texts: Sequence[str], prompts: Sequence[Sequence[int]], budget: Budget) -> list[str]:
        """As the protocol says."""
        del texts
        return _complete(self.lm, prompts, budget, None)


@dataclasses.dataclass(frozen=True)
class TwoPasses:
    """An expert for each context, chosen by its text; the base for an empty one.

    Contexts of one expert are scored together, on its merged weights.
    """

    model: AdaptiveLM
    experts: Mapping[int, Expert]  # by their slot in the model's bank

    @property
    def lm(self) -> LM:
        """The base."""
        return self.model.lm

    def alphas(self, texts: Sequence[str]) -> np.ndarray:
        """[B, E_max] float32, what the first pass makes of each context, or of as much of its end as fits."""
        asked = [place for place, text in enumerate(texts) if text.strip()]
        alphas = np.zeros((len(texts), self.model.serving.num_slots), np.float32)
        if asked:
            ends = self.model.ends_that_fit([texts[place] for place in asked])
            alphas[asked] = self.model.choose(ends).alphas
        return alphas

    def scores(
        self, texts: Sequence[str], heads: Sequence[Sequence[int]], tails: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Score]]:
        """As the protocol says."""
        alphas = self.alphas(texts)
        slots = np.where(alphas.any(axis=1), alphas.argmax(axis=1), 0)
        found: dict[int, list[Score]] = {}
        for slot in np.unique(slots).tolist():
            lm = merge_expert(self.lm, self.experts[slot], progress=False) if slot else self.lm
            places = np.flatnonzero(slots == slot).tolist()
            scores = token_scores(lm, [heads[i] for i in places], [tails[i] for i in places])
            found |= dict(zip(places, scores, strict=True))
        return [found[place] for place in range(len(texts))]

    def completions(self, texts: Sequence[str], prompts: Sequence[Sequence[int]], budget: Budget) -> list[str]:
        """As the protocol says."""
        return _complete(self.lm, prompts, budget, Mixtures(self.model.serving.bank, self.alphas(texts)))


def _complete(lm: LM, prompts: Sequence[Sequence[int]], budget: Budget, mixtures: Mixtures | None) -> list[str]:
    rows, width = min(budget.rows, batch_bucket(len(prompts))), length_bucket(max(map(len, prompts)))
    options = CompleteOptions(mixtures=mixtures, engine=EngineConfig(rows=rows, width=width), title="lm-eval")
    texts = [""] * len(prompts)
    completions = complete(
        lm,
        prompts,
        budget.max_new_tokens,
        sampling=budget.sampling,
        key=jax.random.key(budget.seed),
        stops=budget.stops,
        options=options,
    )
    for row in completions:
        texts[row.prompt] = row.text
    return texts
