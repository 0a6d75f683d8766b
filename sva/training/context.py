"""What a training run's steps share, and what each of them is given and returns."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax

from sva.adapters.family import Family
from sva.evaluation.evaluate import Item
from sva.generation.lm import LM
from sva.generation.population_batch import PaddedShape
from sva.models.transformer import Transformer
from sva.models.weights import unnest
from sva.spectral.parametrisations import Frozen
from sva.tasks.base import Example, Task
from sva.training.config.evaluation import ValidationConfig
from sva.training.config.reinforce import ReinforceConfig
from sva.training.config.rollout import RolloutConfig
from sva.training.config.train import TrainConfig
from sva.training.reinforce import Batch, matrix_infos_of
from sva.training.rollout import PromptShape, TaskBatch, Verdicts
from sva.training.search import Search
from sva.training.update import ExpertState


class PaddedShapes(NamedTuple):
    """Sizes that fit every example of the training split, so that all steps run the same programs."""

    prompt: PromptShape
    answer: int  # tokens of a given answer, for next_token
    population: PaddedShape | None  # of the prompts that a population answers, for evolution


@dataclasses.dataclass(frozen=True)
class TrainContext:
    """All that stays the same from step to step."""

    lm: LM
    spectra: Mapping[str, Frozen]  # or what a family without spectra may know of its weights; see `_context`
    seed: int
    family: Family
    task: Task
    rollout: RolloutConfig
    loss: ReinforceConfig
    train: TrainConfig
    search: Search
    shapes: PaddedShapes
    verdicts: Verdicts
    validation: ValidationConfig
    held_out: Sequence[Item]  # that the validation answers

    @cached_property
    def nested(self) -> Mapping[str, Any]:
        """The spectra as the model's tree."""
        return self.lm.model.nest(self.spectra)

    @property
    def max_new_tokens(self) -> int:
        """Tokens of a completion at most."""
        return self.rollout.max_new_tokens or self.task.max_new_tokens

    def z(self, raw: Any) -> dict[str, Any]:
        """{name: z} of raw values, keyed as `spectra`."""
        return _z(raw, self.nested, tuple(self.spectra), self.lm.model, self.family)

    def batch(self, examples: Sequence[Example]) -> TaskBatch:
        """Examples with the shape of their prompts."""
        return TaskBatch(self.task, examples, self.shapes.prompt)


@partial(jax.jit, static_argnames=("names", "model", "family"))
def _z(
    raw: Any, spectra: Mapping[str, Any], names: tuple[str, ...], model: Transformer, family: Family
) -> dict[str, Any]:
    return unnest(family.z(model.nest(raw), matrix_infos_of(model, spectra)), names, scan=model.scan_layers)


class Step(NamedTuple):
    """What distinguishes one step from the others."""

    number: int
    examples: Sequence[Example]
    key: jax.Array


class StepResult(NamedTuple):
    """The state after a step, and what was measured in it."""

    state: ExpertState
    row: dict[str, Any]  # of metrics
    batch: Batch | None
    texts: list[str]
