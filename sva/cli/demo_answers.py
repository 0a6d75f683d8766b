"""The demo's answers to its mixed set, kept batch by batch, so that nothing is answered twice."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from sva.adaptation.adaptive_lm import adaptive
from sva.adaptation.by_two_passes import by_two_passes
from sva.evaluation import evaluate
from sva.evaluation.evaluate import Answer, Item, Record
from sva.generation.decompose import spectra_of
from sva.generation.lm import LM
from sva.generation.merge import merge
from sva.spectral.expert import Expert

BATCH = 32


class System(NamedTuple):
    """Something that answers prompts; `make` is called when the first answer that is not kept is needed."""

    name: str
    lm: LM
    digest: str  # of the weights and experts that its answers depend on
    make: Callable[[], Answer]


def alone(lm: LM, name: str, expert: Expert | None, budget: int) -> System:
    """The base model, or one expert merged into it, for all prompts."""

    def make() -> Answer:
        if expert is None:
            return evaluate.by_generation(lm, budget)
        spectra = spectra_of(lm, expert.names)
        return evaluate.by_generation(merge(lm, spectra, expert.z(spectra)), budget)

    return System(name, lm, _digest(lm, [expert] if expert else []), make)


def in_two_passes(lm: LM, name: str, experts: Sequence[Expert], classifier: Expert, budget: int) -> System:
    """The classification expert's choice, then the answer of the expert that it chose."""

    def make() -> Answer:
        return by_two_passes(adaptive(lm, experts, classifier=classifier), budget)

    return System(name, lm, _digest(lm, [*experts, classifier]), make)


def answers(system: System, todo: Sequence[Item], directory: Path) -> list[Record]:
    """A record of every item: those kept in `directory`, and those that are answered now, kept there as well.

    Batches are cut from the start of `todo`, so that a longer list takes over the answers to a shorter one.
    """
    make = functools.cache(system.make)  # one model for all batches, dropped with the last
    records = []
    for number, batch in enumerate(evaluate.batches(todo, BATCH, system.name)):
        path = directory / f"{system.name.replace(' ', '_')}-{system.digest}" / f"{number:02d}.jsonl"
        records += evaluate.kept(path, batch, lambda batch=batch: make()(batch))
    return records


def _digest(lm: LM, experts: Sequence[Expert]) -> str:
    """Twelve characters that stand for the base and these experts, in this order."""
    parts = [lm.fingerprint, *(expert.digest for expert in experts)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
