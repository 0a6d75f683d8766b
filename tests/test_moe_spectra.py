"""Singular-value adaptation of mixtures of experts: spectra of every module, and the forms beside each other."""

import dataclasses
import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers

import sva
from sva.adaptation.dispatchers import mixed_flops
from sva.ensembles.ensemble import bytes_a_token
from sva.generation.merge import factored, merge_params, nested_factors, nested_slots, shared_form
from sva.generation.sampling import OnPolicy
from sva.interop import expert_report
from sva.interop.gguf_export import save_gguf
from sva.interop.peft import save_peft
from sva.models.flops import linear_flops, met
from sva.models.transformer import logits
from sva.models.weights import expected
from sva.spectral import serving_plan
from sva.spectral.expert import Expert
from sva.spectral.forms import adapters, delta
from sva.spectral.mixing import bank, mixture
from sva.spectral.parametrisations import LINEAR, singular_values
from sva.training.config.reinforce import ReinforceConfig
from sva.training.config.train import TrainConfig
from sva.training.optimizers import update_config
from sva.training.reinforce import Batch, reinforce_loss
from sva.training.update import init_state, train_step
from sva.utils.errors import UserError
from sva.utils.trees import select

ROWS, LENGTH = 3, 12


@pytest.fixture(scope="module", params=[("qwen3_moe", True), ("olmoe", False)], ids=lambda p: p[0])
def setting(request, tmp_path_factory):
    """(lm, spectra of all targets, z of them near 1); scanned where the first layer is dense, and unrolled."""
    kind, scan = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVA_CACHE", str(tmp_path_factory.mktemp("cache")))
        tiny.make(kind, tmp_path_factory.mktemp("models") / kind)
        directory = next(path for path in tmp_path_factory.getbasetemp().glob(f"models*/{kind}"))
        lm = sva.load(str(directory), scan_layers=scan, progress=False)
        spectra = sva.decompose(lm, "all", progress=False)
        yield lm, spectra, _z(spectra)


def _z(spectra, seed=0, width=0.3):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.uniform(1 - width, 1 + width, spectra[name].s.shape), jnp.float32) for name in spectra
    }


def _prompts():
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB, (ROWS, LENGTH))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def _only(z, pattern):
    return {name: x for name, x in z.items() if re.search(pattern, name)}


def test_targets_name_modules_router_and_the_rest(setting):
    lm, spectra, _ = setting
    names = expected(lm.model.cfg)
    moe, layers = lm.model.cfg.moe, sum(lm.model.cfg.moe.layers)
    assert len(select(names, "moe")) == 3 * layers * moe.modules
    assert len(select(names, "router")) == layers
    dense = [name for name in names if re.search(r"mlp\.(gate|up|down)_proj", name)]
    assert (select(names, "mlp") if dense else []) == dense
    assert set(spectra) == {
        name
        for target in ("moe", "router", "attention_full", *(["mlp"] if dense else []))
        for name in select(names, target)
    }
    gate = spectra[f"model.layers.2.mlp.experts.{moe.modules - 1}.gate_proj.weight"]
    assert gate.u.shape == (moe.width, moe.width if moe.width < 64 else 64)
    assert spectra["model.layers.2.mlp.gate.weight"].s.shape == (moe.modules,)


def test_each_spectrum_is_its_own_weights(setting):
    lm, spectra, _ = setting
    weights = lm.named_params()
    for name in (select(weights, "moe") + select(weights, "router"))[::7]:
        u, s, vt = spectra[name]
        np.testing.assert_allclose((u * s[None, :]) @ vt, weights[name], atol=1e-5)


def test_spectra_that_are_asked_for_in_parts_are_those_asked_for_at_once(setting):
    lm, spectra, _ = setting
    fresh = dataclasses.replace(lm, spectra={})
    modules = sva.decompose(fresh, "moe", progress=False)
    again = sva.decompose(fresh, "all", progress=False)
    assert list(again) == list(spectra)
    for name in (next(iter(modules)), *list(spectra)[::17]):
        np.testing.assert_array_equal(again[name].s, spectra[name].s)


def test_a_report_takes_the_modules_of_a_layer_together(setting):
    _, spectra, z = setting
    z = _only(z, r"\.experts\.")
    moved = expert_report.movements(z, singular_values(spectra))
    kinds = expert_report.by_kind(moved)
    assert set(kinds) == {f"mlp.experts.{kind}_proj" for kind in ("gate", "up", "down")}
    layer, ups = expert_report.place(next(iter(z)))[0], [x for name, x in moved.items() if "up_proj" in name]
    assert kinds["mlp.experts.up_proj"].mean_abs == pytest.approx(np.mean([x.mean_abs for x in ups]))
    of_layer = [x.frobenius for name, x in moved.items() if f"layers.{layer}." in name and "up_proj" in name]
    row = next(line for line in expert_report.as_text(moved).splitlines() if line.startswith(f"{layer} "))
    assert f"{100 * np.mean(of_layer):.2f}" in row.split()


def test_a_token_reads_the_modules_that_it_meets(setting):
    lm, _, _ = setting
    cfg = lm.model.cfg
    read = {name: met(cfg, name) * x.nbytes for name, x in lm.named_params().items() if "embed" not in name}
    assert min(met(cfg, name) for name in read) == cfg.moe.top_k / cfg.moe.modules
    assert not cfg.tie_word_embeddings
    assert bytes_a_token(lm) == round(sum(read.values()))


def test_forms_agree_with_dense_merged_weights(setting):
    lm, spectra, z = setting
    ids, mask = _prompts()
    with jax.default_matmul_precision("highest"):
        merged = np.asarray(sva.merge(lm, spectra, z).logits(ids, mask))[mask > 0]
        rows = {name: jnp.broadcast_to(x, (ROWS, *x.shape)) for name, x in z.items()}
        found = {
            "factored": factored(spectra, z),
            "factored by row": factored(spectra, rows),
            "delta": {name: delta(spectra[name], x) for name, x in z.items()},
            "delta by row": {name: delta(spectra[name], x) for name, x in rows.items()},
        }
        base = np.asarray(lm.logits(ids, mask))[mask > 0]
        for form, adapter in found.items():
            ours = np.asarray(logits(lm.model, lm.params, ids, mask, adapter))[mask > 0]
            assert np.abs(ours - merged).max() < 3e-4, form
        assert np.abs(base - merged).max() > 0.3
        np.testing.assert_allclose(np.asarray(lm.logits(ids, mask, z))[mask > 0], merged, atol=3e-4)


def test_merged_modules_are_saved_for_transformers(setting, tmp_path):
    lm, spectra, z = setting
    merged = sva.merge(lm, spectra, z)
    merged.save(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    ids, mask = _prompts()
    theirs = tiny.logits(again, ids, mask)
    assert np.abs(np.asarray(merged.logits(ids, mask)) - theirs)[mask > 0].max() < 3e-4


def test_single_modules_are_merged_alone(setting):
    lm, spectra, z = setting
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    merged = sva.merge(lm, spectra, {name: z[name]}).named_params()
    before = lm.named_params()
    changed = [other for other, weight in merged.items() if not np.array_equal(weight, before[other])]
    assert changed == [name]
    with pytest.raises(UserError, match="modules of a layer are adapted together|scanned together"):
        logits(lm.model, lm.params, *_prompts(), factored(spectra, {name: z[name]}))


def _loss_of_logits(lm, params, adapter):
    ids, mask = _prompts()
    g = jnp.asarray(np.random.default_rng(3).standard_normal((ROWS, LENGTH, tiny.VOCAB)), jnp.float32)
    return jnp.sum(logits(lm.model, params, ids, mask, adapter) * g * mask[..., None])


def test_z_gradient_equals_autodiff_through_dense_merged_weights(setting):
    lm, spectra, z = setting

    def through_merged(z):
        return _loss_of_logits(lm, merge_params(lm.model, lm.params, spectra, z), None)

    def through_factors(z):
        return _loss_of_logits(lm, lm.params, nested_factors(lm.model, spectra, z))

    ours, truth = jax.jit(jax.grad(through_factors))(z), jax.jit(jax.grad(through_merged))(z)
    flat = [np.concatenate([np.ravel(found[name]) for name in z]) for found in (ours, truth)]
    assert np.linalg.norm(flat[0] - flat[1]) < 1e-4 * np.linalg.norm(flat[1])
    largest = max(np.linalg.norm(x) for x in truth.values())
    for name in z:
        error = np.linalg.norm(np.asarray(ours[name]) - np.asarray(truth[name]))
        assert error <= 1e-4 * max(np.linalg.norm(truth[name]), 1e-2 * largest), name
    used = [name for name in z if ".experts." in name and np.any(truth[name])]
    assert len(used) > len(_only(z, r"\.experts\.")) / 2


def _batch(rng):
    ids = rng.integers(3, tiny.VOCAB, (2, 6))
    completions = rng.integers(3, tiny.VOCAB, (4, 5))
    return Batch(
        jnp.asarray(ids, jnp.int32),
        jnp.ones((2, 6), jnp.int32),
        jnp.asarray(completions, jnp.int32),
        jnp.ones((4, 5), jnp.int32),
        jnp.asarray([1.0, -1.0, 0.5, 1.0]),
    )


def _arrays(jaxpr):
    """Shapes of everything that a jaxpr and those inside it compute."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.shape for var in eqn.outvars if hasattr(var.aval, "shape"))
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _arrays(inner)


def test_an_update_forms_nothing_of_the_modules_shapes_and_learns(setting):
    lm, spectra, _ = setting
    spectra = {name: spectra[name] for name in select(spectra, "moe")}
    batch, cfg = _batch(np.random.default_rng(0)), update_config(TrainConfig(lr=3e-2, micro_batch=2))
    settings = dict(model=lm.model, family=LINEAR, loss=ReinforceConfig(kl_coef=0.1, baseline="none"), cfg=cfg)
    state, nested = init_state(spectra, LINEAR, cfg), lm.model.nest(spectra)

    moe, layers = lm.model.cfg.moe, sum(lm.model.cfg.moe.layers)
    leads = [(moe.modules,), (layers, moe.modules)]
    shapes = {lead + shape for lead in leads for shape in ((moe.width, 64), (64, moe.width))}
    text = train_step.lower(state, nested, lm.params, batch, **settings).compile().as_text()
    made = set()
    for line in text.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?(\S+) = f32\[([\d,]+)\]\S* ([\w-]+)\(", line)
        computes = ("dot", "fusion", "scatter", "add", "custom-call", "reduce", "dynamic-update-slice")
        if match and match[3] in computes and not re.match(r"(bitcast_)?dynamic-slice", match[1]):  # a scan's own layer
            made.add(tuple(map(int, match[2].split(","))))
            if made & shapes:
                print(line)
    assert made
    assert not made & shapes

    first = None
    for _ in range(4):
        state, metrics = train_step(state, nested, lm.params, batch, **settings)
        first = metrics["loss"] if first is None else first
    assert metrics["loss"] < first
    assert metrics["z_spread"] > 0
    raw = {name: np.asarray(x) for name, x in state.raw.items()}
    assert sum((x != 1).any() for x in raw.values()) > len(raw) / 2


def test_an_expert_file_holds_each_module_by_name(setting, tmp_path):
    lm, spectra, z = setting
    z = _only(z, r"experts|mlp\.gate\.")
    Expert({name: np.asarray(x) for name, x in z.items()}, "linear", {"fingerprint": lm.fingerprint}).save(
        tmp_path / "one.safetensors"
    )
    again = Expert.load(tmp_path / "one.safetensors", fingerprint=lm.fingerprint)
    assert set(again.names) == set(z)
    found = again.z({name: spectra[name] for name in z})
    ids, mask = _prompts()
    np.testing.assert_allclose(lm.logits(ids, mask, found), sva.merge(lm, spectra, z).logits(ids, mask), atol=3e-4)


@pytest.mark.parametrize("exact_base", [False, True])
def test_rows_with_mixtures_of_their_own_are_what_each_mixture_merged_is(exact_base, setting):
    lm, spectra, _ = setting
    names = select(spectra, "moe") + select(spectra, "router")
    spectra = sva.decompose(lm, r"experts.*_proj|mlp\.gate\.", progress=False)
    zs = [_only(_z(spectra, seed), "") for seed in (1, 2)]
    assert set(names) == set(spectra)
    plans = serving_plan.plan(spectra, zs, 0.0, exact_base=exact_base, kind=lambda name: shared_form(lm.model, name))
    assert {plan.form for plan in plans.values()} == ({"delta"} if exact_base else {"factored"})
    nested = nested_slots(lm.model, spectra, bank(zs, spectra, 4), plans)
    if not exact_base:
        assert mixed_flops(lm.model, nested) == linear_flops(lm.model.cfg, frozenset(names))
    alphas = jnp.asarray([[0, 1, 0, 0], [0, 0.4, 0.6, 0], [1, 0, 0, 0]], jnp.float32)
    ids, mask = _prompts()
    ours = np.asarray(logits(lm.model, lm.params, ids, mask, mixture(nested, alphas)))
    for row, weights in enumerate(alphas[:, 1:3]):
        alone = sva.merge(lm, spectra, sva.mix(zs, weights)).logits(ids[row : row + 1], mask[row : row + 1])
        assert np.abs(ours[row] - np.asarray(alone)[0])[mask[row] > 0].max() < 3e-4, row
    if exact_base:
        base = np.asarray(logits(lm.model, lm.params, ids, mask))
        np.testing.assert_array_equal(ours[2], base[2])


def test_recomputing_the_routing_keeps_the_log_probs_that_were_sampled(setting):
    lm, spectra, z = setting
    z = _only(z, r"\.experts\.")
    ids = np.random.default_rng(1).integers(3, tiny.VOCAB, (4, 7))
    merged = sva.merge(lm, spectra, z)
    drawn = merged.generate(ids, np.ones_like(ids), 10, sampling=OnPolicy(1.0), key=jax.random.key(0))
    batch = Batch(
        jnp.asarray(ids, jnp.int32),
        jnp.ones((4, 7), jnp.int32),
        jnp.asarray(drawn.tokens),
        jnp.ones((4, 10), jnp.int32),
        jnp.ones(4),
    )
    view = sva.decompose(lm, "moe", progress=False)
    _, aux = reinforce_loss(z, view, lm.params, batch, model=lm.model, family=LINEAR, cfg=ReinforceConfig())
    assert np.abs(np.asarray(aux["logprobs"]) - drawn.logprobs).max() < 1e-3


def test_what_cannot_run_in_modules_is_refused_by_name(setting):
    lm, spectra, z = setting
    expert = Expert({name: np.zeros((2, 2), np.float32) for name in select(spectra, "moe")}, "core:r=2")
    cores = expert.z({name: spectra[name] for name in expert.names})
    ids, mask = _prompts()
    with pytest.raises(UserError, match="CoreAdapter does not run in the modules of a mixture of experts"):
        logits(lm.model, lm.params, ids, mask, adapters({name: spectra[name] for name in cores}, cores))
    np.testing.assert_array_equal(sva.merge(lm, spectra, cores).logits(ids, mask), lm.logits(ids, mask))
    for pattern in (r"\.experts\.", r"mlp\.gate\."):
        with pytest.raises(UserError, match="PEFT adapts linear layers"):
            save_peft("unused", lm, spectra, _only(z, pattern), title="one")
    with pytest.raises(UserError, match="cannot be written as a GGUF file"):
        save_gguf("unused.gguf", lm.model.cfg, lm.named_params().__getitem__, name="one", tokenizer={})
