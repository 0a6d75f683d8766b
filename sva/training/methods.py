"""The three ways to train an expert: one step each, from a state to the next."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from sva.models.layout import place_rows
from sva.parallel.processes import to_host
from sva.training import population
from sva.training import sft as supervised
from sva.training.config.reinforce import ReinforceConfig
from sva.training.context import Step, StepResult, TrainContext
from sva.training.optimizers import update_config
from sva.training.reinforce import Batch
from sva.training.rollout import grade, prompts, sample, with_rewards
from sva.training.update import ExpertState, train_step
from sva.utils import seeds
from sva.utils.timing import Clock

_DROPOUT = -2 % 2**32  # a step that no run has: apart from the keys of steps, which draw completions


def policy_gradient(context: TrainContext, state: ExpertState, step: Step, clock: Clock) -> StepResult:
    """Sampled completions, their rewards, and loss.epochs updates."""
    cfg, loss = context.rollout, context.loss
    with clock("rollout"):
        z = context.z(state.raw)
        drawn = sample(context.lm, context.spectra, z, context.batch(step.examples), step.key, cfg)
    with clock("grading"):
        rewards = context.verdicts.rewards(
            step.number, drawn.texts, lambda: grade(context.task, step.examples, drawn.texts)
        )
    with clock("update"):
        result = with_rewards(context.lm, drawn, rewards, cfg, loss)
        state, metrics, batch = _update(context, state, step.number, result.batch, loss)
        for _ in range(loss.epochs - 1):  # the first update's log-probs are those to compare with the sampler's
            state, later, _ = _update(context, state, step.number, result.batch, loss)
            metrics |= {name: value for name, value in later.items() if not name.startswith("logprob_gap")}
    row = {
        **_reward_metrics(rewards),
        "zero_advantages": float(np.mean(to_host(result.batch.advantages) == 0)),
        **metrics,
        **_length_metrics(result.tokens, rewards.size, result.overlong, result.empty),
        "tokens_per_second": result.tokens / clock.seconds["rollout"],
    }
    return StepResult(state, row, batch, drawn.texts)


def next_token(context: TrainContext, state: ExpertState, step: Step, clock: Clock) -> StepResult:
    """One update on the examples' own answers; nothing is generated."""
    lm, examples = context.lm, step.examples
    with clock("update"):
        padded = prompts(lm, context.batch(examples))
        batch = supervised.solved(lm, context.task, examples, padded, context.shapes.answer)
        loss = dataclasses.replace(context.loss, algorithm="reinforce", baseline="none", epochs=1)
        state, metrics, batch = _update(context, state, step.number, batch, loss)
    tokens = int(batch.completion_mask.sum())
    return StepResult(state, {**metrics, "tokens": tokens, "mean_length": tokens / len(examples)}, batch, [])


def evolution(context: TrainContext, state: ExpertState, step: Step, clock: Clock) -> StepResult:
    """One generation: every member answers the same prompts, its fitness is its mean reward."""
    search, examples = context.search, step.examples
    with clock("rollout"):
        members = _ask(search, state.opt_state, step.key)
        z = jax.vmap(context.z)(members)
        answers = population.answer(
            context.lm, context.nested, z, context.task, examples, context.shapes.population, context.max_new_tokens
        )
    with clock("grading"):
        # The texts are member by member; a "sample" of prompt q is a member's answer to it.
        by_prompt = [
            answers.texts[m * len(examples) + q] for q in range(len(examples)) for m in range(search.population)
        ]
        rewards = context.verdicts.rewards(step.number, by_prompt, lambda: grade(context.task, examples, by_prompt)).T
    with clock("update"):
        ties = population.likelihood_of_right(rewards, answers.mean_logprobs)
        opt_state = _tell(search, state.opt_state, members, rewards.mean(axis=1), ties)
        raw = search.solution(opt_state)
        state = dataclasses.replace(state, raw=raw, opt_state=opt_state, step=state.step + 1)
        z = context.z(raw)
    tokens = int(answers.lengths.sum())
    row = {
        **_reward_metrics(rewards),
        "best_reward": float(rewards.mean(axis=1).max()),
        "z_spread": float(np.std(np.concatenate([np.ravel(x) for x in z.values()]))),
        **_length_metrics(tokens, rewards.size, answers.overlong, answers.empty),
        "tokens_per_second": tokens / clock.seconds["rollout"],
    }
    return StepResult(state, row, None, answers.texts)


STEPS = {"policy_gradient": policy_gradient, "next_token": next_token, "evolution": evolution}


def _update(
    context: TrainContext, state: ExpertState, number: int, batch: Batch, loss: ReinforceConfig
) -> tuple[ExpertState, dict[str, float], Batch]:
    """`train_step` of step `number`, with its metrics on the host and the batch as the step read it."""
    lm, cfg = context.lm, context.train
    if context.family.has_noise:
        # Of the updates done, so that each epoch of a batch drops anew, and a resumed run as the first one did.
        key = jax.random.fold_in(jax.random.fold_in(seeds.key(context.seed), _DROPOUT), int(to_host(state.step)))
        noise = jax.random.bits(key, batch.prompt_ids.shape[:1], np.uint32)
        batch = dataclasses.replace(batch, noise=noise)
    placed = place_rows(batch, lm.mesh)
    fixed = {"model": lm.model, "family": context.family, "loss": loss, "cfg": update_config(cfg, number)}
    state, metrics = train_step(state, context.nested, lm.params, placed, **fixed)
    return state, {name: float(value) for name, value in to_host(metrics).items()}, batch


def _reward_metrics(rewards: np.ndarray) -> dict[str, float]:
    return {"reward": float(rewards.mean()), "accuracy": float((rewards > 0).mean())}


def _length_metrics(tokens: int, rows: int, overlong: int, empty: int) -> dict[str, Any]:
    return {"tokens": tokens, "mean_length": tokens / rows, "overlong": overlong, "empty": empty}


@partial(jax.jit, static_argnames=("search",))
def _ask(search: Any, opt_state: Any, key: jax.Array) -> Any:
    return search.ask(opt_state, key)


@partial(jax.jit, static_argnames=("search",))
def _tell(search: Any, opt_state: Any, members: Any, fitness: Any, ties: Any) -> Any:
    return search.tell(opt_state, members, fitness, ties)
