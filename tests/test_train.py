import collections
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sva.checkpoint import Checkpoints
from sva.errors import UserError
from sva.lm import decompose
from sva.metrics import read
from sva.reinforce import ReinforceConfig
from sva.rollout import RolloutConfig, prompt_width, rollout
from sva.spectral.family import LINEAR, SIGMOID_NUCLEAR
from sva.testing import NameAColour, toy_lm
from sva.train import TrainConfig, fit, init_state, train_step

SMALL = dict(
    rollouts=RolloutConfig(prompts=4, samples=4),
    loss=ReinforceConfig(kl_coef=0.1),
    cfg=TrainConfig(steps=5, lr=0.05, micro_batch=2, remat=False),
    seed=3,
)
TIMES = ("tokens_per_second", "rollout_seconds", "update_seconds")


@pytest.fixture(scope="module")
def spectra(toy):
    return decompose(toy, "mlp", progress=False)


def _fit(toy, spectra, run_dir, **changes):
    run_dir.mkdir(exist_ok=True)
    return fit(toy, spectra, SIGMOID_NUCLEAR, NameAColour(), run_dir, **(SMALL | changes))


def _rows(run_dir):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read(run_dir / "metrics.jsonl")]


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
    width = prompt_width(toy, task, source)
    examples = [source[i] for i in range(4)]
    settings = (cfg, ReinforceConfig(baseline="none"), width)
    return rollout(toy, spectra, ones, task, examples, jax.random.key(0), *settings)


def _step(toy, spectra, batch, state=None, **changes):
    cfg = TrainConfig(**(dict(micro_batch=4, remat=False, clip_norm=1e9) | changes))
    state = state or init_state(spectra, LINEAR, cfg)
    settings = dict(model=toy.model, family=LINEAR, loss=ReinforceConfig(kl_coef=0.1), cfg=cfg)
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
    width = prompt_width(toy, task, source)
    masks = []
    for score_eos in (True, False):
        cfg = RolloutConfig(prompts=4, samples=3, score_eos=score_eos)
        examples = [source[i] for i in range(4)]
        data = rollout(toy, spectra, ones, task, examples, jax.random.key(0), cfg, SMALL["loss"], width).batch
        masks.append(np.asarray(data.completion_mask))
    left_out = masks[0] - masks[1]
    np.testing.assert_array_equal(left_out, masks[0] * (np.asarray(data.completion_ids) == 1))
    assert left_out.any()


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


def test_another_batch_and_a_later_state_compile_nothing(toy, spectra, batch, compilations):
    state, _ = _step(toy, spectra, batch.batch)
    changed = dataclasses.replace(batch.batch, completion_ids=(batch.batch.completion_ids + 1) % 32)
    compilations.clear()
    state, metrics = _step(toy, spectra, changed, state)
    assert compilations == []
    assert int(state.step) == 2


def test_training_raises_the_reward(toy, spectra, tmp_path):
    rows = []
    cfg = TrainConfig(steps=20, lr=0.05, micro_batch=8, remat=False)
    _fit(toy, spectra, tmp_path, rollouts=RolloutConfig(), loss=ReinforceConfig(), cfg=cfg, on_step=rows.append)
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
    with pytest.raises(FloatingPointError, match="step 2: loss nan"):
        _fit(broken, spectra, tmp_path, on_step=poison)
    checkpoints = Checkpoints(tmp_path / "state")
    step, state = checkpoints.restore(init_state(spectra, SIGMOID_NUCLEAR, SMALL["cfg"]))
    checkpoints.close()
    assert step == 2
    assert all(np.isfinite(x).all() for x in state.raw.values())


def test_prompts_that_are_no_whole_micro_batches_are_refused(toy, spectra, tmp_path):
    with pytest.raises(UserError, match=r"rollout\.prompts=4 is no multiple of train\.micro_batch=3"):
        _fit(toy, spectra, tmp_path, cfg=TrainConfig(micro_batch=3))


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
from test_train import SMALL, SIGMOID_NUCLEAR, NameAColour, decompose, fit
from sva.testing import toy_lm

run_dir = Path(sys.argv[1])
toy = toy_lm()
state = fit(toy, decompose(toy, "mlp", progress=False), SIGMOID_NUCLEAR, NameAColour(), run_dir, **SMALL)
np.savez(run_dir / "state.npz", **state.raw)
"""


def test_a_run_that_was_killed_goes_on_from_its_last_step(toy, spectra, tmp_path, whole, request):
    here = Path(__file__).parent
    env = os.environ | {
        "PYTHONPATH": f"{here}{os.pathsep}{here.parent}",
        # Not the workers' directory: a killed writer, or one without their size limit, leaves an entry that they
        # cannot evict, and every later test of that run would meet it.
        "JAX_COMPILATION_CACHE_DIR": str(request.config.cache.mkdir("jax-killed")),
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }
    command = [sys.executable, "-c", _CHILD, str(tmp_path)]
    child = subprocess.Popen(command, env=env)
    for _ in itertools.takewhile(lambda _: len(read(tmp_path / "metrics.jsonl")) < 2, itertools.count()):
        assert child.poll() is None
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert len(read(tmp_path / "metrics.jsonl")) < SMALL["cfg"].steps
    subprocess.run(command, env=env, check=True)
    with np.load(tmp_path / "state.npz") as final:
        _assert_same(dict(final), whole[0].raw)
    assert _rows(tmp_path) == whole[1]
