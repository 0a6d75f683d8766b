import collections
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sva.generation import chat
from sva.generation.decompose import decompose
from sva.generation.merge import merge
from sva.generation.sampling import OnPolicy
from sva.generation.testing import NameAColour, toy_lm
from sva.spectral.parametrisations import LINEAR, SIGMOID_NUCLEAR
from sva.tasks.batches import drawn_indices
from sva.training.checkpoint import Checkpoints
from sva.training.config import Config
from sva.training.config.checkpoint import CheckpointConfig
from sva.training.config.evaluation import ValidationConfig
from sva.training.config.evolution import EvolutionConfig
from sva.training.config.guards import GuardConfig
from sva.training.config.reinforce import ReinforceConfig
from sva.training.config.rollout import RolloutConfig
from sva.training.config.train import TrainConfig
from sva.training.guards import load_batch
from sva.training.loop import fit
from sva.training.metrics import read
from sva.training.optimizers import update_config
from sva.training.rollout import PromptShape, TaskBatch, grade, prompt_shape, prompts, sample, with_rewards
from sva.training.sft import solved
from sva.training.update import init_state, train_step
from sva.training.validation import better, is_over, nothing_yet
from sva.utils.errors import UserError

SMALL = Config(
    rollout=RolloutConfig(prompts=4, samples=4),
    reinforce=ReinforceConfig(kl_coef=0.1),
    train=TrainConfig(steps=5, lr=0.05, micro_batch=2, remat=False),
    seed=3,
)


def _is_time(name):
    return name == "tokens_per_second" or name.endswith("_seconds")


ONE_STEP = dataclasses.replace(SMALL.train, steps=1)


@pytest.fixture(scope="module")
def spectra(toy):
    return decompose(toy, "mlp", progress=False)


def _nothing(_):
    """Of no step."""


def _fit(toy, spectra, run_dir, task=None, on_step=_nothing, **changes):
    run_dir.mkdir(exist_ok=True)
    config = dataclasses.replace(SMALL, **changes)
    return fit(toy, spectra, task or NameAColour(), run_dir, config, on_step=on_step)


def _rollout(toy, spectra, z, batch, key, cfg, loss):
    drawn = sample(toy, spectra, z, batch, key, cfg)
    return with_rewards(toy, drawn, grade(batch.task, batch.examples, drawn.texts), cfg, loss)


def _rows(run_dir):
    return [{k: v for k, v in row.items() if not _is_time(k)} for row in read(run_dir / "metrics.jsonl")]


def _assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.fixture(scope="module")
def whole(toy, spectra, tmp_path_factory):
    """(state, rows) of a run that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("whole")
    return _fit(toy, spectra, run_dir), _rows(run_dir)


@pytest.fixture(scope="module")
def batch(toy, spectra):
    """One step's rollout of 4 prompts with 3 samples each."""
    cfg = RolloutConfig(prompts=4, samples=3)
    task = NameAColour()
    source = task.source("train")
    ones = {name: jnp.ones(len(x.s)) for name, x in spectra.items()}
    shape = prompt_shape(toy, task, source)
    examples = [source[i] for i in range(4)]
    asked = TaskBatch(task, examples, shape)
    return _rollout(toy, spectra, ones, asked, jax.random.key(0), cfg, ReinforceConfig(baseline="none"))


def _step(toy, spectra, batch, state=None, **changes):
    cfg = TrainConfig(**(dict(micro_batch=4, remat=False, clip_norm=1e9) | changes))
    state = state or init_state(spectra, LINEAR, update_config(cfg))
    settings = dict(model=toy.model, family=LINEAR, loss=ReinforceConfig(kl_coef=0.1), cfg=update_config(cfg))
    return train_step(state, toy.model.nest(spectra), toy.params, batch, **settings)


def test_a_rollouts_batch_says_what_was_sampled_and_what_it_earned(toy, batch):
    data = batch.batch
    assert data.prompt_ids.shape == (4, 32)
    assert data.completion_ids.shape == (12, 8)
    ends = np.asarray(data.completion_ids) == 1
    lengths = np.asarray(data.completion_mask).sum(axis=1)
    assert batch.tokens == lengths.sum()  # the end token is scored
    for row, length in enumerate(lengths):
        assert length == 4 or ends[row, length - 1]
    right = [NameAColour().grade(text, {}).correct for text in batch.texts]
    np.testing.assert_array_equal(batch.rewards.ravel(), np.where(right, 1, -1))
    np.testing.assert_array_equal(data.advantages, batch.rewards.ravel())
    assert set(batch.rewards.ravel()) == {1, -1}


def test_without_score_eos_the_end_token_is_left_out_and_nothing_else(toy, spectra):
    task = NameAColour(max_new_tokens=24)
    source = task.source("train")
    ones = {name: jnp.ones(len(x.s)) for name, x in spectra.items()}
    shape = prompt_shape(toy, task, source)
    masks = []
    for score_eos in (True, False):
        cfg = RolloutConfig(prompts=4, samples=3, score_eos=score_eos)
        examples = [source[i] for i in range(4)]
        data = _rollout(
            toy, spectra, ones, TaskBatch(task, examples, shape), jax.random.key(0), cfg, SMALL.reinforce
        ).batch
        masks.append(np.asarray(data.completion_mask))
    left_out = masks[0] - masks[1]
    np.testing.assert_array_equal(left_out, masks[0] * (np.asarray(data.completion_ids) == 1))
    assert left_out.any()


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_completions_are_those_of_one_batch_however_many_rows_are_at_work(toy, spectra, form):
    rng, source, task = np.random.default_rng(0), NameAColour().source("train"), NameAColour(max_new_tokens=24)
    z = {name: jnp.asarray(rng.uniform(0.7, 1.3, len(x.s)), jnp.float32) for name, x in spectra.items()}
    asked = TaskBatch(task, [source[i] for i in range(5)], prompt_shape(toy, task, source))
    assert asked.shape.shared == 0 < asked.shape.longest
    key, whole = jax.random.key(7), {}
    for rows in (4, 15):
        cfg = RolloutConfig(prompts=5, samples=3, temperature=0.8, rows=rows, form=form)
        whole[rows] = sample(toy, spectra, z, asked, key, cfg)
    ids, mask = (np.repeat(x, 3, axis=0) for x in prompts(toy, asked))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(15))
    merged = merge(toy, spectra, z)
    batch = merged.generate(ids, mask, 24, chat.end_tokens(toy), OnPolicy(0.8), keys)
    for found in whole.values():
        np.testing.assert_array_equal(found.lengths, batch.lengths)
        np.testing.assert_array_equal(found.tokens, batch.tokens)
        np.testing.assert_allclose(found.logprobs, batch.logprobs, atol=1e-4)
        assert found.texts == chat.decode(toy, batch.tokens, batch.lengths)
        assert found.overlong == sum(1 not in row for row in batch.tokens) > 0
    assert len(set(batch.lengths)) > 3


def test_what_follows_a_stop_text_is_neither_graded_nor_trained(toy, spectra):
    source, ones = NameAColour().source("train"), {name: jnp.ones(len(x.s)) for name, x in spectra.items()}
    examples, cfg = [source[i] for i in range(4)], RolloutConfig(prompts=4, samples=3)
    found = []
    for stop in ((), ("green",)):
        task = NameAColour(max_new_tokens=24, stop=stop)
        shape = prompt_shape(toy, task, source)
        found.append(
            _rollout(toy, spectra, ones, TaskBatch(task, examples, shape), jax.random.key(0), cfg, SMALL.reinforce)
        )
    whole, cut = found
    where = [text.find("green") for text in whole.texts]
    assert cut.texts == [text if at < 0 else text[:at] for text, at in zip(whole.texts, where, strict=True)]
    lengths = [np.asarray(each.batch.completion_mask).sum(axis=1) for each in found]
    for row, at in enumerate(where):
        assert (lengths[1][row] < lengths[0][row]) == (0 <= at < len(whole.texts[row]) - len("green"))
        assert lengths[1][row] == lengths[0][row] or toy.tokenizer.decode(
            whole.batch.completion_ids[row, : lengths[1][row]]
        ).endswith("green")
    assert cut.overlong < whole.overlong
    assert cut.tokens == lengths[1].sum() < whole.tokens


def test_a_stop_that_is_a_special_token_ends_a_rollouts_rows_by_its_id(toy, spectra, compilations):
    source, ones = NameAColour().source("train"), {name: jnp.ones(len(x.s)) for name, x in spectra.items()}
    examples, cfg = [source[i] for i in range(4)], RolloutConfig(prompts=4, samples=3)
    mark = toy.tokenizer.convert_tokens_to_ids("<user>")
    found = []
    for stop in ((), ("<user>",)):
        task = NameAColour(max_new_tokens=24, stop=stop)
        shape = prompt_shape(toy, task, source)
        found.append(
            _rollout(toy, spectra, ones, TaskBatch(task, examples, shape), jax.random.key(0), cfg, SMALL.reinforce)
        )
        new = list(compilations)
        compilations.clear()
    assert "advance" not in "".join(new)  # end tokens are an argument
    whole, ended = found
    ids = [np.asarray(each.batch.completion_ids) for each in found]
    lengths = [np.asarray(each.batch.completion_mask).sum(axis=1) for each in found]
    for row in range(12):
        drawn = ids[0][row, : lengths[0][row]]
        assert lengths[1][row] == (np.append(drawn == mark, True).argmax() + 1 if mark in drawn else lengths[0][row])
        own = ids[1][row, : lengths[1][row]]
        np.testing.assert_array_equal(own, drawn[: lengths[1][row]])
        assert ended.texts[row] == toy.tokenizer.decode(own, skip_special_tokens=True)
    assert any(lengths[1] < lengths[0])
    assert ended.overlong < whole.overlong
    refused = NameAColour(stop=("<user> x",))
    with pytest.raises(UserError, match="the stop string '<user> x' holds the special token '<user>' and more"):
        _rollout(toy, spectra, ones, TaskBatch(refused, examples, shape), jax.random.key(0), cfg, SMALL.reinforce)


def test_a_rollouts_prompt_is_the_tasks_whole_chat(toy):
    class Solved(NameAColour):
        def answer(self, example):
            return "red"

    task = Solved(shots=2)
    ids, mask = prompts(toy, TaskBatch(task, task.source("test")[:1], PromptShape(128, 128, 0)))
    text = chat.render_turns(toy, task.turns(task.source("test")[0]))
    assert ids[0][mask[0] == 1].tolist() == chat.tokenize(toy, [text])[0]
    assert len(task.turns(task.source("test")[0])) == 5


def test_the_sampler_and_the_trainer_agree_on_log_probs(toy, spectra, batch):
    _, metrics = _step(toy, spectra, batch.batch)
    assert float(metrics["logprob_gap"]) < 1e-4
    off = dataclasses.replace(batch.batch, sampled=batch.batch.sampled + 0.5)
    _, metrics = _step(toy, spectra, off)
    assert float(metrics["logprob_gap"]) == pytest.approx(0.5, abs=1e-3)
    assert float(metrics["logprob_gap_mean"]) == pytest.approx(0.5, abs=1e-3)


def test_micro_batches_and_rematerialisation_give_the_same_update(toy, spectra, batch):
    one, metrics = _step(toy, spectra, batch.batch)
    for changes in (dict(micro_batch=2), dict(micro_batch=1, remat=True)):
        other, others = _step(toy, spectra, batch.batch, **changes)
        for name in metrics:
            assert float(others[name]) == pytest.approx(float(metrics[name]), rel=1e-4, abs=1e-6)
        # Adam's first moment is a tenth of the gradient; the update itself is close to its sign.
        for name, moment in one.opt_state[1][0].mu.items():
            assert np.linalg.norm(moment - other.opt_state[1][0].mu[name]) < 1e-4 * np.linalg.norm(moment)


def test_scanned_layers_give_the_same_update(toy, spectra, batch):
    one, metrics = _step(toy, spectra, batch.batch)
    other, others = _step(toy_lm(scan_layers=True), spectra, batch.batch, remat=True)
    assert float(others["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-4)
    for name, moment in one.opt_state[1][0].mu.items():
        assert np.linalg.norm(moment - other.opt_state[1][0].mu[name]) < 1e-4 * np.linalg.norm(moment)


def test_the_gradient_is_clipped_jointly(toy, spectra, batch):
    state, metrics = _step(toy, spectra, batch.batch, clip_norm=1e-3)
    moments = np.concatenate([np.asarray(x) for x in state.opt_state[1][0].mu.values()])
    assert np.linalg.norm(moments) == pytest.approx(1e-4, rel=1e-3)  # a tenth of it
    assert float(metrics["grad_norm"]) > 0.1  # as it was before
    assert int(state.step) == 1


def test_another_batch_a_later_state_and_other_settings_of_the_loop_compile_nothing(toy, spectra, batch, compilations):
    state, _ = _step(toy, spectra, batch.batch)
    changed = dataclasses.replace(batch.batch, completion_ids=(batch.batch.completion_ids + 1) % 32)
    compilations.clear()
    state, metrics = _step(toy, spectra, changed, state, lr=0.5, steps=7, examples=3, method="next_token")
    assert compilations == []
    assert int(state.step) == 2


def test_training_raises_the_reward(toy, spectra, tmp_path):
    rows = []
    cfg = TrainConfig(steps=20, lr=0.05, micro_batch=8, remat=False)
    _fit(toy, spectra, tmp_path, rollout=RolloutConfig(), reinforce=ReinforceConfig(), train=cfg, on_step=rows.append)
    rewards = [row["reward"] for row in rows]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:3]) + 0.4
    assert rows[-1]["z_spread"] > 0.01
    assert all(row["accuracy"] == pytest.approx((row["reward"] + 1) / 2) for row in rows)


def test_a_run_interrupted_after_any_step_ends_bit_for_bit_as_if_it_had_not_been(toy, spectra, tmp_path, whole):
    done = []

    def interrupt(row):
        done.append(row["step"])
        if row["step"] in (1, 2):
            raise RuntimeError("stop")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="stop"):
            _fit(toy, spectra, tmp_path, on_step=interrupt)
    state = _fit(toy, spectra, tmp_path, on_step=interrupt)
    assert done == [0, 1, 2, 3, 4]  # nothing is done twice
    _assert_same(state, whole[0])
    assert _rows(tmp_path) == whole[1]


def test_rows_of_a_step_that_was_not_saved_are_written_anew(toy, spectra, tmp_path, whole, monkeypatch):
    save = Checkpoints.save

    def dies(self, step, state):
        if step == 3:
            raise RuntimeError("stop")
        save(self, step, state)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", dies)
        with pytest.raises(RuntimeError, match="stop"):
            _fit(toy, spectra, tmp_path)
    assert [row["step"] for row in _rows(tmp_path)] == [0, 1, 2]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "los')  # the last write was cut off
    _assert_same(_fit(toy, spectra, tmp_path), whole[0])
    assert _rows(tmp_path) == whole[1]


def test_a_finished_run_is_left_as_it_is(toy, spectra, tmp_path, whole):
    _fit(toy, spectra, tmp_path)
    _assert_same(_fit(toy, spectra, tmp_path, on_step=lambda _: pytest.fail("trained on")), whole[0])
    assert _rows(tmp_path) == whole[1]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(toy, spectra, tmp_path):
    def poison(row):
        if row["step"] == 1:
            toy_params["norm"] = {"weight": jnp.full(32, jnp.nan)}

    toy_params = dict(toy.params)
    broken = dataclasses.replace(toy, params=toy_params)
    with pytest.raises(FloatingPointError, match="step 2: loss nan, grad_norm nan, reward .*; the batch is kept in"):
        _fit(broken, spectra, tmp_path, on_step=poison)
    checkpoints = Checkpoints(tmp_path / "state")
    step, state = checkpoints.restore(init_state(spectra, SIGMOID_NUCLEAR, update_config(SMALL.train)))
    checkpoints.close()
    assert step == 2
    assert all(np.isfinite(x).all() for x in state.raw.values())
    # What was kept is enough to do the step again.
    kept = load_batch(tmp_path / "failed" / "step-000002.safetensors")
    note = json.loads((tmp_path / "failed" / "step-000002.json").read_text())
    assert len(note["examples"]) == len(kept.prompt_ids) == 4
    assert len(note["texts"]) == len(kept.completion_ids) == 16
    settings = dict(model=toy.model, family=SIGMOID_NUCLEAR, loss=SMALL.reinforce, cfg=update_config(SMALL.train))
    _, metrics = train_step(state, toy.model.nest(spectra), toy_params, kept, **settings)
    assert np.isnan(metrics["loss"])
    _, metrics = train_step(state, toy.model.nest(spectra), toy.params, kept, **settings)
    assert np.isfinite(metrics["loss"])


def test_a_step_that_is_not_finite_is_left_out_where_that_is_asked_for(toy, spectra, tmp_path):
    def poison(row):
        toy_params["norm"] = {"weight": jnp.full(32, jnp.nan)} if row["step"] == 1 else toy.params["norm"]

    toy_params = dict(toy.params)
    broken, rows = dataclasses.replace(toy, params=toy_params), []
    both = lambda row: (rows.append(row), poison(row))  # noqa: E731
    state = _fit(broken, spectra, tmp_path, guards=GuardConfig(not_finite="skip"), on_step=both)
    assert [row["step"] for row in rows if "skipped" in row] == [2]
    assert int(state.step) == 4  # updates
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert (tmp_path / "failed" / "step-000002.safetensors").exists()


class Moody(NameAColour):
    """Raises from the given call on, until it is mended."""

    def grade(self, completion, example):
        calls.append(completion)
        if 0 <= limit[0] < len(calls):
            raise ZeroDivisionError("division by zero\nand more")
        return super().grade(completion, example)


calls, limit = [], [-1]


class Watched(NameAColour):
    """Notes what it was asked to grade."""

    def grade(self, completion, example):
        seen.append((example["thing"], example["of"]))
        return super().grade(completion, example)


seen = []


def test_few_training_prompts_are_a_choice_of_the_seed(toy, spectra, tmp_path):
    chosen = []
    for seed in (3, 4):
        seen.clear()
        cfg = dataclasses.replace(SMALL.train, steps=2, examples=5)
        run_dir = tmp_path / str(seed)
        run_dir.mkdir()
        _fit(toy, spectra, run_dir, Watched(), train=cfg, seed=seed)
        chosen.append(set(seen))
    assert [len(rows) for rows in chosen] == [5, 5]
    assert chosen[0] != chosen[1]
    too_many = dataclasses.replace(SMALL.train, examples=10**6)
    with pytest.raises(UserError, match="train.examples=1000000, but the task's training split has"):
        _fit(toy, spectra, tmp_path / "none", train=too_many)


def test_a_reward_function_that_raises_is_one_line_and_the_batch_is_kept(toy, spectra, tmp_path, whole):
    calls.clear()
    limit[0] = 20  # in the second step, of 16 completions each
    with pytest.raises(
        UserError, match=r"step 1: the reward of task .* raised ZeroDivisionError \(division by zero\)"
    ) as e:
        _fit(toy, spectra, tmp_path, Moody())
    assert "\n" not in str(e.value)
    note = json.loads((tmp_path / "failed" / "step-000001.json").read_text())
    assert note["texts"][:5] == calls[16:21]
    assert len(note["texts"]) == 16
    limit[0] = -1
    _assert_same(_fit(toy, spectra, tmp_path, Moody()), whole[0])


def test_a_step_done_again_gets_the_verdicts_that_it_got(toy, spectra, tmp_path, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _fit(toy, spectra, tmp_path)
    calls.clear()
    limit[0] = 0  # a grader that would raise is not asked for the first step again, but for the second
    with pytest.raises(UserError, match="step 1: the reward"):
        _fit(toy, spectra, tmp_path, Moody())
    assert len(calls) == 1
    limit[0] = -1
    _assert_same(_fit(toy, spectra, tmp_path, Moody()), whole[0])


def test_all_steps_since_the_last_saved_state_get_the_verdicts_that_they_got(toy, spectra, tmp_path, monkeypatch):
    settings = {"checkpoint": CheckpointConfig(every=4), "train": dataclasses.replace(SMALL.train, steps=3)}
    with monkeypatch.context() as patch:  # as where it is killed: not even the end of the run saves a state
        patch.setattr(Checkpoints, "save", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _fit(toy, spectra, tmp_path, **settings)
    calls.clear()
    limit[0] = 0  # a grader that would raise is not asked
    _fit(toy, spectra, tmp_path, Moody(), **settings)
    limit[0] = -1
    assert calls == []


def test_alarms_are_told_in_the_row_and_stop_the_run_where_asked(toy, spectra, tmp_path):
    rows = []
    watch = GuardConfig(min_reward=2.0, max_length=1000)
    _fit(toy, spectra, tmp_path / "tell", guards=watch, on_step=rows.append, train=ONE_STEP)
    assert rows[0]["alarms"] == [f"reward {rows[0]['reward']:.4g} is below guards.min_reward=2.0"]
    assert read(tmp_path / "tell" / "metrics.jsonl")[0]["alarms"] == rows[0]["alarms"]
    with pytest.raises(FloatingPointError, match=r"step 0: reward .* is below guards\.min_reward=2\.0; the batch"):
        _fit(toy, spectra, tmp_path / "stop", guards=dataclasses.replace(watch, on_alarm="stop"), train=ONE_STEP)


def test_a_row_tells_what_a_steps_time_was_spent_on_and_counts_odd_completions(toy, spectra, tmp_path):
    rows = []
    _fit(toy, spectra, tmp_path, on_step=rows.append, train=ONE_STEP)
    parts = [rows[0][f"{name}_seconds"] for name in ("rollout", "grading", "update", "rest")]
    assert all(part > 0 for part in parts)
    assert rows[0]["step_seconds"] == pytest.approx(sum(parts))
    assert rows[0]["overlong"] > 0  # of 4 tokens, most do not end
    assert rows[0]["logprob_gap"] < 1e-4


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_sampler_and_trainer_agree_at_a_temperature_too(toy, spectra, tmp_path, form):
    rows = []
    rollouts = RolloutConfig(prompts=4, samples=4, temperature=0.7, form=form)
    loss = ReinforceConfig(algorithm="grpo", kl_coef=0.1)
    cfg = dataclasses.replace(SMALL.train, steps=2)
    _fit(toy, spectra, tmp_path, rollout=rollouts, reinforce=loss, train=cfg, on_step=rows.append)
    assert all(row["logprob_gap"] < 1e-4 and row["clipped"] == 0 for row in rows)
    assert abs(rows[0]["kl"]) < 1e-4  # the first policy is the base, at 0.7 as well
    assert rows[1]["kl"] > 1e-4


def test_a_batch_says_at_what_temperature_it_was_drawn(toy, spectra):
    task = NameAColour()
    source = task.source("train")
    ones = {name: jnp.ones(len(x.s)) for name, x in spectra.items()}

    def drawn(**changes):
        cfg = RolloutConfig(prompts=2, **changes)
        examples = [source[i] for i in range(2)]
        loss = ReinforceConfig(baseline="none")
        return _rollout(
            toy, spectra, ones, TaskBatch(task, examples, PromptShape(32, 32, 0)), jax.random.key(5), cfg, loss
        ).batch

    np.testing.assert_array_equal(drawn(samples=2, temperature=0.7).temperature, np.full(4, 0.7, np.float32))
    assert drawn(samples=2, temperature=1.0).temperature is None
    assert drawn(samples=1, temperature=0).temperature is None  # greedy answers are scored at 1


def test_greedy_rollouts_are_one_a_prompt(toy, spectra, tmp_path):
    rows = []
    greedy = RolloutConfig(prompts=4, samples=1, temperature=0)
    _fit(toy, spectra, tmp_path, rollout=greedy, reinforce=ReinforceConfig(baseline="none"), on_step=rows.append)
    assert rows[0]["reward"] in (-1, -0.5, 0, 0.5, 1)
    with pytest.raises(UserError, match="greedy completions of one prompt are all the same"):
        RolloutConfig(samples=2, temperature=0)


def test_several_epochs_go_on_from_one_another_and_clip(toy, spectra, tmp_path):
    rows = []
    loss = ReinforceConfig(algorithm="grpo", epochs=3, clip_low=1e-3, clip_high=1e-3)
    state = _fit(toy, spectra, tmp_path, reinforce=loss, on_step=rows.append, train=ONE_STEP)
    assert int(state.step) == 3
    assert rows[0]["clipped"] > 0.1  # in the last epoch most ratios have left 0.999..1.001
    assert rows[0]["logprob_gap"] < 1e-4  # the first one's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Red(NameAColour):
    """With an answer to learn."""

    def _rows(self, split):
        return [{**row, "answer": "red boat"} for row in super()._rows(split)]


def test_next_token_prediction_learns_the_given_answers(toy, spectra, tmp_path):
    rows = []
    cfg = TrainConfig(method="next_token", steps=12, lr=0.05, micro_batch=2, remat=False)
    _fit(toy, spectra, tmp_path, Red(), train=cfg, reinforce=ReinforceConfig(), on_step=rows.append)
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert "reward" not in rows[0]
    with pytest.raises(UserError, match="no answer in answer, label, answerKey that its own grader calls right"):
        _fit(toy, spectra, tmp_path / "none", train=cfg)


def test_the_next_token_loss_is_the_mean_over_all_answer_tokens(toy, spectra):
    task, cfg = Red(), TrainConfig(micro_batch=1, remat=False)
    examples = [{"thing": "apple", "of": "boat", "answer": "red"}, {"thing": "door", "of": "kite", "answer": "red red"}]
    asked = prompts(toy, TaskBatch(task, examples, PromptShape(32, 32, 0)))
    short = dataclasses.replace(toy.model.cfg, max_position_embeddings=int(asked[1].sum(axis=1).max()) + 2)
    with pytest.raises(UserError, match=r"3 new ones are asked for, but the model's context is"):
        solved(dataclasses.replace(toy, model=toy.model.clone(cfg=short)), task, examples, asked, 8)
    data = solved(toy, task, examples, asked, 8)
    np.testing.assert_array_equal(data.completion_mask.sum(axis=1), [2, 3])  # the end token is learnt
    np.testing.assert_array_equal(np.asarray(data.completion_ids)[:, :3], [[5, 1, 0], [5, 5, 1]])
    ids, mask = np.concatenate([asked[0], data.completion_ids], 1), np.concatenate([asked[1], data.completion_mask], 1)
    logps = jax.nn.log_softmax(toy.logits(ids, mask)[:, 31:-1], axis=-1)
    each = np.take_along_axis(np.asarray(logps), np.asarray(data.completion_ids)[:, :, None], axis=2)[..., 0]
    settings = dict(model=toy.model, family=LINEAR, loss=ReinforceConfig(baseline="none"), cfg=update_config(cfg))
    state = init_state(spectra, LINEAR, update_config(cfg))
    _, metrics = train_step(state, toy.model.nest(spectra), toy.params, data, **settings)
    assert float(metrics["loss"]) == pytest.approx(-(each * np.asarray(data.completion_mask)).sum() / 5, rel=1e-4)


@pytest.mark.parametrize("strategy", ["es", "cem"])
def test_evolution_raises_the_reward_and_resumes_bit_for_bit(strategy, toy, spectra, tmp_path):
    rows = []
    search = EvolutionConfig(strategy=strategy, population=16, sigma=0.3)
    cfg = TrainConfig(method="evolution", steps=8, lr=0.1)
    settings = dict(train=cfg, reinforce=ReinforceConfig(), evolution=search, rollout=RolloutConfig(prompts=4))
    whole = _fit(toy, spectra, tmp_path / "a", **settings, on_step=rows.append)
    assert np.mean([row["reward"] for row in rows[-2:]]) > np.mean([row["reward"] for row in rows[:2]])
    assert rows[-1]["best_reward"] >= rows[-1]["reward"]

    def stop(row):
        if row["step"] == 3:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        _fit(toy, spectra, tmp_path / "b", **settings, on_step=stop)
    _assert_same(_fit(toy, spectra, tmp_path / "b", **settings), whole)


def test_evolution_of_what_is_no_z_is_refused(toy, spectra, tmp_path):
    cfg = TrainConfig(method="evolution")
    with pytest.raises(UserError, match="core:r=3 is no z; use linear"):
        _fit(toy, spectra, tmp_path, parametrisation="core:r=3", train=cfg)
    with pytest.raises(UserError, match=r"bfloat16 is for gradients"):
        _fit(toy, spectra, tmp_path, train=dataclasses.replace(cfg, param_dtype="bfloat16"))
    with pytest.raises(UserError, match=r"train\.bound=0\.5 is for gradients and for"):
        _fit(toy, spectra, tmp_path, train=dataclasses.replace(cfg, bound=0.5))


def test_an_alarm_for_a_kl_that_nobody_computes_is_refused(toy, spectra, tmp_path):
    with pytest.raises(UserError, match=r"guards\.max_kl=3 needs a KL"):
        _fit(toy, spectra, tmp_path, reinforce=ReinforceConfig(), guards=GuardConfig(max_kl=3))
    for method, bound, metric in (
        ("evolution", "max_kl", "kl"),
        ("evolution", "min_entropy", "entropy"),
        ("next_token", "min_reward", "reward"),
    ):
        told = rf"guards\.{bound}=3: train\.method={method} measures no {metric}; leave it out"
        with pytest.raises(UserError, match=told):
            _fit(
                *(toy, spectra, tmp_path),
                reinforce=ReinforceConfig(),
                train=TrainConfig(method=method),
                guards=GuardConfig(**{bound: 3}),
            )


def test_a_kl_that_evolution_would_not_weigh_and_a_rounded_dora_are_refused(toy, spectra, tmp_path):
    with pytest.raises(UserError, match=r"reinforce\.kl_coef and .* for gradients"):
        _fit(toy, spectra, tmp_path, train=TrainConfig(method="evolution"))
    rounded = dataclasses.replace(SMALL.train, param_dtype="bfloat16")
    with pytest.raises(UserError, match=r"train\.param_dtype=bfloat16 would round the lengths that dora:r=2"):
        _fit(toy, spectra, tmp_path, parametrisation="dora:r=2,alpha=2", train=rounded)


def test_evolution_draws_independently_however_many_prompts_there_are(toy, spectra, tmp_path):
    cfg = TrainConfig(method="evolution", draws="independent", steps=1, micro_batch=2)
    few = dataclasses.replace(SMALL.rollout, prompts=5)
    _fit(toy, spectra, tmp_path, reinforce=ReinforceConfig(), train=cfg, rollout=few)
    assert len(_rows(tmp_path)) == 1


def test_validation_keeps_the_best_state_and_stops_when_nothing_is_better(toy, spectra, tmp_path, monkeypatch):
    found = iter([0.25, 0.5, 0.75, 0.75, 0.5, pytest.fail])
    monkeypatch.setattr("sva.training.loop._accuracy", lambda *_: next(found))
    states = []
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, state: (states.append(state), save(self, step, state)))
    cfg = dataclasses.replace(SMALL.train, steps=20)
    settings = dict(train=cfg, validation=ValidationConfig(every=2, patience=2))
    state = _fit(toy, spectra, tmp_path, **settings)
    assert [row.get("validation_accuracy") for row in _rows(tmp_path)] == [None, 0.5, None, 0.75] + [
        None,
        0.75,
        None,
        0.5,
    ]
    assert int(state.best.step) == 4
    _assert_same(state.chosen, states[3].raw)
    assert (jax.tree.leaves(state.raw)[0] != jax.tree.leaves(state.chosen)[0]).any()
    _assert_same(_fit(toy, spectra, tmp_path, **settings), state)  # stopped is stopped


def test_no_run_is_over_before_its_first_validation():
    best, cfg = nothing_yet({}), ValidationConfig(every=5, first=40, patience=6)
    assert not any(is_over(best, step, cfg) for step in range(100))
    found = better(best, {}, 0.0, 40)
    assert [is_over(found, step, cfg) for step in (69, 70)] == [False, True]


def test_a_base_that_no_step_improves_on_is_what_is_kept(toy, spectra, tmp_path, monkeypatch):
    found = iter([0.5, 0.5, 0.25])
    monkeypatch.setattr("sva.training.loop._accuracy", lambda *_: next(found))
    cfg = dataclasses.replace(SMALL.train, steps=2)
    state = _fit(toy, spectra, tmp_path, train=cfg, validation=ValidationConfig(every=1))
    assert int(state.best.step) == 0
    _assert_same(state.chosen, init_state(spectra, SIGMOID_NUCLEAR, update_config(cfg)).raw)


def test_a_real_validation_is_of_the_adapted_model(toy, spectra, tmp_path):
    _fit(toy, spectra, tmp_path, validation=ValidationConfig(every=5, size=8))
    (accuracy,) = [row["validation_accuracy"] for row in _rows(tmp_path) if "validation_accuracy" in row]
    assert accuracy * 8 == round(accuracy * 8)


# Orbax closes its event loop at the first array that cannot be read; reads of others still report to it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_states_of_other_settings_and_damaged_ones_are_refused_in_one_line(toy, spectra, tmp_path, whole):
    run_dir = tmp_path / "run"
    _fit(toy, spectra, run_dir)
    with pytest.raises(UserError, match="holds states of other settings"):
        _fit(toy, spectra, run_dir, seed=4)
    state = run_dir / "state" / "5"
    for file in [path for path in state.rglob("*") if path.is_file() and "manifest" in path.name]:
        file.unlink()
    with pytest.raises(
        UserError, match=r"the state of step 5 cannot be read .*remove .* goes on from step 4"
    ) as caught:
        _fit(toy, spectra, run_dir)
    assert "\n" not in str(caught.value)
    shutil.rmtree(state)
    _assert_same(_fit(toy, spectra, run_dir), whole[0])
    assert _rows(run_dir) == whole[1]


def test_prompts_that_are_no_whole_micro_batches_are_refused(toy, spectra, tmp_path):
    with pytest.raises(UserError, match=r"rollout\.prompts=4 is no multiple of train\.micro_batch=3"):
        _fit(toy, spectra, tmp_path, train=TrainConfig(micro_batch=3))


@pytest.mark.parametrize("free", [100, 10**9])
def test_a_full_disk_ends_in_one_line_and_keeps_the_steps_before(free, toy, spectra, tmp_path, whole, monkeypatch):
    def fill(row):
        if row["step"] == 1:
            usage = collections.namedtuple("usage", "total used free")
            monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - free, free))
            monkeypatch.setattr("orbax.checkpoint.CheckpointManager.save", too_late)

    def too_late(*_, **__):  # as tensorstore says it
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']")

    with pytest.raises(UserError, match="the disk is full: .*state could not be written") as caught:
        _fit(toy, spectra, tmp_path, on_step=fill)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    _assert_same(_fit(toy, spectra, tmp_path), whole[0])
    assert _rows(tmp_path) == whole[1]


_CHILD = """
import sys
from pathlib import Path
import numpy as np
from test_train import SMALL, NameAColour, decompose, fit
from sva.generation.testing import toy_lm

run_dir = Path(sys.argv[1])
toy = toy_lm()
state = fit(toy, decompose(toy, "mlp", progress=False), NameAColour(), run_dir, SMALL)
np.savez(run_dir / "state.npz", **state.raw)
"""


def test_a_run_that_was_killed_goes_on_from_its_last_step(toy, spectra, tmp_path, whole):
    here = Path(__file__).parent
    env = os.environ | {
        "PYTHONPATH": f"{here}{os.pathsep}{here.parent}",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }
    command = [sys.executable, "-c", _CHILD, str(tmp_path)]
    child = subprocess.Popen(command, env=env)
    for _ in itertools.takewhile(lambda _: len(read(tmp_path / "metrics.jsonl")) < 2, itertools.count()):
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert len(read(tmp_path / "metrics.jsonl")) < SMALL.train.steps
    subprocess.run(command, env=env, check=True)
    with np.load(tmp_path / "state.npz") as final:
        _assert_same(dict(final), whole[0].raw)
    assert _rows(tmp_path) == whole[1]


def test_a_run_told_to_end_ends_at_once_and_goes_on_bit_for_bit(toy, spectra, tmp_path, whole):
    def tell(row):
        if row["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("it went on")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        _fit(toy, spectra, tmp_path, on_step=tell)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    _assert_same(_fit(toy, spectra, tmp_path), whole[0])


@pytest.mark.parametrize("end", [KeyboardInterrupt, ValueError])
def test_a_run_that_ends_before_its_time_saves_the_steps_that_were_not(toy, spectra, tmp_path, whole, end):
    def tell(row):
        if row["step"] == 2:
            raise end

    seldom, again = CheckpointConfig(every=4), []
    with pytest.raises(end):
        _fit(toy, spectra, tmp_path, on_step=tell, checkpoint=seldom)
    _assert_same(_fit(toy, spectra, tmp_path, on_step=again.append, checkpoint=seldom), whole[0])
    assert [row["step"] for row in again] == [3, 4]
    assert _rows(tmp_path) == whole[1]


def test_a_save_that_is_under_way_is_finished_first(toy, spectra, tmp_path, monkeypatch):
    save, finished = Checkpoints.save, []

    def slow(self, step, state):
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, step, state)
        finished.append(step)

    monkeypatch.setattr(Checkpoints, "save", slow)
    with pytest.raises(SystemExit):
        _fit(toy, spectra, tmp_path)
    assert finished == [1]


def test_the_public_codes_start_draws_and_selection(toy, spectra, tmp_path):
    """p around its start, batches drawn independently, the whole validation split after 1, 3, 5 updates."""
    rows = []
    cfg = TrainConfig(steps=4, lr=0.05, micro_batch=2, remat=False, draws="independent", init_noise=0.01)
    state = _fit(
        toy,
        spectra,
        tmp_path,
        train=cfg,
        validation=ValidationConfig(every=2, first=1, size=None, split="train"),
        on_step=rows.append,
    )
    assert ["validation_accuracy" in row for row in rows] == [True, False, True, True]
    assert int(state.best.step) in (1, 3, 4)
    none = _fit(toy, spectra, tmp_path / "0", train=dataclasses.replace(cfg, steps=0))
    start = np.concatenate([np.ravel(x) for x in jax.tree.leaves(none.raw)])
    centre = np.concatenate([np.ravel(x) for x in jax.tree.leaves(init_state(spectra, LINEAR, update_config(cfg)).raw)])
    assert 0.005 < np.std(start - centre) < 0.02
    draws = [drawn_indices(10, 4, step, 0) for step in range(50)]
    assert all(len(set(batch)) == 4 for batch in draws)
    assert len(set(draws[0]) & set(draws[1]) | set(draws[1]) & set(draws[2])) > 0
    assert sorted(drawn_indices(200, 256, 3, 0)) == list(range(200))
