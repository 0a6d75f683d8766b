"""Closed forms: a bandit whose arms are tokens, so that every gradient can be written down."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sva.generation.logprobs import Scores
from sva.training import losses
from sva.training.advantages import BASELINES
from sva.training.config.reinforce import ALGORITHMS, PENALTIES, ReinforceConfig, check_samples
from sva.training.reinforce import Batch, advantages, policy_loss
from sva.utils.errors import UserError

THETA = np.array([0.3, -0.5, 0.9, 0.1])
BASE = np.array([-0.2, 0.4, 0.1, 0.6])
REWARDS = np.array([1.0, -1.0, 0.5, 2.0])
ARMS = len(THETA)
PI = np.exp(THETA) / np.exp(THETA).sum()
REF = np.exp(BASE) / np.exp(BASE).sum()
EYE = np.eye(ARMS)
RISE = PI * (REWARDS - PI @ REWARDS)  # the gradient of the mean reward


def scores_of(theta, arms, base=BASE):
    """Scores of arms [B, N] drawn with logits theta, whatever came before."""
    logps, ref = jax.nn.log_softmax(theta), jax.nn.log_softmax(jnp.asarray(base, jnp.float32))
    kl_base = jnp.sum(jnp.exp(ref) * (ref - logps))
    kl_policy = jnp.sum(jnp.exp(logps) * (logps - ref))
    ones = jnp.ones(arms.shape)
    return Scores(logps[arms], -jnp.sum(jnp.exp(logps) * logps) * ones, kl_base * ones, kl_policy * ones, ref[arms])


@partial(jax.jit, static_argnames="cfg")
def _gradients(theta, arms, mask, worth, sampled, cfg):
    nothing = jnp.zeros((arms.shape[1], 1), jnp.int32)

    def one(arms, mask, worth, sampled):
        batch = Batch(nothing, nothing, arms, mask, worth, sampled)
        return jax.grad(lambda theta: policy_loss(scores_of(theta, arms), batch, cfg)[0])(theta)

    return jax.vmap(one)(arms, mask, worth, sampled)


def gradients(arms, worth, cfg, *, sampled=None, mask=None, theta=THETA):
    """d loss / d theta of each of K batches: arms [K, B, N] that are worth [K, B]."""
    arms = jnp.asarray(arms)
    mask = jnp.ones_like(arms) if mask is None else jnp.asarray(mask)
    sampled = jnp.log(PI)[arms] if sampled is None else sampled
    theta, worth, sampled = (jnp.asarray(x, jnp.float32) for x in (theta, worth, sampled))
    return np.asarray(_gradients(theta, arms, mask, worth, sampled, cfg))


def gradient(arms, worth, cfg, *, sampled=None, mask=None, theta=THETA):
    """The same of one batch."""
    sampled, mask = (None if x is None else np.asarray(x)[None] for x in (sampled, mask))
    return gradients(np.asarray(arms)[None], np.asarray(worth)[None], cfg, sampled=sampled, mask=mask, theta=theta)[0]


def mean_gradient(samples, cfg):
    """The loss' gradient over all groups of samples that the policy may draw, in the mean."""
    every = np.array(list(itertools.product(range(ARMS), repeat=samples)))
    worth = jax.vmap(lambda rewards: advantages(rewards[None], cfg)[0])(jnp.asarray(REWARDS[every], jnp.float32))
    return PI[every].prod(axis=1) @ gradients(every[:, :, None], worth, cfg)


@pytest.mark.parametrize(
    ("cfg", "samples", "share"),
    [
        (ReinforceConfig(baseline="none"), 1, 1),
        (ReinforceConfig(algorithm="rloo"), 2, 1),
        (ReinforceConfig(algorithm="rloo"), 3, 1),
        (ReinforceConfig(baseline="mean"), 3, 2 / 3),
        (ReinforceConfig(algorithm="dr_grpo"), 3, 2 / 3),
    ],
)
def test_in_the_mean_over_all_draws_the_gradient_is_that_of_the_expected_reward(cfg, samples, share):
    np.testing.assert_allclose(mean_gradient(samples, cfg), -share * RISE, atol=1e-6)


@pytest.mark.parametrize("cfg", [ReinforceConfig(), ReinforceConfig(algorithm="grpo")])
def test_standardised_groups_have_the_gradient_of_their_definition(cfg):
    expected = np.zeros(ARMS)
    for a, b in itertools.product(range(ARMS), repeat=2):  # of two samples the better is worth 1, the other -1
        expected -= PI[a] * PI[b] * np.sign(REWARDS[a] - REWARDS[b]) * (EYE[a] - EYE[b]) / 2
    np.testing.assert_allclose(mean_gradient(2, cfg), expected, atol=1e-6)


def test_a_policy_that_follows_the_gradient_finds_the_best_arm():
    theta = THETA.copy()
    for _ in range(200):
        pi = np.exp(theta) / np.exp(theta).sum()
        arms = np.arange(ARMS)[:, None]
        theta -= gradient(arms, REWARDS * pi * ARMS, ReinforceConfig(baseline="none"), theta=theta)
    assert np.argmax(theta) == np.argmax(REWARDS)
    assert np.exp(theta).max() / np.exp(theta).sum() > 0.95


def test_rloo_compares_with_the_others_alone():
    worth = advantages(jnp.asarray([[1.0, 2.0, 6.0]]), ReinforceConfig(algorithm="rloo"))
    np.testing.assert_allclose(worth, [[1 - 4, 2 - 3.5, 6 - 1.5]])


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo"])
def test_clipped_ratios_have_the_gradient_of_their_definition(algorithm):
    arms = np.array([[0, 1], [2, 3], [3, 1], [0, 2]])
    mask = np.array([[1, 1], [1, 1], [1, 0], [1, 1]])
    worth = np.array([1.5, -0.5, 2.0, -1.0])
    ratio = np.array([[1.1, 0.7], [1.4, 0.6], [1.3, 1.0], [0.9, 1.15]])
    cfg = ReinforceConfig(algorithm=algorithm, clip_low=0.2, clip_high=0.25)
    expected = np.zeros(ARMS)
    for b, t in itertools.product(range(4), range(2)):
        is_stopped = ratio[b, t] > 1.25 if worth[b] > 0 else ratio[b, t] < 0.8
        share = mask[b, t] / (mask[b].sum() if algorithm == "grpo" else 1)
        if not is_stopped:
            expected -= share * ratio[b, t] * worth[b] * (EYE[arms[b, t]] - PI) / 4
    sampled = jnp.asarray(np.log(PI)[arms] - np.log(ratio), jnp.float32)
    np.testing.assert_allclose(gradient(arms, worth, cfg, sampled=sampled, mask=mask), expected, atol=1e-6)


def test_what_the_clip_stopped_is_counted_and_masked_tokens_are_not():
    arms, mask = jnp.asarray([[0, 1], [2, 3]]), jnp.asarray([[1, 1], [1, 0]])
    nothing = jnp.zeros((2, 1), jnp.int32)
    sampled = jnp.log(PI)[arms] - jnp.log(jnp.asarray([[2.0, 0.5], [0.5, 0.5]]))
    batch = Batch(nothing, nothing, arms, mask, jnp.asarray([1.0, -1.0]), sampled.astype(jnp.float32))
    _, aux = policy_loss(scores_of(jnp.asarray(THETA, jnp.float32), arms), batch, ReinforceConfig(algorithm="grpo"))
    assert float(aux["clipped"]) == 1.0  # two of two rows


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_at_a_ratio_of_one_every_algorithm_follows_the_score_function(algorithm):
    arms, worth = np.array([[0], [1], [2], [3]]), np.array([1.0, -1.0, 0.5, 2.0])
    found = gradient(arms, worth, ReinforceConfig(algorithm=algorithm), sampled=np.log(PI)[arms])
    np.testing.assert_allclose(found, -(worth[:, None] * (EYE - PI)).mean(axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("base_adapted", PI - REF),
        ("adapted_base", PI * (np.log(PI / REF) - PI @ np.log(PI / REF))),
        ("k1", PI * (np.log(PI / REF) - PI @ np.log(PI / REF))),
        ("k2", PI * (np.log(PI / REF) - PI @ np.log(PI / REF))),
        ("k3", PI - REF),
    ],
)
def test_each_penalty_has_the_gradient_of_the_divergence_it_is_said_to_have(kind, expected):
    each = gradients(np.arange(ARMS)[:, None, None], np.zeros((ARMS, 1)), ReinforceConfig(kl_coef=2.0, kl=kind))
    np.testing.assert_allclose(PI @ each / 2, expected, atol=1e-6)


def test_k1_over_a_completion_has_the_gradient_of_the_completions_divergence():
    every = np.array(list(itertools.product(range(ARMS), repeat=2)))
    each = gradients(every[:, None, :], np.zeros((len(every), 1)), ReinforceConfig(kl_coef=1.0, kl="k1"))
    np.testing.assert_allclose(
        PI[every].prod(axis=1) @ each, 2 * PI * (np.log(PI / REF) - PI @ np.log(PI / REF)), atol=1e-6
    )


def test_the_estimates_are_of_the_divergence_to_the_base():
    logps, ref = jnp.log(PI), jnp.log(REF)
    exact = PI @ np.log(PI / REF)
    assert PI @ np.asarray(losses.k1(logps, ref)) == pytest.approx(exact, rel=1e-5)
    assert PI @ np.asarray(losses.k3(logps, ref)) == pytest.approx(exact, rel=1e-5)
    np.testing.assert_allclose(losses.k2(logps, ref), np.log(PI / REF) ** 2 / 2, rtol=1e-5)
    assert (np.asarray(losses.k3(logps, ref)) >= 0).all()


@pytest.mark.parametrize("kind", PENALTIES)
def test_masked_tokens_far_from_the_base_change_no_penalty(kind):
    arms, mask = jnp.asarray([[0, 1]]), jnp.asarray([[1, 0]])
    nothing = jnp.zeros((1, 1), jnp.int32)
    batch = Batch(nothing, nothing, arms, mask, jnp.zeros(1))
    scores = scores_of(jnp.asarray(THETA, jnp.float32), arms)
    far = scores._replace(ref_logprobs=scores.ref_logprobs.at[0, 1].set(1e4))
    cfg = ReinforceConfig(baseline="none", kl_coef=1.0, kl=kind)
    one, two = (jax.value_and_grad(lambda s: policy_loss(s, batch, cfg)[0])(s) for s in (scores, far))
    assert float(one[0]) == float(two[0])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(two))


def test_kl_is_measured_without_being_weighed():
    arms = jnp.asarray([[0], [1]])
    nothing = jnp.zeros((2, 1), jnp.int32)
    batch = Batch(nothing, nothing, arms, jnp.ones_like(arms), jnp.ones(2))
    scores = scores_of(jnp.asarray(THETA, jnp.float32), arms)
    loss, aux = policy_loss(scores, batch, ReinforceConfig(baseline="none", measure_kl=True))
    assert float(aux["kl"]) == pytest.approx(float(REF @ np.log(REF / PI)), rel=1e-5)
    assert float(loss) == float(aux["policy_loss"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(algorithm="ppo"), "'ppo' is not known; use reinforce, rloo, grpo, dr_grpo"),
        (dict(baseline="median"), "'median' is not known"),
        (dict(algorithm="grpo", baseline="none"), "whose baseline is group; leave it out"),
        (dict(kl="k4"), "use base_adapted, adapted_base, k1, k2, k3"),
        (dict(kl_coef=-0.1), r"reinforce\.kl_coef=-0\.1 must be at least 0"),
        (dict(epochs=2), "reinforce is for fresh completions only; use grpo or dr_grpo"),
        (dict(algorithm="grpo", clip_low=0), r"reinforce\.clip_low=0 must be above 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_in_one_line(settings, words):
    with pytest.raises(UserError, match=words) as caught:
        ReinforceConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BASELINES)
def test_a_single_sample_is_refused_where_samples_are_compared(name):
    if name in ("none", "batch"):
        check_samples(1, ReinforceConfig(baseline=name))
    else:
        with pytest.raises(UserError, match=f"baseline {name} .* needs at least 2"):
            check_samples(1, ReinforceConfig(baseline=name))


def test_a_clipped_ratio_needs_what_was_sampled():
    nothing = jnp.zeros((1, 1), jnp.int32)
    batch = Batch(nothing, nothing, nothing, nothing, jnp.ones(1))
    with pytest.raises(UserError, match=r"grpo needs batch\.sampled"):
        policy_loss(scores_of(jnp.asarray(THETA), nothing), batch, ReinforceConfig(algorithm="grpo"))
