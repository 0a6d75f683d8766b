"""Training one expert: the state, one update, and the loop that can be killed at any moment."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from sva.evaluation import evaluate
from sva.generation.finite import cause
from sva.generation.lm import LM
from sva.generation.merge import merge
from sva.generation.population_batch import PaddedShape
from sva.models.layout import place_rows
from sva.models.transformer import Transformer, check_gradients
from sva.parallel.preemption import shielded
from sva.parallel.processes import is_writer, to_host
from sva.parallel.sharding import constrain, place, repeat_all, replicated
from sva.spectral import spelling
from sva.spectral.forms import Spectrum
from sva.spectral.parametrisations import Family, MatrixInfo, matrix_infos
from sva.tasks.base import Example, Task
from sva.tasks.batches import batch_indices
from sva.training import guards, population, validation
from sva.training import sft as supervised
from sva.training.checkpoint import Checkpoints
from sva.training.config.evaluation import ValidationConfig
from sva.training.config.evolution import EvolutionConfig
from sva.training.config.guards import GuardConfig
from sva.training.config.reinforce import ReinforceConfig
from sva.training.config.rollout import RolloutConfig
from sva.training.config.together import check
from sva.training.config.train import TrainConfig
from sva.training.metrics import MetricsLog
from sva.training.optimizers import optimizer
from sva.training.reinforce import Batch, matrix_infos_of, reinforce_loss
from sva.training.rollout import RewardError, Verdicts, grade, prompt_width, prompts, rewarded, sample
from sva.training.search import search_of
from sva.training.sft import solution_width
from sva.training.validation import Best
from sva.utils import seeds
from sva.utils.errors import UserError


@struct.dataclass
class ExpertState:
    """All that training changes: under a megabyte for a 135M model, under 10 for an 8B one."""

    raw: Any  # {weight name: [R]} for most families; in cfg.param_dtype
    opt_state: Any  # of the optimiser, or of the search
    step: jax.Array  # [] int32, updates done
    best: Best | None = None  # where the run validates

    @property
    def chosen(self) -> Any:
        """The raw values that the run is for: the best ones where it validates, else the last."""
        return self.raw if self.best is None else self.best.raw


def init_state(spectra: Mapping[str, Spectrum], family: Family, cfg: TrainConfig) -> ExpertState:
    """The state before the first update: the base model."""
    raw = jax.tree.map(lambda x: x.astype(cfg.param_dtype), family.start(matrix_infos(spectra)))
    return ExpertState(raw, optimizer(cfg).init(raw), jnp.zeros((), jnp.int32))


def apply_gradient(raw: Any, opt_state: Any, grads: Any, *, family: Family, cfg: TrainConfig) -> tuple[Any, Any]:
    """(raw, opt_state) after one update by float32 gradients.

    With cfg.bound, every raw value is then put back to within that distance of the family's centre: of 0 for
    `sigmoid_nuclear`, where a bound of 1.0 is what bfloat16 imposes at lr 2e-3 (z between 0.27 and 0.73 before its
    rescaling); of 1, the base, for the families that train z itself; of 0, the base, for `banded`, `core` and
    `projected`. In bfloat16 the bound itself is rounded, by up to 0.4 %.
    """
    updates, opt_state = optimizer(cfg).update(grads, opt_state, raw)
    raw = optax.apply_updates(raw, updates)
    if cfg.bound is not None:
        low, high = family.centre - cfg.bound, family.centre + cfg.bound
        raw = jax.tree.map(lambda x: jnp.clip(x, low, high), raw)
    return raw, opt_state


@partial(jax.jit, static_argnames=("model", "family", "loss", "cfg"))
def train_step(
    state: ExpertState,
    spectra: Mapping[str, Any],
    params: Mapping[str, Any],
    batch: Batch,
    *,
    model: Transformer,
    family: Family,
    loss: ReinforceConfig,
    cfg: TrainConfig,
) -> tuple[ExpertState, dict[str, jax.Array]]:
    """One update from one batch, in micro-batches.

    Args:
      state: what is trained.
      spectra: the model's nested tree of spectra.
      params: base weights.
      batch: of P prompts, a multiple of cfg.micro_batch.
    Returns:
      (new state, metrics): loss, policy_loss, kl (nats a completion), entropy (nats a token), clipped (share of the
      tokens whose gradient a clipped ratio stopped), grad_norm, logprob_gap and logprob_gap_mean (largest and mean
      difference between the sampler's and the trainer's log-probs of a token, nats, both at the batch's temperature;
      0 where nothing was sampled),
      z_spread (standard deviation of z, or of the entries of cores and bands).
    """
    check_gradients(model)
    model = model.clone(remat=cfg.remat)
    prompts, rows = batch.prompt_ids.shape[0], batch.completion_ids.shape[0]
    count = prompts // cfg.micro_batch
    if batch.temperature is not None:  # one for all rows is split as if each had its own
        batch = dataclasses.replace(batch, temperature=jnp.broadcast_to(jnp.asarray(batch.temperature), (rows,)))

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(count, x.shape[0] // count, *x.shape[1:])
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    pieces = jax.tree.map(split, batch)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), state.raw)  # so that gradients and their sums are float32

    def loss_of(raw: Mapping[str, Any], batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        return reinforce_loss(model.nest(raw), spectra, params, batch, model=model, family=family, cfg=loss)

    def add(total: Any, piece: Batch) -> tuple[Any, None]:
        (value, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(exact, piece)
        logprobs = aux.pop("logprobs")
        sampled = logprobs if piece.sampled is None else piece.sampled * piece.completion_mask
        gap = jnp.abs(logprobs - sampled)
        sums, largest = total
        new = (grads, {"loss": value, "logprob_gap_mean": gap.sum() / gap.shape[0], **aux})
        return (jax.tree.map(jnp.add, sums, new), jnp.maximum(largest, gap.max())), None

    names = ("loss", "policy_loss", "kl", "entropy", "clipped", "logprob_gap_mean")
    start = ((jax.tree.map(jnp.zeros_like, exact), {name: jnp.zeros(()) for name in names}), jnp.zeros(()))
    (sums, gap), _ = jax.lax.scan(add, start, pieces)
    grads, metrics = jax.tree.map(lambda x: x / count, sums)
    rows_a_token = batch.completion_mask.shape[0] / jnp.maximum(batch.completion_mask.sum(), 1)
    metrics |= {name: metrics[name] * rows_a_token for name in ("entropy", "clipped", "logprob_gap_mean")}
    raw, opt_state = apply_gradient(state.raw, state.opt_state, grads, family=family, cfg=cfg)
    z = family.z(model.nest(raw), matrix_infos_of(model, spectra))
    metrics |= {
        "grad_norm": optax.tree.norm(grads),
        "logprob_gap": gap,
        "z_spread": jnp.std(jnp.concatenate([x.ravel() for x in jax.tree.leaves(z)])),
    }
    new = dataclasses.replace(state, raw=raw, opt_state=opt_state, step=state.step + 1)
    return repeat_all((new, metrics))


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the block under `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def lap(self) -> dict[str, float]:
        """{name_seconds} since the last lap, what was not counted as `rest_seconds`, all together `step_seconds`."""
        now = time.perf_counter()
        total, counted, self._started = now - self._started, self.seconds, now
        self.seconds = {}
        named = {f"{name}_seconds": value for name, value in counted.items()}
        return {**named, "rest_seconds": total - sum(counted.values()), "step_seconds": total}


@dataclasses.dataclass(frozen=True)
class Course:
    """All that stays the same from step to step."""

    lm: LM
    spectra: Mapping[str, Spectrum]
    nested: Mapping[str, Any]  # the same spectra as the model's tree
    infos: Mapping[str, MatrixInfo]
    family: Family
    task: Task
    width: int  # of prompts
    room: PaddedShape | None  # of prompts that a population answers
    answer_width: int  # of given answers
    rollouts: RolloutConfig
    loss: ReinforceConfig
    cfg: TrainConfig
    search: Any
    verdicts: Verdicts

    @property
    def budget(self) -> int:
        """Tokens of a completion at most."""
        return self.rollouts.max_new_tokens or self.task.max_new_tokens

    def update(self, state: ExpertState, batch: Batch, loss: ReinforceConfig) -> tuple[ExpertState, dict[str, float]]:
        """`train_step`, with its metrics on the host."""
        batch = place_rows(batch, self.lm.mesh)
        fixed = {"model": self.lm.model, "family": self.family, "loss": loss, "cfg": self.cfg}
        state, metrics = train_step(state, self.nested, self.lm.params, batch, **fixed)
        return state, {name: float(value) for name, value in to_host(metrics).items()}


class Stepped(NamedTuple):
    """What one step made."""

    state: ExpertState
    row: dict[str, Any]  # of metrics
    batch: Batch | None
    texts: list[str]


def policy_gradient(
    course: Course, state: ExpertState, step: int, examples: Sequence[Example], key: jax.Array, clock: Clock
) -> Stepped:
    """Sampled completions, their rewards, and loss.epochs updates."""
    with clock("rollout"):
        z = _z_of(state.raw, course.infos, course.family)
        on = course.nested if course.rollouts.form == "factored" else course.spectra
        drawn = sample(course.lm, on, z, course.task, examples, key, course.rollouts, course.width)
    with clock("grading"):
        rewards = course.verdicts.rewards(step, drawn.texts, lambda: grade(course.task, examples, drawn.texts))
    with clock("update"):
        result = rewarded(course.lm, drawn, rewards, course.rollouts, course.loss)
        state, metrics = course.update(state, result.batch, course.loss)
        for _ in range(course.loss.epochs - 1):  # the first update's log-probs are those to compare with the sampler's
            state, later = course.update(state, result.batch, course.loss)
            metrics |= {name: value for name, value in later.items() if not name.startswith("logprob_gap")}
    row = {**_earned(rewards), **metrics, **_lengths(result.tokens, rewards.size, result.overlong, result.empty)}
    row["tokens_per_second"] = result.tokens / clock.seconds["rollout"]
    return Stepped(state, row, result.batch, drawn.texts)


def next_token(
    course: Course, state: ExpertState, step: int, examples: Sequence[Example], key: jax.Array, clock: Clock
) -> Stepped:
    """One update on the examples' own answers; nothing is generated."""
    del step, key
    with clock("update"):
        asked = prompts(course.lm, course.task, examples, course.width)
        batch = supervised.solved(course.lm, course.task, examples, asked, course.answer_width)
        loss = dataclasses.replace(course.loss, algorithm="reinforce", baseline="none", epochs=1)
        state, metrics = course.update(state, batch, loss)
    tokens = int(batch.completion_mask.sum())
    return Stepped(state, {**metrics, "tokens": tokens, "mean_length": tokens / len(examples)}, batch, [])


def evolution(
    course: Course, state: ExpertState, step: int, examples: Sequence[Example], key: jax.Array, clock: Clock
) -> Stepped:
    """One generation: every member answers the same prompts, its fitness is its mean reward."""
    with clock("rollout"):
        members = _ask(course.search, state.opt_state, key)
        answers = population.answer(
            course.lm,
            course.nested,
            members,
            course.infos,
            course.family,
            course.task,
            examples,
            course.room,
            course.budget,
        )
    with clock("grading"):
        # The texts are member by member; a "sample" of prompt q is a member's answer to it.
        turned = [
            answers.texts[m * len(examples) + q] for q in range(len(examples)) for m in range(course.search.population)
        ]
        rewards = course.verdicts.rewards(step, turned, lambda: grade(course.task, examples, turned)).T
    with clock("update"):
        ties = population.likelihood_of_right(rewards, answers.mean_logprobs)
        opt_state = _tell(course.search, state.opt_state, members, rewards.mean(axis=1), ties)
        raw = course.search.solution(opt_state)
        new = dataclasses.replace(state, raw=raw, opt_state=opt_state, step=state.step + 1)
        z = _z_of(raw, course.infos, course.family)
    tokens = int(answers.lengths.sum())
    row = {
        **_earned(rewards),
        "best_reward": float(rewards.mean(axis=1).max()),
        "z_spread": float(np.std(np.concatenate([np.ravel(x) for x in z.values()]))),
        **_lengths(tokens, rewards.size, answers.overlong, answers.empty),
        "tokens_per_second": tokens / clock.seconds["rollout"],
    }
    return Stepped(new, row, None, answers.texts)


_STEPS = {"policy_gradient": policy_gradient, "next_token": next_token, "evolution": evolution}


def _earned(rewards: np.ndarray) -> dict[str, float]:
    return {"reward": float(rewards.mean()), "accuracy": float((rewards > 0).mean())}


def _lengths(tokens: int, rows: int, overlong: int, empty: int) -> dict[str, Any]:
    return {"tokens": tokens, "mean_length": tokens / rows, "overlong": overlong, "empty": empty}


def fit(
    lm: LM,
    spectra: Mapping[str, Spectrum],
    family: Family,
    task: Task,
    run_dir: Path,
    *,
    rollouts: RolloutConfig,
    loss: ReinforceConfig,
    cfg: TrainConfig,
    seed: int,
    search: EvolutionConfig = EvolutionConfig(),
    watch: GuardConfig = GuardConfig(),
    validate: ValidationConfig = ValidationConfig(),
    profile: bool = False,
    on_step: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> ExpertState:
    """Trains until cfg.steps steps are done, going on from whatever `run_dir` holds.

    The state is saved after every step, and a step is a pure function of (seed, step, state): killed and started
    again, a run ends in the same state bit for bit. SIGTERM ends it at once, but lets a save finish.

    Args:
      search, watch, validate: settings of evolution, of the guards and of the validation.
      profile: write a trace of the second step of this process under run_dir/profile.
      on_step: called with each step's row of metrics; `alarms` in it are lines.
    Returns:
      The last state; `chosen` of it is what the run is for.
    Raises:
      UserError: settings that do not go together, a state that is damaged or of other settings, a reward function that
        raised, a full disk.
      FloatingPointError: a loss, gradient or reward is not finite, or an alarm stops the run; the last sound state is
        kept, and the batch under run_dir/failed.
    """
    check(spelling.parse(str(family)), rollouts, loss, cfg, search, watch)
    seeds.check("seed", seed)
    source = task.source("train")
    parts = (rollouts, loss, dataclasses.replace(cfg, steps=TrainConfig().steps), search, validate)
    settings = _digest(str(family), task.name, lm.fingerprint, seed, *map(_unusual, parts))
    checkpoints = Checkpoints(run_dir / "state", settings)
    course = Course(
        lm=lm,
        spectra=spectra,
        nested=lm.model.nest(spectra),
        infos=matrix_infos(spectra),
        family=family,
        task=task,
        width=prompt_width(lm, task, source),
        room=population.shape_of(lm, task, source) if cfg.method == "evolution" else None,
        answer_width=solution_width(lm, task, source) if cfg.method == "next_token" else 0,
        rollouts=rollouts,
        loss=loss,
        cfg=cfg,
        search=search_of(search, lr=cfg.lr, centre=family.centre, bound=cfg.bound),
        verdicts=Verdicts(run_dir),
    )
    if cfg.examples is not None:
        source = _some(source, cfg.examples, seed)
    held_out = evaluate.items(task, validate.split, validate.size) if validate.every else []
    state = _start(course, validate)
    restored = checkpoints.restore(state)
    start, state = restored if restored else (0, state)
    if lm.mesh is not None:
        everywhere = replicated(lm.mesh)
        state = place(to_host(state), jax.tree.map(lambda _: everywhere, state))
    log = MetricsLog(run_dir, start) if is_writer() else None
    clock = Clock()

    def validated(state: ExpertState, step: int) -> tuple[ExpertState, dict[str, float]]:
        if state.best is None or not validation.is_due(step, cfg.steps, validate):
            return state, {}
        with clock("validation"):
            accuracy = _accuracy(course, state.raw, held_out, validate.batch_size)
        best = validation.better(state.best, state.raw, accuracy, step)
        return dataclasses.replace(state, best=best), {"validation_accuracy": accuracy}

    try:
        with shielded() as shield:
            if start == 0:
                state, _ = validated(state, 0)
            for step in range(start, cfg.steps):
                if validation.is_over(state.best, step, validate):
                    break
                examples = [source[i] for i in batch_indices(len(source), rollouts.prompts, step, seed)]
                key = jax.random.fold_in(seeds.key(seed), step)
                with _traced(run_dir / "profile", profile and step == start + 1):
                    stepped = _guarded(course, state, step, examples, key, clock, run_dir, watch)
                state, found = validated(stepped.state, step + 1)
                row = {"step": step, **stepped.row, **found, **clock.lap()}
                row |= {"alarms": guards.alarms(row, watch)} if guards.alarms(row, watch) else {}
                if log is not None:
                    log.write(row)
                with shield.up():
                    checkpoints.save(step + 1, state)
                on_step(row)
                if "alarms" in row and watch.on_alarm == "stop":
                    said = "; ".join(row["alarms"])
                    where = _keep(run_dir, step, examples, stepped.batch, stepped.texts, said)
                    raise FloatingPointError(f"step {step}: {said}; the batch is kept in {where}")
    finally:
        if log is not None:
            log.close()
        checkpoints.close()
    return state


def _some(source: Sequence[Example], number: int, seed: int) -> list[Example]:
    """So many different rows of a split, another choice for another seed."""
    if number > len(source):
        raise UserError(
            f"train.examples={number}, but the task's training split has {len(source)}; leave it out for all"
        )
    return [source[i] for i in batch_indices(len(source), number, 0, seed)]


def _unusual(settings: Any) -> dict[str, Any]:
    """Settings that are not the default, so that one added in a later version does not make a state another's."""
    return {k: v for k, v in dataclasses.asdict(settings).items() if v != getattr(type(settings)(), k)}


def _digest(*parts: Any) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def _start(course: Course, validate: ValidationConfig) -> ExpertState:
    """The state before the first step."""
    state = init_state(course.spectra, course.family, course.cfg)
    if course.cfg.method == "evolution":
        state = dataclasses.replace(state, opt_state=course.search.init(state.raw))
    return dataclasses.replace(state, best=validation.nothing_yet(state.raw)) if validate.every else state


def _guarded(
    course: Course,
    state: ExpertState,
    step: int,
    examples: Sequence[Example],
    key: jax.Array,
    clock: Clock,
    run_dir: Path,
    watch: GuardConfig,
) -> Stepped:
    """One step of the method; what goes wrong in it is kept, and stops the run or leaves the step out."""
    try:
        stepped = _STEPS[course.cfg.method](course, state, step, examples, key, clock)
    except RewardError as error:
        where = _keep(run_dir, step, examples, None, error.texts, str(error))
        raise UserError(f"step {step}: {error}; its completions are kept in {where}") from error
    if guards.is_finite(stepped.row):
        return stepped
    reason = ", ".join(f"{name} {stepped.row[name]}" for name in ("loss", "grad_norm", "reward") if name in stepped.row)
    reason += f": {cause(course.lm)}"
    where = _keep(run_dir, step, examples, stepped.batch, stepped.texts, reason)
    if watch.not_finite == "stop":
        raise FloatingPointError(f"step {step}: {reason}; the batch is kept in {where}")
    return stepped._replace(state=state, row={**stepped.row, "skipped": 1})


def _keep(
    run_dir: Path, step: int, examples: Sequence[Example], batch: Batch | None, texts: Sequence[str], reason: str
) -> Path:
    if not is_writer():
        return run_dir / "failed"
    about = {"reason": reason, "examples": list(map(dict, examples)), "texts": list(texts)}
    return guards.keep_batch(run_dir / "failed", step, batch, about)


def _accuracy(course: Course, raw: Any, held_out: Sequence[evaluate.Item], batch_size: int) -> float:
    """Share of right greedy answers of the adapted model."""
    adapted = merge(course.lm, course.spectra, _z_of(raw, course.infos, course.family))
    records = evaluate.evaluate(adapted, held_out, batch_size=batch_size, progress=False)
    return float(np.mean([record.correct for record in records]))


@contextlib.contextmanager
def _traced(directory: Path, is_on: bool) -> Iterator[None]:
    """Inside, JAX's profiler writes a trace."""
    with jax.profiler.trace(str(directory)) if is_on else contextlib.nullcontext():
        yield


@partial(jax.jit, static_argnames=("family",))
def _z_of(raw: Any, infos: Mapping[str, MatrixInfo], family: Family) -> dict[str, Any]:
    return family.z(raw, infos)


@partial(jax.jit, static_argnames=("search",))
def _ask(search: Any, opt_state: Any, key: jax.Array) -> Any:
    return search.ask(opt_state, key)


@partial(jax.jit, static_argnames=("search",))
def _tell(search: Any, opt_state: Any, members: Any, fitness: Any, ties: Any) -> Any:
    return search.tell(opt_state, members, fitness, ties)
