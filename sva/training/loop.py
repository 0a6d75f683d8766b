"""The training loop of one expert, which can be killed at any moment and resumes at its last saved step."""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sva.evaluation import evaluate
from sva.generation.finite import cause
from sva.generation.lm import LM
from sva.generation.merge import merge_unchecked
from sva.models import layout
from sva.models.weights import by_module, is_module
from sva.parallel.preemption import shielded
from sva.parallel.processes import is_writer, to_host
from sva.parallel.sharding import place, shardings
from sva.spectral.parametrisations import Frozen, family
from sva.tasks.base import Example, Task
from sva.tasks.batches import batch_indices, drawn_indices
from sva.training import guards, population, validation
from sva.training.checkpoint import Checkpoints
from sva.training.config import Config
from sva.training.config.guards import GuardConfig
from sva.training.config.train import TrainConfig
from sva.training.context import PaddedShapes, Step, StepResult, TrainContext
from sva.training.methods import STEPS
from sva.training.metrics import MetricsLog
from sva.training.optimizers import update_config
from sva.training.reinforce import Batch
from sva.training.rollout import RewardError, Verdicts, prompt_shape
from sva.training.search import search_of
from sva.training.sft import solution_width
from sva.training.update import ExpertState, init_state
from sva.utils import seeds
from sva.utils.errors import UserError
from sva.utils.timing import Clock


def fit(
    lm: LM,
    spectra: Mapping[str, Frozen],
    task: Task,
    run_dir: Path,
    config: Config,
    *,
    profile: bool = False,
    on_step: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> ExpertState:
    """The last state of a run of config.train.steps steps, which resumes from whatever `run_dir` holds.

    The state is saved as checkpoint.every says and where the run is interrupted or fails; SIGTERM lets a save finish. A
    step is a pure function of (seed, step, state): killed and started again, a run ends in the same state bit for bit.

    Args:
      profile: write a trace of the second step of this process under run_dir/profile.
      on_step: called with each step's row of metrics; `alarms` in it are lines.
    Returns:
      The last state; `chosen` of it is what the run is for.
    Raises:
      UserError: a state that is damaged or of other settings, a reward function that raised, a full disk.
      FloatingPointError: a loss, gradient or reward is not finite, or an alarm stops the run; the last sound state is
        kept, and the batch under run_dir/failed.
    """
    context = _context(lm, spectra, task, run_dir, config)
    source = _training_examples(task, config.train.examples, config.seed)
    choose = _draws(len(source), config)
    checkpoints = Checkpoints(run_dir / "state", _settings_digest(context, config))
    first, state = _resumed(context, checkpoints)
    log, clock = MetricsLog(run_dir, first) if is_writer() else None, Clock()
    try:
        with checkpoints, shielded() as shield:
            if first == 0:
                state, _ = _validated(context, state, 0, clock)
            for number in range(first, config.train.steps):
                if validation.is_over(state.best, number, config.validation):
                    break
                key = jax.random.fold_in(seeds.key(config.seed), number)
                step = Step(number, [source[i] for i in choose(number)], key)
                with _traced(run_dir / "profile", profile and number == first + 1):
                    result = _guarded(context, state, step, clock, run_dir, config.guards)
                state, measured = _validated(context, result.state, number + 1, clock)
                row = {"step": number, **result.row, **measured, **clock.lap()}
                if alarms := guards.alarms(row, config.guards):
                    row["alarms"] = alarms
                if log is not None:
                    log.write(row)
                checkpoints.hold(number + 1, state)
                if _is_saved(number + 1, state, config):
                    with shield.up():
                        checkpoints.save_held()
                on_step(row)
                if alarms and config.guards.on_alarm == "stop":
                    where = _keep(run_dir, step, result.batch, result.texts, "; ".join(alarms))
                    raise FloatingPointError(f"step {number}: {'; '.join(alarms)}; the batch is kept in {where}")
    finally:
        if log is not None:
            log.close()
    return state


def _context(lm: LM, spectra: Mapping[str, Frozen], task: Task, run_dir: Path, config: Config) -> TrainContext:
    """What the steps of this run share.

    Where a state is one expert's, the modules of a layer are one entry of it, of thousands of small ones a few hundred.
    """
    source, method, member = task.source("train"), config.train.method, family(config.parametrisation)
    validate = config.validation
    return TrainContext(
        lm=lm,
        spectra=spectra if method == "evolution" else layout.together(lm.model, spectra),
        seed=config.seed,
        family=member,
        task=task,
        rollout=config.rollout,
        loss=config.reinforce,
        train=config.train,
        search=search_of(config.evolution, lr=config.train.lr, centre=member.centre, bound=config.train.bound),
        shapes=PaddedShapes(
            prompt=prompt_shape(lm, task, source),
            answer=solution_width(lm, task, source) if method == "next_token" else 0,
            population=population.shape_of(lm, task, source) if method == "evolution" else None,
        ),
        verdicts=Verdicts(run_dir, config.checkpoint.every),
        validation=validate,
        held_out=evaluate.items(task, validate.split, validate.size or sys.maxsize) if validate.every else [],
    )


def _is_saved(steps: int, state: ExpertState, config: Config) -> bool:
    """Whether the state after so many steps is one to resume from: every so often, and where the run ends."""
    is_last = steps == config.train.steps or validation.is_over(state.best, steps, config.validation)
    return is_last or steps % config.checkpoint.every == 0


def _training_examples(task: Task, number: int | None, seed: int) -> Sequence[Example]:
    """The training split, or `number` different rows of it, another choice for another seed."""
    source = task.source("train")
    if number is None:
        return source
    if number > len(source):
        raise UserError(
            f"train.examples={number}, but the task's training split has {len(source)}; leave it out for all"
        )
    return [source[i] for i in batch_indices(len(source), number, 0, seed)]


def _draws(rows: int, config: Config) -> Callable[[int], list[int]]:
    """The numbers of the rows that a step sees, from its number.

    Raises:
      UserError: independent draws take all rows, and those do not divide into micro-batches.
    """
    size, each = min(rows, config.rollout.prompts), config.train.micro_batch
    if config.train.draws == "independent" and config.train.method != "evolution" and size % each:
        raise UserError(
            f"train.draws=independent takes all {size} rows a step, no multiple of train.micro_batch={each}; change it"
        )
    draw = drawn_indices if config.train.draws == "independent" else batch_indices
    return lambda step: draw(rows, config.rollout.prompts, step, config.seed)


def _with_noise(raw: Any, deviation: float, seed: int) -> Any:
    """Raw values with normal noise, in their dtype; another seed gives another start."""
    leaves, form = jax.tree.flatten(raw)
    keys = jax.random.split(jax.random.fold_in(seeds.key(seed), -1 % 2**32), len(leaves))
    noise = [deviation * jax.random.normal(key, x.shape, np.float32) for key, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(form, [(x + n).astype(x.dtype) for x, n in zip(leaves, noise, strict=True)])


def _settings_digest(context: TrainContext, config: Config) -> bytes:
    """32 bytes that are others for a run whose states this one must not load.

    More steps leave them the same, unless the learning rate falls with the steps.
    """
    train = config.train
    if train.schedule == "constant":
        train = dataclasses.replace(train, steps=TrainConfig().steps)
    rollouts = dataclasses.replace(config.rollout, rows=None)
    parts = (rollouts, config.reinforce, train, config.evolution, config.validation)
    about = (str(context.family), context.task.name, context.lm.fingerprint, config.seed)
    return hashlib.sha256(json.dumps((*about, *map(_not_default, parts))).encode()).digest()


def _not_default(settings: Any) -> dict[str, Any]:
    """Settings that are not the default, so that one added in a later version does not make a state another's."""
    return {k: v for k, v in dataclasses.asdict(settings).items() if v != getattr(type(settings)(), k)}


def _resumed(context: TrainContext, checkpoints: Checkpoints) -> tuple[int, ExpertState]:
    """(steps done, state): the last one saved, or the one before the first step."""
    state = init_state(context.spectra, context.family, update_config(context.train))
    if context.train.init_noise:
        state = dataclasses.replace(state, raw=_with_noise(state.raw, context.train.init_noise, context.seed))
    if context.train.method == "evolution":
        state = dataclasses.replace(state, opt_state=context.search.init(state.raw))
    if context.validation.every:
        state = dataclasses.replace(state, best=validation.nothing_yet(state.raw))
    first, state = checkpoints.restore(state) or (0, state)
    if context.lm.mesh is not None:
        leaves = layout.trained(context.lm.model.cfg, context.family, state)
        state = place(to_host(state), shardings(leaves, context.lm.mesh))
    return first, state


def _validated(
    context: TrainContext, state: ExpertState, steps: int, clock: Clock
) -> tuple[ExpertState, dict[str, float]]:
    """(state, metrics) after `steps` steps: where a validation is due, its accuracy and the better of both states."""
    if state.best is None or not validation.is_due(steps, context.train.steps, context.validation):
        return state, {}
    with clock("validation"):
        accuracy = _accuracy(context, state.raw)
    best = validation.better(state.best, state.raw, accuracy, steps)
    return dataclasses.replace(state, best=best), {"validation_accuracy": accuracy}


def _accuracy(context: TrainContext, raw: Any) -> float:
    """Share of right greedy answers of the adapted model."""
    spectra, z = layout.apart(context.lm.model, context.spectra), context.z(raw)
    if any(map(is_module, z)):
        z = by_module(to_host(z), spectra)
    adapted = merge_unchecked(context.lm, spectra, z)
    records = evaluate.evaluate(adapted, context.held_out, batch_size=context.validation.batch_size, progress=False)
    return float(np.mean([record.correct for record in records]))


def _guarded(
    context: TrainContext, state: ExpertState, step: Step, clock: Clock, run_dir: Path, watch: GuardConfig
) -> StepResult:
    """One step of the method; a step that fails is kept on disk, and stops the run or is left out."""
    try:
        result = STEPS[context.train.method](context, state, step, clock)
    except RewardError as error:
        where = _keep(run_dir, step, None, error.texts, str(error))
        raise UserError(f"step {step.number}: {error}; its completions are kept in {where}") from error
    if guards.is_finite(result.row):
        return result
    reason = ", ".join(f"{name} {result.row[name]}" for name in ("loss", "grad_norm", "reward") if name in result.row)
    reason += f": {cause(context.lm)}"
    where = _keep(run_dir, step, result.batch, result.texts, reason)
    if watch.not_finite == "stop":
        raise FloatingPointError(f"step {step.number}: {reason}; the batch is kept in {where}")
    return result._replace(state=state, row={**result.row, "skipped": 1})


def _keep(run_dir: Path, step: Step, batch: Batch | None, texts: Sequence[str], reason: str) -> Path:
    """Where the step's batch and completions are kept, for another look."""
    directory = run_dir / "failed"
    if not is_writer():
        return directory
    about = {"reason": reason, "examples": list(map(dict, step.examples)), "texts": list(texts)}
    return guards.keep_batch(directory, step.number, batch, about)


@contextlib.contextmanager
def _traced(directory: Path, is_on: bool) -> Iterator[None]:
    """Inside, JAX's profiler writes a trace."""
    with jax.profiler.trace(str(directory)) if is_on else contextlib.nullcontext():
        yield
