"""LoRA, DoRA, IA3 and the dense change: the members that need no decomposition."""

import dataclasses

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import sva
from sva.adaptation.adaptive_lm import adaptive
from sva.adaptation.few_shot import pool
from sva.adapters.family import Matrix
from sva.generation import frozen as frozen_module
from sva.generation.frozen import frozen_of, merge_expert
from sva.generation.merge import merge_params
from sva.generation.testing import NameAColour, toy_lm
from sva.models.config import from_hf
from sva.models.weights import expected
from sva.spectral.expert import Expert
from sva.spectral.forms import adapters, merge
from sva.spectral.parametrisations import LINEAR, count, family, matrix_infos
from sva.training.config import Config
from sva.training.config.checkpoint import CheckpointConfig
from sva.training.config.reinforce import ReinforceConfig
from sva.training.config.rollout import RolloutConfig
from sva.training.config.train import TrainConfig
from sva.training.loop import fit
from sva.training.optimizers import update_config
from sva.training.reinforce import Batch, reinforce_loss
from sva.training.update import init_state, train_step
from sva.utils.errors import UserError
from sva.utils.matmul import dot, floats, quantise_weight
from sva.utils.trees import select

MEMBERS = ("lora:r=4,alpha=8", "rslora:r=4,alpha=8", "dora:r=4,alpha=8", "ia3", "full")
UP = "model.layers.1.mlp.up_proj.weight"
IDS = np.arange(12).reshape(2, 6)
MASK = np.ones_like(IDS)


def _names(lm, targets="all"):
    return select(expected(lm.model.cfg), targets)


def _frozen(lm, spelling, targets="all", seed=0):
    return frozen_of(lm, family(spelling), _names(lm, targets), seed=seed)


def _moved(spelling, frozen, seed=1):
    """Raw values some way from the base."""
    rng = np.random.default_rng(seed)
    start = family(spelling).start(matrix_infos(frozen))
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), start)


def _z(spelling, frozen, raw):
    return family(spelling).z(raw, matrix_infos(frozen))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    prompts, done = rng.integers(0, 32, (2, 6)), rng.integers(0, 32, (4, 5))
    mask, kept = np.ones_like(prompts), np.ones_like(done)
    mask[1, :2], kept[2, 3:] = 0, 0
    return Batch(*map(jnp.asarray, (prompts, mask, done, kept, np.array([1.0, -1, 0.5, -2], np.float32))))


@pytest.mark.parametrize("spelling", MEMBERS)
def test_every_member_starts_at_the_base_and_decomposes_nothing(spelling, toy, monkeypatch):
    monkeypatch.setattr(frozen_module, "spectra_of", None)
    frozen = _frozen(toy, spelling)
    z = _z(spelling, frozen, family(spelling).start(matrix_infos(frozen)))
    base = np.asarray(toy.logits(IDS, MASK))
    adapted = sva.logits(toy.model, toy.params, IDS, MASK, adapters(frozen, z))
    merged = sva.merge(toy, frozen, z).named_params()[UP]
    tolerance = 1e-6 if spelling.startswith("dora") else 0  # m / norm rounds
    assert np.abs(adapted - base).max() <= tolerance * 10 * np.abs(base).max()
    assert np.abs(merged - toy.named_params()[UP]).max() <= tolerance


LONG = ("rslora:r=4,alpha=8", "full")  # as LoRA, and as nothing at all


@pytest.mark.parametrize("spelling", [pytest.param(x, marks=pytest.mark.long if x in LONG else ()) for x in MEMBERS])
def test_the_gradient_of_scanned_layers_equals_autodiff_through_the_merged_weights(spelling, toy, batch):
    frozen, member, cfg = _frozen(toy, spelling), family(spelling), ReinforceConfig()
    raw = _moved(spelling, frozen)

    def dense(raw):
        params = merge_params(toy.model, toy.params, frozen, _z(spelling, frozen, raw))
        return reinforce_loss({}, {}, params, batch, model=toy.model, family=LINEAR, cfg=cfg)[0]

    lm = toy_lm(scan_layers=True)
    nested = lm.model.nest(_frozen(lm, spelling))

    def adapted(raw, nested):
        settings = dict(model=lm.model, family=member, cfg=cfg)
        return reinforce_loss(lm.model.nest(raw), nested, lm.params, batch, **settings)[0]

    other, wanted = jax.jit(jax.value_and_grad(dense))(raw)
    value, gradient = jax.jit(jax.value_and_grad(adapted))(raw, nested)
    assert float(value) == pytest.approx(float(other), rel=1e-4)
    for (path, g), exact in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(g - exact) <= 1e-4 * np.linalg.norm(exact), path
        assert np.linalg.norm(exact) > 0


@pytest.mark.parametrize("spelling", MEMBERS)
def test_expert_files_round_trip_and_merge_as_before(spelling, toy, tmp_path):
    frozen = _frozen(toy, spelling)
    about = {"fingerprint": toy.fingerprint, "base": "toy"}
    expert = Expert(jax.tree.map(np.asarray, _moved(spelling, frozen)), spelling, about)
    expert.save(tmp_path / "e.safetensors")
    again = Expert.load(tmp_path / "e.safetensors", fingerprint=toy.fingerprint)
    assert (again.parametrisation, again.digest) == (spelling, expert.digest)
    assert set(again.names) == set(frozen)
    merged, reread = (merge_expert(toy, one).named_params() for one in (expert, again))
    chex.assert_trees_all_equal(merged, reread)
    assert np.abs(merged[UP] - toy.named_params()[UP]).max() > 1e-3
    with pytest.raises(UserError, match="was trained on toy .* not on another"):
        Expert.load(tmp_path / "e.safetensors", fingerprint="0" * 64, base="another")


@pytest.mark.parametrize("spelling", ["lora:r=4,alpha=8", "ia3"])
def test_an_expert_without_a_z_is_refused_wherever_z_are_mixed_or_given_to_rows(spelling, toy):
    frozen = _frozen(toy, spelling, "mlp")
    expert = Expert(jax.tree.map(np.asarray, _moved(spelling, frozen)), spelling, {"label": "x"})
    z = expert.z(frozen)
    for use in (
        lambda: adaptive(toy, [expert], progress=False),
        lambda: pool(toy, [expert], progress=False),
        lambda: toy.logits(IDS, MASK, z),
        lambda: toy.generate(IDS, MASK, 2, z=z),
        lambda: expert.z(sva.decompose(toy, "mlp", progress=False)),
    ):
        with pytest.raises(UserError, match="merge|sva.frozen") as caught:
            use()
        assert "\n" not in str(caught.value)


def _settings(spelling, steps=2, **train):
    return Config(
        parametrisation=spelling,
        rollout=RolloutConfig(prompts=2, samples=4),
        reinforce=ReinforceConfig(baseline="none"),
        train=TrainConfig(steps=steps, micro_batch=2, remat=False, **train),
        checkpoint=CheckpointConfig(every=2),
        seed=3,
    )


@pytest.mark.parametrize("spelling", MEMBERS)
def test_adapters_run_on_bfloat16_and_int8_weights_as_they_merge(spelling):
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((13, 7)), jnp.asarray(rng.standard_normal((2, 3, 7)), jnp.float32)
    member, plain = family(spelling), jnp.asarray(w, jnp.float32)
    bias = jnp.ones(13)
    about = {UP: Matrix(np.uint32(5), (13, 7), "up_proj", jnp.linalg.norm(plain, axis=1), bias)}
    start = member.z(member.start(about), about)[UP]
    small = plain.astype(jnp.bfloat16)
    y = start(x.astype(jnp.bfloat16), small)
    assert y.dtype == jnp.bfloat16
    if not spelling.startswith("dora"):  # whose lengths are of w before it was rounded
        np.testing.assert_array_equal(y, dot(x.astype(jnp.bfloat16), small))
        np.testing.assert_array_equal(merge(None, start, small), small)
    z, packed = member.z(_moved(spelling, about), about)[UP], quantise_weight(plain)
    merged = merge(None, z, floats(packed, jnp.float32))
    bias_of = z.merged_bias()
    change = 0 if bias_of is None else (bias_of - bias)[None, None, :]
    np.testing.assert_allclose(z(x, packed), dot(x, merged) + change, atol=2e-3 * np.abs(merged).max())


def test_dropout_sets_its_share_to_zero_and_makes_the_rest_larger(toy):
    frozen = _frozen(toy, "lora:r=4,alpha=8,dropout=0.25")
    member = family("lora:r=4,alpha=8,dropout=0.25")
    z = _z("lora:r=4,alpha=8,dropout=0.25", frozen, member.start(matrix_infos(frozen)))
    x = jnp.ones((4, 16, 32))

    def dropped(seed, x=x, name=UP):
        return np.asarray(member.noisy(z, matrix_infos(frozen), jnp.uint32(seed))[name].dropped(x))

    once = dropped(1)
    assert set(np.unique(once)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((once == 0).mean() - 0.25) < 0.03  # of 2,048 numbers: three standard deviations
    others = (dropped(2), dropped(1, name=UP.replace("up", "gate")), dropped(1, jnp.ones((2, 32, 32))).reshape(x.shape))
    for other in others:  # another update, another matrix, the other pass: drawn anew
        assert 0.3 < (once == other).mean() < 0.8
    np.testing.assert_array_equal(z[UP].dropped(x), x)  # outside training


def test_dropout_is_of_seed_and_step_and_a_run_resumes_from_the_last_saved_step_bit_for_bit(toy, tmp_path):
    spelling = "lora:r=4,alpha=8,dropout=0.3"
    settings = _settings(spelling, 4, optimizer="adamw", weight_decay=0.1, schedule="cosine")
    frozen = _frozen(toy, spelling, "mlp", seed=3)
    rows = []

    def stop(row):
        rows.append(row["step"])
        if row["step"] == 2 and len(rows) == 3:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(toy, frozen, NameAColour(), tmp_path / "a", settings, on_step=stop)
    resumed = fit(toy, frozen, NameAColour(), tmp_path / "a", settings, on_step=stop)
    assert rows == [0, 1, 2, 3]  # saved where it was stopped
    whole = fit(toy, frozen, NameAColour(), tmp_path / "b", settings)
    chex.assert_trees_all_equal(resumed, whole)
    for name, raw in whole.raw.items():
        assert np.abs(raw["b"]).max() > 1e-3, name


def test_an_update_with_lora_or_ia3_forms_no_product_of_a_weights_shape(toy, batch):
    """In the compiled program's products, for a target whose shape nothing else has."""
    shapes = {(48, 32), (32, 48)}  # gate, up and down
    found = {}
    for spelling in ("lora:r=4,alpha=8", "dora:r=4,alpha=8", "ia3", "full"):
        frozen, member = _frozen(toy, spelling, "mlp"), family(spelling)
        cfg = update_config(TrainConfig(micro_batch=2, remat=False))
        state = init_state(frozen, member, cfg)
        settings = dict(model=toy.model, family=member, loss=ReinforceConfig(), cfg=cfg)
        jaxpr = jax.make_jaxpr(lambda *a: train_step(*a, **settings))(  # noqa: B023
            state, toy.model.nest(frozen), toy.params, batch
        )
        found[spelling] = shapes & set(_products(jaxpr.jaxpr))
    assert found.pop("full") == shapes  # what is looked for can be found
    assert not any(found.values()), found


def _products(jaxpr):
    """Shapes of every matrix product of a jaxpr and those inside it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield from (var.aval.shape for var in eqn.outvars)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _products(inner)


def test_another_rate_schedule_decay_or_number_of_steps_compiles_nothing(toy, batch, compilations):
    spelling = "lora:r=4,alpha=8"
    frozen, member = _frozen(toy, spelling, "mlp"), family(spelling)
    one = TrainConfig(steps=5, lr=1e-3, optimizer="adamw", micro_batch=2, remat=False)
    two = dataclasses.replace(one, steps=50, lr=2e-3, weight_decay=0.1, schedule="cosine")
    settings = dict(model=toy.model, family=member, loss=ReinforceConfig())
    nested = toy.model.nest(frozen)
    state = init_state(frozen, member, update_config(one))
    state, _ = train_step(state, nested, toy.params, batch, cfg=update_config(one), **settings)
    compilations.clear()
    train_step(state, nested, toy.params, batch, cfg=update_config(two, 7), **settings)
    assert compilations == []


def test_cosine_decay_starts_at_the_rate_and_ends_near_zero():
    cfg = TrainConfig(steps=10, lr=2.0, schedule="cosine")
    assert [cfg.lr_at(step) for step in (0, 5, 10)] == pytest.approx([2, 1, 0])
    assert TrainConfig(steps=10, lr=2.0).lr_at(7) == 2


def _llama3_8b(targets):
    sizes = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
    cfg = from_hf(tiny.config("llama", vocab_size=128256, num_key_value_heads=8, **sizes).to_dict())
    weights = expected(cfg)
    return {name: Matrix(np.uint32(0), weights[name].shape, name.split(".")[-2]) for name in select(weights, targets)}


@pytest.mark.parametrize(
    ("spelling", "targets", "millions"),
    [
        ("lora:r=16,alpha=32", "attention", 6.82),  # arXiv 2501.06252, table 4, as the next
        ("lora:r=16,alpha=32", "(q|v|gate|up|down)_proj", 35.13),
        ("ia3", "ia3", 32 * (1024 + 1024 + 14336) / 1e6),
        ("full", "mlp", 32 * 3 * 4096 * 14336 / 1e6),
    ],
)
def test_counts_for_llama_3_8b(spelling, targets, millions):
    assert count(family(spelling), _llama3_8b(targets)) / 1e6 == pytest.approx(millions, abs=0.005)


def test_loras_start_is_pefts_distribution_and_its_own_for_each_seed_and_weight(toy):
    spelling = "lora:r=16,alpha=32"
    one, again, other = (
        family(spelling).start(matrix_infos(_frozen(toy, spelling, "mlp", seed))) for seed in (0, 0, 1)
    )
    chex.assert_trees_all_equal(one, again)
    a = np.concatenate([np.ravel(raw["a"]) for name, raw in one.items() if "down" not in name])
    bound = 32**-0.5  # kaiming_uniform with a = sqrt(5) of 32 inputs
    assert 0.99 * bound < np.abs(a).max() < bound
    assert a.mean() == pytest.approx(0, abs=0.01)
    assert a.std() == pytest.approx(bound / 3**0.5, rel=0.03)
    flat = [np.asarray(raw["a"]).ravel()[:8] for tree in (one, other) for raw in tree.values()]
    assert len({x.tobytes() for x in flat}) == len(flat)
    assert all(not np.any(raw["b"]) for raw in one.values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(parametrisation="lora:r=16"), "does not say alpha; write e.g. lora:r=16,alpha=32"),
        (dict(parametrisation="lora:r=1.5,alpha=2"), "r=1.5 is no whole number"),
        (dict(parametrisation="lora:r=2,alpha=much"), "alpha=much is no number"),
        (dict(parametrisation="lora:r=2,alpha=0"), "lora:alpha=0.0 must be above 0"),
        (dict(parametrisation="lora:r=2,alpha=2,dropout=1"), "lora:dropout=1 must be at least 0 and below 1"),
        (dict(parametrisation="ia3", rollout=RolloutConfig(form="factored")), "rollout.form=factored .* ia3 has none"),
        (dict(parametrisation="dora:r=2,alpha=2", train=TrainConfig(bound=1.0)), "train.bound=1.0"),
        (dict(parametrisation="full", train=TrainConfig(method="evolution")), "train.method=evolution .* full is no z"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(settings, words):
    with pytest.raises(UserError, match=words) as caught:
        Config(**settings)
    assert "\n" not in str(caught.value)


def test_spellings_are_the_members_own():
    assert str(family("lora:alpha=32,r=16,dropout=0")) == "lora:r=16,alpha=32"
    assert str(family("dora:r=16,alpha=0.5,dropout=0.05")) == "dora:r=16,alpha=0.5,dropout=0.05"
    assert (Config(parametrisation="ia3").targets, Config().targets) == ("ia3", "mlp")
    assert Config(parametrisation="ia3", targets="mlp").targets == "mlp"


def test_targets_and_ranks_that_no_matrix_has_are_named(toy):
    with pytest.raises(UserError, match=r"lora:r=33,alpha=1 is of a higher rank .* \w+ is \d+ x \d+; lower r to 32"):
        family("lora:r=33,alpha=1").start(matrix_infos(_frozen(toy, "lora:r=33,alpha=1", "mlp")))
    with pytest.raises(UserError, match="matches model.layers.0.input_layernorm.weight, which is not the matrix"):
        _names(toy, "layernorm")
    for name, what in (
        ("model.norm.weight", "has 1 dimensions"),
        ("model.layers.9.mlp.up_proj.weight", "is not there"),
    ):
        with pytest.raises(UserError, match=f"{name} {what}, ia3 adapts matrices"):
            frozen_of(toy, family("ia3"), [name])
