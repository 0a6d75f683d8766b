"""The public code's arithmetic: bfloat16 parameters and Adam state, and the trust region that follows from it."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from sva.generation.decompose import decompose
from sva.generation.testing import NameAColour
from sva.spectral.expert import Expert
from sva.spectral.parametrisations import LINEAR, SIGMOID_NUCLEAR, family
from sva.training import config
from sva.training.config.reinforce import ReinforceConfig
from sva.training.config.rollout import RolloutConfig
from sva.training.config.train import TrainConfig
from sva.training.loop import fit
from sva.training.optimizers import Bfloat16AdamState, bfloat16_adam, optimizer, update_config
from sva.training.update import apply_gradient

# The other tests' flags leave products and sums unfused, which rounds once more than torch does.
AS_USERS = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


def _same_sign(member, cfg, steps, magnitudes):
    """(last raw values, those 500 steps before) of parameters that start at 0.1 and are pushed one way only."""
    raw = {"p": jnp.full(len(magnitudes), 0.1, cfg.param_dtype)}
    rng = np.random.default_rng(0)
    pushes = jnp.asarray(-magnitudes * rng.uniform(0.7, 1.3, (steps, len(magnitudes))), jnp.float32)

    def step(carry, push):
        raw, opt_state = apply_gradient(*carry, {"p": push}, family=member, cfg=update_config(cfg))
        return (raw, opt_state), raw["p"].astype(jnp.float32)

    _, path = jax.jit(lambda start: jax.lax.scan(step, start, pushes))((raw, optimizer(update_config(cfg)).init(raw)))
    return np.asarray(path[-1]), np.asarray(path[-501])


def test_bfloat16_stands_still_at_one_and_float32_goes_past_unless_it_is_bound():
    magnitudes = 10.0 ** np.linspace(-7, 0, 64)
    unclipped = dict(lr=2e-3, clip_norm=1e9)
    last, before = _same_sign(SIGMOID_NUCLEAR, TrainConfig(param_dtype="bfloat16", **unclipped), 3000, magnitudes)
    assert last.max() == 1.0
    assert last.min() >= 0.5
    np.testing.assert_array_equal(last, before)  # it has stopped for good
    last, _ = _same_sign(SIGMOID_NUCLEAR, TrainConfig(**unclipped), 3000, magnitudes)
    assert last.min() > 3.0
    last, before = _same_sign(SIGMOID_NUCLEAR, TrainConfig(bound=1.0, **unclipped), 3000, magnitudes)
    np.testing.assert_array_equal(last, 1.0)
    np.testing.assert_array_equal(before, 1.0)


@pytest.mark.parametrize(
    ("spelling", "centre"), [("linear", 1), ("top_k:k=3", 1), ("sigmoid_nuclear", 0), ("core:r=3", 0)]
)
def test_the_bound_is_measured_from_the_familys_centre(spelling, centre):
    cfg = TrainConfig(lr=0.5, clip_norm=1e9, bound=0.25)
    for sign in (1.0, -1.0):
        last, _ = _same_sign(family(spelling), cfg, 600, np.full(1, sign))
        np.testing.assert_array_equal(last, np.float32(centre + sign * 0.25))


def test_bfloat16_adam_walks_as_torchs_bit_for_bit():
    rng = np.random.default_rng(0)
    size, steps = 512, 600
    start = rng.normal(0.1, 0.01, size).astype(np.float32)
    scale = 10 ** rng.uniform(-6, -3, size)
    grads = (rng.normal(0.3, 1, (steps, size)) * scale).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start).bfloat16())
    torchs = torch.optim.Adam([theirs], lr=2e-3)
    ours, adam = jnp.asarray(start, jnp.bfloat16), bfloat16_adam(2e-3)
    state = adam.init(ours)

    @partial(jax.jit, compiler_options=AS_USERS)
    def step(ours, state, grad):
        updates, state = adam.update(grad, state)
        return optax.apply_updates(ours, updates), state

    for grad in grads:
        theirs.grad = torch.tensor(grad).bfloat16()
        torchs.step()
        ours, state = step(ours, state, grad)
        moments = torchs.state[theirs]
        pairs = [(ours, theirs.detach()), (state.mu, moments["exp_avg"]), (state.nu, moments["exp_avg_sq"])]
        for one, two in pairs:
            assert one.dtype == jnp.bfloat16
            np.testing.assert_array_equal(np.asarray(one, np.float32), two.float().numpy())


def test_a_bfloat16_run_resumes_bit_for_bit_and_its_expert_keeps_every_value(toy, tmp_path):
    spectra = decompose(toy, "mlp", progress=False)
    settings = config.Config(
        rollout=RolloutConfig(prompts=4, samples=2),
        reinforce=ReinforceConfig(baseline="none"),
        train=TrainConfig(steps=3, lr=2e-3, micro_batch=2, remat=False, param_dtype="bfloat16"),
        seed=3,
    )

    def stop(row):
        if row["step"] == 1:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(toy, spectra, NameAColour(), tmp_path / "a", settings, on_step=stop)
    resumed = fit(toy, spectra, NameAColour(), tmp_path / "a", settings)
    whole = fit(toy, spectra, NameAColour(), tmp_path / "b", settings)
    chex.assert_trees_all_equal(resumed, whole)
    adam = whole.opt_state[1]
    assert isinstance(adam, Bfloat16AdamState)
    assert int(adam.step) == 3
    assert {x.dtype for x in jax.tree.leaves((whole.raw, adam.mu, adam.nu))} == {jnp.dtype(jnp.bfloat16)}
    expert = Expert(whole.raw, "sigmoid_nuclear")
    expert.save(tmp_path / "e.safetensors")
    again = Expert.load(tmp_path / "e.safetensors")
    for name, raw in whole.raw.items():
        assert np.ptp(np.asarray(raw, np.float32)) > 0
        np.testing.assert_array_equal(again.raw[name], np.asarray(raw, np.float32))
    chex.assert_trees_all_equal(again.z(spectra), expert.z(spectra))


def test_at_the_public_codes_rate_bfloat16_cannot_raise_a_z_of_one():
    # Why the mode is for p and not for z: above 1 the spacing is 2^-7, and half of it is more than 2e-3.
    cfg = TrainConfig(lr=2e-3, clip_norm=1e9, param_dtype="bfloat16")
    raw = {"z": LINEAR.init(jnp.ones(4)).astype(jnp.bfloat16)}
    settings = dict(family=LINEAR, cfg=update_config(cfg))
    up, _ = apply_gradient(raw, optimizer(update_config(cfg)).init(raw), {"z": -jnp.ones(4)}, **settings)
    down, _ = apply_gradient(raw, optimizer(update_config(cfg)).init(raw), {"z": jnp.ones(4)}, **settings)
    np.testing.assert_array_equal(up["z"], raw["z"])
    assert (down["z"] < raw["z"]).all()


def test_the_fidelity_configuration_trains_as_the_public_code():
    settings = config.load("configs/smollm2-capitals-fidelity.yaml")
    assert (settings.train.param_dtype, settings.train.lr, settings.train.bound) == ("bfloat16", 2e-3, None)
    assert (settings.parametrisation, settings.reinforce.baseline) == ("sigmoid_nuclear", "none")
    assert (settings.rollout.samples, settings.rollout.score_eos) == (1, False)
