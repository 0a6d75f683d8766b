import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import sva
from sva.adaptation.adaptive_lm import adaptive
from sva.generation.decompose import decompose
from sva.generation.merge import merge, merge_params
from sva.generation.testing import NameAColour, toy_lm
from sva.models.config import from_hf
from sva.models.weights import expected
from sva.spectral import forms
from sva.spectral.expert import Expert
from sva.spectral.forms import Bands, Core, Spectrum, adapters
from sva.spectral.mixing import bank, mix
from sva.spectral.parametrisations import (
    EXAMPLES,
    LINEAR,
    SHARED,
    Diagonal,
    MatrixInfo,
    PerMatrix,
    count,
    family,
    matrix_infos,
    projections,
    seed_of,
)
from sva.spectral.svd import svd
from sva.training.config import Config
from sva.training.config.reinforce import ReinforceConfig
from sva.training.config.rollout import RolloutConfig
from sva.training.config.train import TrainConfig
from sva.training.loop import fit
from sva.training.optimizers import update_config
from sva.training.reinforce import Batch, reinforce_loss
from sva.training.update import init_state, train_step
from sva.utils.errors import UserError
from sva.utils.matmul import dot
from sva.utils.trees import select

MEMBERS = ("linear", "sigmoid_nuclear", "top_k:k=5", "tail_only:k=5", "banded:width=2", "core:r=4", "projected:n=7,r=3")
DENSE = [spelling for spelling in MEMBERS if not isinstance(family(spelling), Diagonal)]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def spectra(toy):
    return decompose(toy, "mlp", progress=False)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    prompts, done = rng.integers(0, 32, (2, 6)), rng.integers(0, 32, (4, 5))
    mask, kept = np.ones_like(prompts), np.ones_like(done)
    mask[1, :2], kept[2, 3:] = 0, 0
    return Batch(*map(jnp.asarray, (prompts, mask, done, kept, np.array([1.0, -1, 0.5, -2], np.float32))))


def _moved(member, spectra, seed=1):
    """Raw values some way from the base."""
    rng = np.random.default_rng(seed)
    start = member.start(matrix_infos(spectra))
    return jax.tree.map(lambda x: x + jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), start)


def _expert(spelling, spectra):
    member = family(spelling)
    raw = {name: np.asarray(x) for name, x in _moved(member, spectra).items()}
    return Expert(raw, spelling, {"label": "x"}, () if isinstance(member, PerMatrix) else tuple(spectra))


def _llama3_8b(targets):
    sizes = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
    cfg = from_hf(tiny.config("llama", vocab_size=128256, num_key_value_heads=8, **sizes).to_dict())
    weights = expected(cfg)
    ranks = {name: min(weights[name].shape) for name in select(weights, targets)}
    return {name: MatrixInfo(jax.ShapeDtypeStruct((rank,), jnp.float32), seed_of(name)) for name, rank in ranks.items()}


@pytest.mark.parametrize(
    ("spelling", "mlp", "attention"),
    [
        ("linear", 393_216, 163_840),
        ("sigmoid_nuclear", 393_216, 163_840),
        ("top_k:k=64", 96 * 64, 64 * 64),
        ("tail_only:k=64", 96 * 64, 64 * 64),
        ("banded:width=2", 5 * 393_216 - 96 * 6, 5 * 163_840 - 64 * 6),
        ("core:r=16", 96 * 256, 64 * 256),
        ("projected:n=13,r=2", 13, 13),
    ],
)
def test_counts_for_llama_3_8b(spelling, mlp, attention):
    member = family(spelling)
    assert (count(member, _llama3_8b("mlp")), count(member, _llama3_8b("attention"))) == (mlp, attention)


def test_a_spelling_is_the_members_own_and_equal_ones_are_one_static_argument():
    assert [family(str(example)) for example in EXAMPLES] == list(EXAMPLES)
    assert family("projected:r=2,n=13") == family("projected:n=13,r=2")
    assert hash(family("core:r=3")) == hash(family("core:r=3"))
    assert family("core:r=3") != family("core:r=4")
    assert len({*EXAMPLES}) == len(EXAMPLES)


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("cor:r=3", "unknown parametrisation 'cor': .*linear, sigmoid_nuclear, .*core:r=16, projected:n=13,r=2"),
        ("core", "does not say r; write e.g. core:r=16"),
        ("core:k=3", "'k' is unknown or given twice; write e.g. core:r=16"),
        ("core:r=3,r=3", "given twice"),
        ("core:r=many", "r=many is no whole number"),
        ("core:r=-1", "r=-1 is no whole number"),
        ("core:r=0", "core:r=0 must be at least 1"),
        ("projected:n=13", "does not say r"),
        ("linear:k=3", "write e.g. linear"),
    ],
)
def test_a_wrong_spelling_is_explained_in_one_line(spelling, words):
    with pytest.raises(UserError, match=words) as caught:
        family(spelling)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spelling", ["top_k:k=33", "tail_only:k=33", "banded:width=32", "core:r=33", "projected:n=2,r=33"]
)
def test_a_matrix_that_is_too_small_for_the_setting_is_named_with_its_size(spelling, spectra):
    with pytest.raises(UserError, match=f"{spelling} needs 33 singular values, a target matrix has 32"):
        init_state(spectra, family(spelling), update_config(TrainConfig()))


@pytest.mark.parametrize("spelling", MEMBERS)
def test_every_member_starts_at_the_base(spelling, toy, spectra):
    member = family(spelling)
    z = member.z(member.start(matrix_infos(spectra)), matrix_infos(spectra))
    ids = np.arange(12).reshape(2, 6)
    base = np.asarray(toy.logits(ids, np.ones_like(ids)))
    adapted = sva.logits(toy.model, toy.params, ids, np.ones_like(ids), adapters(spectra, z))
    merged = merge(toy, spectra, z).named_params()[UP]
    if isinstance(member, Diagonal):
        assert np.abs(adapted - base).max() < 1e-5 * np.abs(base).max()
        assert np.abs(merged - toy.named_params()[UP]).max() < 1e-5
        for vector in z.values():
            np.testing.assert_allclose(vector, 1, atol=2e-6)
    else:
        np.testing.assert_array_equal(adapted, base)
        np.testing.assert_array_equal(merged, toy.named_params()[UP])


# Linear on some components, or trained by other tests: their gradients are compared by hand.
ALIKE = ("top_k:k=5", "tail_only:k=5", "sigmoid_nuclear", "banded:width=2", "projected:n=7,r=3")


@pytest.mark.parametrize("spelling", [pytest.param(x, marks=pytest.mark.long if x in ALIKE else ()) for x in MEMBERS])
def test_the_gradient_of_scanned_layers_equals_autodiff_through_the_merged_weights(spelling, toy, spectra, batch):
    member, raw, cfg = family(spelling), _moved(family(spelling), spectra), ReinforceConfig()

    def dense(raw):
        params = merge_params(toy.model, toy.params, spectra, member.z(raw, matrix_infos(spectra)))
        return reinforce_loss({}, {}, params, batch, model=toy.model, family=LINEAR, cfg=cfg)[0]

    expected_value, wanted = jax.jit(jax.value_and_grad(dense))(raw)
    lm = toy_lm(scan_layers=True)
    nested = lm.model.nest(spectra)

    def adapted(raw, nested):
        settings = dict(model=lm.model, family=member, cfg=cfg)
        return reinforce_loss(lm.model.nest(raw), nested, lm.params, batch, **settings)[0]

    value, gradient = jax.jit(jax.value_and_grad(adapted))(raw, nested)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-4)
    for name, g in gradient.items():
        assert np.linalg.norm(g - wanted[name]) <= 1e-4 * np.linalg.norm(wanted[name])
        assert np.linalg.norm(wanted[name]) > 0


# One of each kind of raw tree.
@pytest.mark.parametrize(
    "spelling", ["linear", pytest.param("banded:width=2", marks=pytest.mark.long), "projected:n=7,r=3"]
)
def test_a_step_trains_a_member_and_its_run_resumes_bit_for_bit(spelling, toy, spectra, tmp_path):
    settings = Config(
        parametrisation=spelling,
        rollout=RolloutConfig(prompts=2, samples=4),
        reinforce=ReinforceConfig(baseline="none"),
        train=TrainConfig(steps=2, micro_batch=2, remat=False),
        seed=3,
    )

    def stop(row):
        if row["step"] == 0:
            raise RuntimeError("stop")

    member = family(spelling)
    with pytest.raises(RuntimeError, match="stop"):
        fit(toy, spectra, NameAColour(), tmp_path / "a", settings, on_step=stop)
    resumed = fit(toy, spectra, NameAColour(), tmp_path / "a", settings)
    whole = fit(toy, spectra, NameAColour(), tmp_path / "b", settings)
    chex.assert_trees_all_equal(resumed, whole)
    start = member.start(matrix_infos(spectra))
    for name, raw in whole.raw.items():
        assert np.abs(raw - start[name]).max() > 1e-3


@pytest.mark.parametrize("spelling", MEMBERS)
def test_expert_files_of_every_member_round_trip(spelling, toy, spectra, tmp_path):
    expert = _expert(spelling, spectra)
    expert.save(tmp_path / "e.safetensors")
    again = Expert.load(tmp_path / "e.safetensors")
    assert (again.parametrisation, again.digest) == (spelling, expert.digest)
    assert sorted(again.names) == sorted(spectra)
    merged, reread = (merge(toy, spectra, e.z(spectra)).named_params() for e in (expert, again))
    chex.assert_trees_all_equal(merged, reread)
    assert np.abs(merged[UP] - toy.named_params()[UP]).max() > 1e-3


@pytest.mark.parametrize("spelling", MEMBERS)
def test_a_z_is_mixed_and_given_to_rows_and_anything_else_is_to_be_merged(spelling, toy, spectra):
    expert = _expert(spelling, spectra)
    z, ids = expert.z(spectra), np.arange(12).reshape(2, 6)
    uses = [
        lambda: mix([z], [0.5]),
        lambda: bank([z], spectra, 2),
        lambda: toy.logits(ids, np.ones_like(ids), z),
        lambda: toy.generate(ids, np.ones_like(ids), 2, z=z),
        lambda: adaptive(toy, [expert], progress=False),
    ]
    for use in uses:
        if spelling not in DENSE:
            use()
        else:
            with pytest.raises(UserError, match="merge") as caught:
                use()
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
def test_bands_and_cores_stand_for_the_matrices_they_say(shape):
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape).astype(np.float32)
    spectrum = Spectrum(*map(jnp.asarray, svd(w)))
    u, s, vt = (np.asarray(x, np.float64) for x in spectrum)
    x = jnp.asarray(rng.standard_normal((2, 3, shape[1])), jnp.float32)
    raw = rng.standard_normal(6 * 5 - 2 * 3).astype(np.float32)
    lengths = np.cumsum([4, 5, 6, 5])
    m = sum(np.diag(part, offset) for part, offset in zip(np.split(raw, lengths), range(-2, 3), strict=True))
    c = rng.standard_normal((4, 4)).astype(np.float32)
    cases = [
        (family("banded:width=2").matrix_z(jnp.asarray(raw), spectrum.s), u @ m @ vt),
        (family("core:r=4").matrix_z(jnp.asarray(c), spectrum.s), (u[:, :4] * s[:4]) @ c @ vt[:4]),
    ]
    for z, change in cases:
        np.testing.assert_allclose(forms.merge(spectrum, z, jnp.asarray(w)), w + change, atol=2e-5)
        y = forms.adapter(spectrum, z)(x, jnp.asarray(w))
        np.testing.assert_allclose(y, np.asarray(x) @ (w + change).T, atol=1e-4)


@pytest.mark.parametrize("spelling", ["banded:width=2", "core:r=4"])
def test_adapters_form_nothing_of_the_weights_shape_backwards(spelling):
    member, w = family(spelling), jnp.asarray(np.random.default_rng(0).standard_normal((13, 7)), jnp.float32)
    spectrum = Spectrum(*map(jnp.asarray, svd(np.asarray(w))))

    def loss(raw):
        return jnp.sum(forms.adapter(spectrum, member.matrix_z(raw, spectrum.s))(jnp.ones((2, 3, 7)), w) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(member.init(spectrum.s) + 0.1)
    shapes = {var.aval.shape for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general" for var in eqn.outvars}
    assert shapes
    assert not shapes & {(13, 7), (7, 13)}


@pytest.mark.parametrize("spelling", DENSE)
def test_in_bfloat16_the_start_is_the_base_bit_for_bit(spelling):
    w = np.random.default_rng(0).standard_normal((13, 7)).astype(jnp.bfloat16)
    u, s, vt = svd(np.asarray(w, np.float32))
    spectrum = Spectrum(jnp.asarray(u, jnp.bfloat16), jnp.asarray(s), jnp.asarray(vt, jnp.bfloat16))
    member, x = family(spelling), jnp.asarray(np.linspace(-1, 2, 42).reshape(2, 3, 7), jnp.bfloat16)
    z = member.z(member.start(matrix_infos({"a": spectrum})), matrix_infos({"a": spectrum}))["a"]
    np.testing.assert_array_equal(forms.merge(spectrum, z, jnp.asarray(w)), w)
    y = forms.adapter(spectrum, z)(x, jnp.asarray(w))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, dot(x, jnp.asarray(w)))


def test_projections_are_fixed_for_ever_and_look_random():
    # An expert file holds v alone: other numbers here would make every such file mean something else.
    assert seed_of(UP) == 76511860
    pinned = [1.611831545829773, 0.5006825923919678, -1.0685207843780518]
    np.testing.assert_array_equal(projections(seed_of(UP), (3,)), np.asarray(pinned, np.float32))
    seeds = np.array([seed_of(f"model.layers.{i}.mlp.up_proj.weight") for i in range(200)])
    p = np.asarray(projections(seeds, (13, 4, 4))).reshape(200, -1)
    np.testing.assert_array_equal(p[7], np.asarray(projections(seeds[7], (13, 4, 4))).ravel())
    assert abs(p.mean()) < 0.03
    assert p.var() == pytest.approx(1, abs=0.03)
    assert np.abs(p).max() <= 3**0.5
    between = np.corrcoef(p)[np.triu_indices(200, 1)] * 208**0.5  # of 208 numbers each: standard normal if independent
    assert between.std() == pytest.approx(1, abs=0.03)
    assert np.abs(between).max() < 6


def _raw(**changes):
    raw = {"a": np.ones(4), "b": np.ones(3)} | changes
    return {name: x for name, x in raw.items() if x is not None}


@pytest.mark.parametrize(
    ("spelling", "raw", "words"),
    [
        ("linear", _raw(b=None), "raw has no b, which linear trains here; give all 2"),
        ("linear", _raw(c=np.ones(2)), "raw holds c, which is none of the 2"),
        ("linear", _raw(a=np.ones(5)), r"a: raw has shape \[5\], linear needs \[4\]"),
        ("core:r=2", _raw(), r"a: raw has shape \[4\], core:r=2 needs \[2, 2\]"),
        ("projected:n=3,r=2", _raw(), "raw has no shared, which projected:n=3,r=2 trains"),
        ("projected:n=3,r=2", {SHARED: np.ones(4)}, r"shared: raw has shape \[4\]"),
    ],
)
def test_raw_values_that_do_not_fit_are_named_before_anything_runs(spelling, raw, words, toy, batch):
    spectra = {name: Spectrum(jnp.ones((5, n)), jnp.ones(n), jnp.ones((n, n))) for name, n in (("a", 4), ("b", 3))}
    settings = dict(model=toy.model, family=family(spelling), cfg=ReinforceConfig())
    with pytest.raises(UserError, match=words) as caught:
        reinforce_loss(raw, spectra, toy.params, batch, **settings)
    assert "\n" not in str(caught.value)


def test_nested_raw_values_that_do_not_fit_are_named_by_their_path(toy, spectra, batch):
    raw = toy.model.nest({name: x for name, x in LINEAR.start(matrix_infos(spectra)).items() if name != UP})
    settings = dict(model=toy.model, family=LINEAR, cfg=ReinforceConfig())
    with pytest.raises(UserError, match="raw has no layers_1/mlp/up_proj/weight"):
        reinforce_loss(raw, toy.model.nest(spectra), toy.params, batch, **settings)


def test_experts_and_middles_that_do_not_fit_are_refused(toy, spectra):
    shared = {SHARED: np.full(7, np.nan)}
    with pytest.raises(UserError, match="shared: raw holds NaN"):
        Expert(shared, "projected:n=7,r=3", weights=(UP,)).z(spectra)
    with pytest.raises(UserError, match="shares its numbers: name the weights"):
        Expert(shared, "projected:n=7,r=3")
    with pytest.raises(UserError, match="names its weights in raw"):
        Expert({UP: np.ones(32)}, "linear", weights=(UP,))
    with pytest.raises(UserError, match=r"x, which is not among the 6 decomposed weights"):
        Expert(shared, "projected:n=7,r=3", weights=("x",)).z(spectra)
    for z, words in (
        (Core(jnp.ones((2, 3))), r"a Core of shape \[2, 3\] does not fit 32"),
        (Core(jnp.ones((33, 33))), "does not fit 32"),
        (Bands(jnp.ones((2, 32))), "a Bands of shape"),
        (Bands(jnp.ones((3, 31))), "does not fit 32"),
        (Core(jnp.full((2, 2), np.nan)), "the Core holds NaN"),
        (jnp.ones(31), "31 entries"),
    ):
        with pytest.raises(UserError, match=words):
            merge(toy, spectra, {UP: z})


def test_another_step_of_the_same_spelling_compiles_nothing(toy, spectra, batch, compilations):
    cfg = TrainConfig(micro_batch=2, remat=False)
    state = init_state(spectra, family("core:r=4"), update_config(cfg))
    nested = toy.model.nest(spectra)
    settings = dict(model=toy.model, loss=ReinforceConfig(), cfg=update_config(cfg))
    changed = dataclasses.replace(batch, completion_ids=(batch.completion_ids + 1) % 32)
    state, _ = train_step(state, nested, toy.params, batch, family=family("core:r=4"), **settings)
    compilations.clear()
    train_step(state, nested, toy.params, changed, family=family("core:r=4"), **settings)
    assert compilations == []
