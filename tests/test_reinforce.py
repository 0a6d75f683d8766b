import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from sva.generation.decompose import decompose
from sva.generation.load import load
from sva.generation.merge import factored
from sva.models.transformer import logits
from sva.spectral.parametrisations import SIGMOID_NUCLEAR, matrix_infos
from sva.training.advantages import BASELINES
from sva.training.config.reinforce import PENALTIES, ReinforceConfig
from sva.training.config.train import TrainConfig
from sva.training.loop import ExpertState, train_step
from sva.training.optimizers import optimizer
from sva.training.reinforce import Batch, advantages, reinforce_loss


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    torch_model = tiny.make("llama", directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVA_CACHE", str(tmp_path_factory.mktemp("cache")))
        lm = load(str(directory), progress=False)
        spectra = decompose(lm, "mlp", progress=False)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, lm.model.cfg.vocab_size, (2, 5)).astype(np.int32)
    mask = np.ones_like(prompts)
    mask[1, :2] = 0
    done = rng.integers(0, lm.model.cfg.vocab_size, (4, 3)).astype(np.int32)
    kept = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]], np.int32)
    batch = Batch(*map(jnp.asarray, (prompts, mask, done, kept, np.array([1.0, -1, 1, -1], np.float32))))
    raw = {name: jnp.asarray(rng.normal(0.1, 0.3, len(spectrum.s)), jnp.float32) for name, spectrum in spectra.items()}
    return torch_model, lm, spectra, batch, raw


def _gradient(lm, spectra, batch, raw, cfg):
    settings = dict(model=lm.model, family=SIGMOID_NUCLEAR, cfg=cfg)

    @jax.jit
    def step(raw, spectra, params, batch):
        return jax.value_and_grad(reinforce_loss, has_aux=True)(raw, spectra, params, batch, **settings)

    return step(raw, spectra, lm.params, batch)


def _public_loss(torch_model, spectra, batch, p, kl_coef):
    """FIELD.md 3.1 and 3.3: dense composition, one sequence at a time, sum over tokens, / batch."""
    total = torch.zeros(())
    for row in range(4):
        prompt = np.asarray(batch.prompt_ids[row // 2])[np.asarray(batch.prompt_mask[row // 2]) > 0]
        answer = np.asarray(batch.completion_ids[row])[np.asarray(batch.completion_mask[row]) > 0]
        ids = torch.tensor(np.concatenate([prompt, answer])[None], dtype=torch.long)
        weights = {}
        for name, x in p.items():
            u, s, vt = (torch.tensor(np.asarray(f)) for f in spectra[name])
            gate = torch.sigmoid(x)
            weights[name] = (u * (s * gate)) @ vt * (s.sum() / (s * gate).sum())
        logits = torch.func.functional_call(torch_model, weights, (ids,)).logits[0, len(prompt) - 1 : -1]
        logps = torch.log_softmax(logits, -1)
        chosen = logps.gather(1, ids[0, len(prompt) :, None]).sum()
        total = total - float(batch.advantages[row]) * chosen / 4
        if kl_coef:
            with torch.no_grad():
                ref = torch.log_softmax(torch_model(ids).logits[0, len(prompt) - 1 : -1], -1)
            kl = torch.nn.functional.kl_div(logps, ref, log_target=True, reduction="sum")
            total = total + kl_coef * kl / 4
    return total


def _parameters(raw):
    return {name: torch.nn.Parameter(torch.tensor(np.asarray(x))) for name, x in raw.items()}


def _public_code(torch_model, spectra, batch, raw, kl_coef):
    """(loss, gradient of p) of the public code's step, in float32."""
    p = _parameters(raw)
    total = _public_loss(torch_model, spectra, batch, p, kl_coef)
    total.backward()
    return float(total.detach()), {name: x.grad.numpy() for name, x in p.items()}


def _public_steps(torch_model, spectra, batch, raw, kl_coef, steps):
    """p after each step of the public code's loop, in float32: joint clip to 1e-3, Adam at lr 2e-3."""
    p = _parameters(raw)
    adam, path = torch.optim.Adam(p.values(), lr=2e-3), []
    for _ in range(steps):
        adam.zero_grad()
        _public_loss(torch_model, spectra, batch, p, kl_coef).backward()
        torch.nn.utils.clip_grad_norm_(p.values(), 1e-3)
        adam.step()
        path.append({name: x.detach().clone().numpy() for name, x in p.items()})
    return path


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_gradient_equals_the_public_codes(setting, kl_coef):
    torch_model, lm, spectra, batch, raw = setting
    (loss, _), grads = _gradient(lm, spectra, batch, raw, ReinforceConfig(kl_coef=kl_coef))
    expected_loss, expected = _public_code(torch_model, spectra, batch, raw, kl_coef)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-4)
    for name, gradient in grads.items():
        assert np.linalg.norm(gradient - expected[name]) < 1e-4 * np.linalg.norm(expected[name])
        np.testing.assert_allclose(gradient, expected[name], rtol=0, atol=5e-4)


@pytest.mark.parametrize("kl_coef", [0.0, 0.2])
def test_p_after_one_and_after_five_steps_is_the_public_codes(setting, kl_coef):
    torch_model, lm, spectra, batch, raw = setting
    cfg = TrainConfig(lr=2e-3, clip_norm=1e-3, micro_batch=1)
    state = ExpertState(raw, optimizer(cfg).init(raw), jnp.zeros((), jnp.int32))
    settings = dict(family=SIGMOID_NUCLEAR, loss=ReinforceConfig(baseline="none", kl_coef=kl_coef), cfg=cfg)
    for step, theirs in enumerate(_public_steps(torch_model, spectra, batch, raw, kl_coef, 5)):
        state, _ = train_step(state, lm.model.nest(spectra), lm.params, batch, model=lm.model, **settings)
        largest = max(np.abs(state.raw[name] - x).max() for name, x in theirs.items())
        if step in (0, 4):
            assert largest < {0: 3e-4, 4: 8e-4}[step]
    assert max(np.abs(state.raw[name] - x).max() for name, x in raw.items()) > 5e-3  # it has gone somewhere


def test_shared_prompts_equal_repeated_ones(setting):
    _, lm, spectra, batch, raw = setting
    repeated = dataclasses.replace(
        batch, prompt_ids=jnp.repeat(batch.prompt_ids, 2, axis=0), prompt_mask=jnp.repeat(batch.prompt_mask, 2, axis=0)
    )
    cfg = ReinforceConfig(kl_coef=0.1)
    (one, _), shared = _gradient(lm, spectra, batch, raw, cfg)
    (two, _), single = _gradient(lm, spectra, repeated, raw, cfg)
    assert float(one) == pytest.approx(float(two), rel=1e-5)
    for name in shared:
        assert np.linalg.norm(shared[name] - single[name]) < 1e-4 * np.linalg.norm(single[name])


def test_masked_tokens_change_nothing_and_kl_with_itself_is_zero(setting):
    _, lm, spectra, batch, raw = setting
    changed = dataclasses.replace(batch, completion_ids=jnp.where(batch.completion_mask > 0, batch.completion_ids, 7))
    cfg = ReinforceConfig(kl_coef=0.1)
    (one, _), _ = _gradient(lm, spectra, batch, raw, cfg)
    (two, _), _ = _gradient(lm, spectra, changed, raw, cfg)
    assert float(one) == pytest.approx(float(two), abs=1e-6)
    (_, aux), _ = _gradient(lm, spectra, batch, {name: jnp.full_like(x, 0.1) for name, x in raw.items()}, cfg)
    assert abs(float(aux["kl"])) < 1e-5


def test_group_advantages_by_hand():
    rewards = jnp.asarray([[1.0, -1, -1, 1], [1, 1, 1, 1]])
    np.testing.assert_allclose(advantages(rewards, ReinforceConfig()), [[1, -1, -1, 1], [0, 0, 0, 0]], atol=1e-6)
    np.testing.assert_array_equal(advantages(rewards, ReinforceConfig(baseline="none")), rewards)


def test_batch_advantages_teach_a_policy_that_always_answers_the_same():
    rewards = jnp.array([[1.0, 1, 1, 1], [-1, -1, -1, -1]])
    found = advantages(rewards, ReinforceConfig(baseline="batch"))
    np.testing.assert_allclose(found, rewards, atol=1e-6)
    assert not advantages(rewards, ReinforceConfig()).any()
    np.testing.assert_array_equal(advantages(jnp.ones((2, 4)), ReinforceConfig(baseline="batch")), np.zeros((2, 4)))


def test_loss_of_two_tokens_by_hand(toy):
    spectra = decompose(toy, "mlp", progress=False)
    raw = {name: jnp.linspace(-1, 1, len(x.s)) for name, x in spectra.items()}
    z = {name: SIGMOID_NUCLEAR.matrix_z(x, spectra[name].s) for name, x in raw.items()}
    prompt, answer = np.array([[3, 20, 4]]), np.array([[6, 1]])
    ids = np.concatenate([prompt, answer], axis=1)
    ones = np.ones_like(ids)
    policy, base = (jax.nn.log_softmax(toy.logits(ids, ones, x)[0, 2:4], axis=-1) for x in (z, None))
    policy, base = np.asarray(policy, np.float64), np.asarray(base, np.float64)
    logp = policy[0, 6] + policy[1, 1]
    kl = (np.exp(base) * (base - policy)).sum()
    entropy = -(np.exp(policy) * policy).sum()
    batch = Batch(*map(jnp.asarray, (prompt, np.ones_like(prompt), answer, np.ones_like(answer), np.array([-1.5]))))
    (loss, aux), _ = _gradient(toy, spectra, batch, raw, ReinforceConfig(kl_coef=0.2))
    assert float(loss) == pytest.approx(1.5 * logp + 0.2 * kl, rel=1e-4)
    assert float(aux["policy_loss"]) == pytest.approx(1.5 * logp, rel=1e-4)
    assert float(aux["kl"]) == pytest.approx(kl, rel=1e-3)
    assert float(aux["entropy"]) == pytest.approx(entropy, rel=1e-4)
    np.testing.assert_allclose(aux["logprobs"], [[policy[0, 6], policy[1, 1]]], atol=1e-4)


def test_a_reward_of_nothing_teaches_nothing(setting):
    _, lm, spectra, batch, raw = setting
    (_, _), grads = _gradient(lm, spectra, dataclasses.replace(batch, advantages=jnp.zeros(4)), raw, ReinforceConfig())
    assert not any(np.asarray(x).any() for x in grads.values())


TEMPERATURES = (0.3, 0.7, 1.0, 2.0)
END, SYMBOLS = 0, 5  # every completion is the end token alone, or another symbol and then any: few enough to list
EVERY = np.array([[END, END], *((a, b) for a in range(1, SYMBOLS) for b in range(SYMBOLS))])
KEPT = np.array([[1, int(a != END)] for a, _ in EVERY])
REWARDS = np.random.default_rng(3).normal(size=len(EVERY))


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    """A model of five symbols whose completions can all be listed, with what its policy gives each of them."""
    directory = tmp_path_factory.mktemp("five")
    sizes = dict(vocab_size=SYMBOLS, hidden_size=16, intermediate_size=24, num_hidden_layers=1, initializer_range=0.5)
    tiny.make("llama", directory, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVA_CACHE", str(tmp_path_factory.mktemp("cache")))
        lm = load(str(directory), progress=False)
        spectra = decompose(lm, "mlp", progress=False)
    rng = np.random.default_rng(1)
    raw = {name: jnp.asarray(rng.normal(0.1, 0.5, len(x.s)), jnp.float32) for name, x in spectra.items()}
    prompt = jnp.asarray([[1, 3, 2]], jnp.int32)
    ids = jnp.concatenate([jnp.repeat(prompt, len(EVERY), axis=0), jnp.asarray(EVERY, jnp.int32)], axis=1)

    @jax.jit
    def tokens(raw, temperature):
        """Log-probs [21, 2, V] of each next token, by the plain forward pass; of the base where raw is None."""
        z = None if raw is None else factored(spectra, SIGMOID_NUCLEAR.z(raw, matrix_infos(spectra)))
        out = logits(lm.model, lm.params, ids, jnp.ones_like(ids), z)[:, 2:4]
        return jax.nn.log_softmax(out / temperature, axis=-1)

    def singles(temperature, worth=0.0):
        """Batches of one completion each, stacked."""
        sampled = _chosen(tokens(raw, temperature))
        arrays = (jnp.asarray(EVERY, jnp.int32), jnp.asarray(KEPT, jnp.int32), jnp.broadcast_to(worth, 21), sampled)
        asked = jnp.broadcast_to(prompt, (21, 1, 3))
        heat = jnp.full((21, 1), temperature, jnp.float32)
        return Batch(asked, jnp.ones_like(asked), *(jnp.asarray(x)[:, None] for x in arrays), temperature=heat)

    @functools.cache
    def ours(cfg):
        """The gradient of the loss' mean over batches that come with these chances."""

        def mean(raw, batches, chances):
            settings = dict(model=lm.model, family=SIGMOID_NUCLEAR, cfg=cfg)
            each = jax.vmap(lambda batch: reinforce_loss(raw, spectra, lm.params, batch, **settings)[0])(batches)
            return each @ chances

        return jax.jit(jax.grad(mean))

    @jax.jit
    @jax.grad
    def score(raw, temperature, worth):
        return -jnp.sum(_chosen(tokens(raw, temperature)).sum(axis=1) * worth)

    @jax.jit
    @jax.grad
    def reward(raw, temperature):
        return -jnp.sum(jnp.exp(_chosen(tokens(raw, temperature)).sum(axis=1)) * REWARDS)

    @functools.partial(jax.jit, static_argnames="of")
    @jax.grad
    def divergence(raw, temperature, chances, of):
        """KL of base and policy token by token, over completions that come with these chances, or of whole ones."""
        logps, ref = tokens(raw, temperature), tokens(None, temperature)
        if of == "completion":
            return jnp.sum(jnp.exp(_chosen(logps).sum(1)) * (_chosen(logps) - _chosen(ref)).sum(1))
        p, q = (ref, logps) if of == "base" else (logps, ref)
        return jnp.sum(chances[:, None] * jnp.sum(jnp.exp(p) * (p - q), axis=-1) * KEPT)

    return SimpleNamespace(
        **{f.__name__: f for f in (singles, ours, score, reward, divergence, tokens)}, raw=raw, lm=lm, spectra=spectra
    )


def _chosen(logps):
    """Log-probs [21, 2] of the completions' tokens, 0 where masked."""
    return jnp.take_along_axis(logps, jnp.asarray(EVERY)[..., None], axis=-1)[..., 0] * KEPT


def _expected_advantages(chances, cfg):
    """[21], what a completion's advantage is in the mean over the other two samples of its prompt; [21, 21, 21] all."""
    firsts, others = np.meshgrid(np.arange(21), np.arange(441), indexing="ij")
    group = np.stack([firsts, others // 21, others % 21], axis=-1)
    worth = jax.vmap(lambda rewards: advantages(rewards[None], cfg)[0, 0])(jnp.asarray(REWARDS[group].reshape(-1, 3)))
    return (np.asarray(worth).reshape(21, 441) * chances[group[..., 1]] * chances[group[..., 2]]).sum(axis=1)


def _assert_same(ours, true):
    """The same direction and length, to 1e-3."""
    ours, true = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (ours, true))
    assert ours @ true / np.linalg.norm(ours) / np.linalg.norm(true) == pytest.approx(1, abs=1e-3)
    assert np.linalg.norm(ours) / np.linalg.norm(true) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("algorithm", "baseline"),
    [*(("reinforce", name) for name in BASELINES), ("rloo", None), ("grpo", None), ("dr_grpo", None)],
)
def test_the_mean_gradient_is_that_of_the_policy_sampled_at_any_temperature(listed, algorithm, baseline):
    cfg = ReinforceConfig(algorithm=algorithm, baseline=baseline)
    shares = KEPT.sum(axis=1) if algorithm == "grpo" else np.ones(21)
    gradient = listed.ours(ReinforceConfig(algorithm=algorithm))
    for temperature in TEMPERATURES:
        chances = np.exp(np.asarray(_chosen(listed.tokens(listed.raw, temperature)), np.float64).sum(axis=1))
        assert chances.sum() == pytest.approx(1, abs=1e-4)
        worth = _expected_advantages(chances, cfg)
        found = gradient(listed.raw, listed.singles(temperature, worth), jnp.asarray(chances, jnp.float32))
        _assert_same(found, listed.score(listed.raw, temperature, jnp.asarray(chances * worth / shares, jnp.float32)))
        if baseline in ("none", "leave_one_out") or algorithm == "rloo":
            _assert_same(found, listed.reward(listed.raw, temperature))


@pytest.mark.parametrize("kind", PENALTIES)
def test_the_penaltys_mean_gradient_is_that_of_the_divergence_at_the_sampled_temperature(listed, kind):
    gradient = listed.ours(ReinforceConfig(baseline="none", kl_coef=1.0, kl=kind))
    of = {"base_adapted": "base", "k3": "base", "k1": "completion"}.get(kind, "policy")
    for temperature in TEMPERATURES:
        chances = jnp.exp(_chosen(listed.tokens(listed.raw, temperature)).sum(axis=1))
        found = gradient(listed.raw, listed.singles(temperature), chances)
        _assert_same(found, listed.divergence(listed.raw, temperature, chances, of=of))


def test_one_temperature_for_all_rows_is_that_of_each_and_compiles_nothing_more(listed, compilations):
    lm, spectra, raw = listed.lm, listed.spectra, listed.raw
    prompts = jnp.asarray([[1, 3, 2], [2, 2, 4]], jnp.int32)
    tokens, kept = (jnp.asarray(x[1:5], jnp.int32) for x in (EVERY, KEPT))
    batch = Batch(prompts, jnp.ones_like(prompts), tokens, kept, jnp.asarray([1.0, -1, 0.5, 2]))
    cfg = TrainConfig(micro_batch=1, remat=False)
    state = ExpertState(raw, optimizer(cfg).init(raw), jnp.zeros((), jnp.int32))
    settings = dict(model=lm.model, family=SIGMOID_NUCLEAR, loss=ReinforceConfig(), cfg=cfg)

    def update(temperature):
        heated = dataclasses.replace(batch, temperature=temperature)
        metrics = train_step(state, lm.model.nest(spectra), lm.params, heated, **settings)[1]
        return {name: float(x) for name, x in metrics.items()}

    assert update(jnp.full(4, 0.5)) == pytest.approx(update(0.5), rel=1e-6)
    assert update(None) == pytest.approx(update(jnp.ones(4)), rel=1e-5, abs=1e-6)
    assert update(None)["loss"] != pytest.approx(update(0.5)["loss"], rel=1e-2)
    del compilations[:]
    update(jnp.full(4, 0.9))
    assert not [name for name in compilations if "train_step" in name]
