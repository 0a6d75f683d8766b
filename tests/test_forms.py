"""The forms of one linear layer, and the protocol that other adapters join by."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sva
from sva.adapters.ia3 import Outputs
from sva.adapters.lora import Directed, LowRank
from sva.generation import chat
from sva.generation.merge import adapted, factored, merge_params
from sva.generation.testing import toy_lm
from sva.models.transformer import logits
from sva.models.weights import expected
from sva.spectral.cost import cheapest, multiply_adds
from sva.spectral.forms import Delta, Factored, Spectrum, delta, merge
from sva.spectral.svd import svd
from sva.utils.errors import UserError
from sva.utils.matmul import dot
from sva.utils.trees import select

BOUND = 1e-4
SHAPES = {"tall": (13, 7), "wide": (7, 13), "square": (9, 9)}


def _random(out, into, seed=0):
    return np.random.default_rng(seed).standard_normal((out, into))


def _deficient(out, into, seed):
    rank = max(1, min(out, into) // 2)
    return _random(out, rank, seed) @ _random(rank, into, seed + 1)


def _repeated(out, into, seed):
    u, s, vt = np.linalg.svd(_random(out, into, seed), full_matrices=False)
    return (u * np.where(np.arange(len(s)) < len(s) // 2, 3.0, 1.0)) @ vt


WEIGHTS = {
    "random": _random,
    "rank-deficient": _deficient,
    "repeated singular values": _repeated,
    "zeros": lambda out, into, seed: np.zeros((out, into)),
}


def _layer(w, dtype=jnp.float32):
    """(w, spectrum) as a layer holds them."""
    w = jnp.asarray(w, dtype)
    u, s, vt = svd(np.asarray(w, np.float32))
    return w, Spectrum(jnp.asarray(u, dtype), jnp.asarray(s), jnp.asarray(vt, dtype))


def _close(found, expected):
    """Largest error over largest value."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(found - expected).max() <= BOUND * np.abs(expected).max()


def _close_gradients(found, expected):
    """L2; a gradient that cancels to next to nothing is held to what its terms were, about 1."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.linalg.norm(found - expected) <= BOUND * max(np.linalg.norm(expected), 1e-2)


FORMS = {
    "dense": lambda x, w, spectrum, z: dot(x, merge(spectrum, z)),
    "dense on w": lambda x, w, spectrum, z: dot(x, merge(spectrum, z, w)),
    "factored": lambda x, w, spectrum, z: Factored(spectrum, z)(x, w),
    "delta": lambda x, w, spectrum, z: delta(spectrum, z)(x, w),
    "factored by row": lambda x, w, spectrum, z: Factored(spectrum, _by_row(x, z))(x, w),
    "delta by row": lambda x, w, spectrum, z: delta(spectrum, _by_row(x, z))(x, w),
    "all components": lambda x, w, spectrum, z: delta(spectrum, z, np.arange(z.shape[-1])[::-1])(x, w),
}


def _by_row(x, z):
    return jnp.broadcast_to(z, (x.shape[0], z.shape[0]))


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(sorted(WEIGHTS)),
    out=st.sampled_from([1, 3, 8, 13]),
    into=st.sampled_from([1, 3, 8, 13]),
    seed=st.integers(0, 999),
)
def test_all_forms_agree_in_value_and_gradient(kind, out, into, seed):
    w, spectrum = _layer(WEIGHTS[kind](out, into, seed))
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((3, 2, into)), jnp.float32)
    g = jnp.asarray(rng.standard_normal((3, 2, out)), jnp.float32)
    z = jnp.asarray(rng.uniform(0.3, 1.7, spectrum.s.shape), jnp.float32)

    def loss(z, form):
        y = form(x, w, spectrum, z)
        return jnp.sum(y * g), y

    slopes, values = {}, {}
    for name, form in FORMS.items():
        slopes[name], values[name] = jax.grad(loss, has_aux=True)(z, form)
        _close(values[name], values["dense"])
        _close_gradients(slopes[name], slopes["dense"])
    # The dense form itself, and its gradient by the formula, in float64.
    u, s, vt = (np.asarray(part, np.float64) for part in spectrum)
    x64, g64 = np.asarray(x, np.float64), np.asarray(g, np.float64)
    _close(values["dense"], x64 @ ((u * (s * np.asarray(z))) @ vt).T)
    _close_gradients(slopes["dense"], s * np.einsum("BTR,BTR->R", x64 @ vt.T, g64 @ u))


@settings(max_examples=10, deadline=None)
@given(kind=st.sampled_from(sorted(WEIGHTS)), shape=st.sampled_from(sorted(SHAPES)), seed=st.integers(0, 999))
def test_a_z_per_row_equals_one_row_at_a_time(kind, shape, seed):
    w, spectrum = _layer(WEIGHTS[kind](*SHAPES[shape], seed))
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((3, 4, w.shape[1])), jnp.float32)
    z = jnp.asarray(rng.uniform(0.3, 1.7, (3, len(spectrum.s))), jnp.float32).at[0].set(1)
    for form in (lambda z: Factored(spectrum, z), lambda z: delta(spectrum, z)):
        rows = form(z)(x, w)
        for i in range(3):
            _close(rows[i], form(z[i])(x[i : i + 1], w)[0])
    np.testing.assert_array_equal(delta(spectrum, z)(x, w)[0], dot(x, w)[0])


def _arrays(jaxpr):
    """Shapes of everything that a jaxpr and those inside it compute."""
    for eqn in jaxpr.eqns:
        yield from (var.aval.shape for var in eqn.outvars)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _arrays(inner)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rows", [False, True])
def test_factored_forms_nothing_of_the_weights_shape_forwards_or_backwards(shape, rows):
    w, spectrum = _layer(_random(*shape))
    x = jnp.ones((2, 3, shape[1]))

    def computed(form):
        def loss(x, z):
            return jnp.sum(form(x, z) ** 2)

        z = jnp.ones((2, len(spectrum.s))) if rows else jnp.ones(len(spectrum.s))
        return set(_arrays(jax.make_jaxpr(jax.jit(jax.grad(loss, (0, 1))))(x, z).jaxpr))

    weights = {shape, shape[::-1]}
    assert not weights & computed(lambda x, z: Factored(spectrum, z)(x, w))
    assert not weights & computed(lambda x, z: delta(spectrum, z)(x, w))
    if not rows:  # what is looked for can be found
        assert weights & computed(lambda x, z: dot(x, merge(spectrum, z)))


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.long)], ids=["unrolled", "scanned"])
def setting(request, toy):
    """(lm, spectra, z a matrix, ids, mask)"""
    lm = toy_lm(scan_layers=request.param)
    spectra = sva.decompose(lm, "all", progress=False)
    rng = np.random.default_rng(0)
    z = {name: jnp.asarray(rng.uniform(0.5, 1.5, len(x.s)), jnp.float32) for name, x in spectra.items()}
    ids, mask = rng.integers(0, 32, (3, 6)), np.ones((3, 6), int)
    mask[1, :2] = 0
    return lm, spectra, z, ids, mask


def _model_forms(lm, spectra):
    """{form: z -> (params, adapter)} of the whole model."""
    each = lambda z: {name: jnp.broadcast_to(x, (3, len(x))) for name, x in z.items()}  # noqa: E731
    deltas = lambda z: {name: delta(spectra[name], x) for name, x in z.items()}  # noqa: E731
    return {
        "dense": lambda z: (merge_params(lm.model, lm.params, spectra, z), None),
        "factored": lambda z: (lm.params, factored(spectra, z)),
        "delta": lambda z: (lm.params, deltas(z)),
        "factored by row": lambda z: (lm.params, factored(spectra, each(z))),
        "delta by row": lambda z: (lm.params, deltas(each(z))),
    }


def _check_model(lm, spectra, z, ids, mask):
    """Logits, and every matrix's gradient of the tokens' log-probability, agree between all forms of a model."""
    keep = mask[:, :, None] > 0

    def loss(z, form):
        params, adapter = form(z)
        found = jnp.where(keep, logits(lm.model, params, ids, mask, adapter), 0)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(found[:, :-1]), ids[:, 1:, None], axis=-1)
        return jnp.sum(chosen * keep[:, :-1]), found

    slopes, values = {}, {}
    for name, form in _model_forms(lm, spectra).items():
        slopes[name], values[name] = jax.grad(loss, has_aux=True)(z, form)
        _close(values[name], values["dense"])
        for matrix, slope in slopes[name].items():
            reference = np.asarray(slopes["dense"][matrix])
            assert np.linalg.norm(slope - reference) <= BOUND * np.linalg.norm(reference)
    assert np.abs(values["dense"] - np.where(keep, lm.logits(ids, mask), 0)).max() > 0.1


def test_all_forms_agree_on_a_model(setting):
    _check_model(*setting)


def test_a_model_with_a_z_per_row_is_each_row_alone(setting):
    lm, spectra, z, ids, mask = setting
    zs = [z, {name: jnp.ones_like(x) for name, x in z.items()}, {name: x[::-1] for name, x in z.items()}]
    each = {name: jnp.stack([one[name] for one in zs]) for name in z}
    deltas = {name: delta(spectra[name], x) for name, x in each.items()}
    for adapter in (factored(spectra, each), deltas):
        together = np.asarray(logits(lm.model, lm.params, ids, mask, adapter))
        for row, one in enumerate(zs):
            alone = np.asarray(lm.logits(ids[row : row + 1], mask[row : row + 1], one))[0]
            keep = mask[row] > 0
            _close(together[row][keep], alone[keep])
    np.testing.assert_array_equal(together[1], lm.logits(ids, mask)[1])  # delta: a base row is the base


@pytest.mark.long  # five gradients of a real model to compile, and 90 matrices to decompose the first time
def test_all_forms_agree_on_smollm2():
    try:
        lm = sva.load("smollm2-135m-instruct-q4_1", scan_layers=True, progress=False)  # one layer to compile
    except UserError as error:
        pytest.skip(f"the model is not here: {error}")
    spectra = sva.decompose(lm, "mlp", progress=False)
    rng = np.random.default_rng(0)
    z = {name: jnp.asarray(rng.uniform(0.9, 1.1, len(x.s)), jnp.float32) for name, x in spectra.items()}
    texts = [
        "The capital of France is Paris, and the capital of Italy is Rome, where the river is the Tiber.",
        "Water boils at one hundred degrees and freezes at zero.",
        "If you add two and three you get five; if you take one away, four remain.",
    ]
    _check_model(lm, spectra, z, *chat.encode(lm, texts))


def _relative(found, exact):
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    return np.linalg.norm(found - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("shape", [(256, 96), (96, 256), (128, 128)])
def test_bfloat16_errors_are_those_that_the_docstrings_state(shape):
    w, spectrum = _layer(_random(*shape) / 16, jnp.bfloat16)
    u, s, vt = (np.asarray(part, np.float64) for part in svd(np.asarray(w, np.float32)))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((4, 8, shape[1])), jnp.bfloat16)
    g = rng.standard_normal((4, 8, shape[0]))
    x64 = np.asarray(x, np.float64)
    ones = jnp.ones(len(s))
    np.testing.assert_array_equal(delta(spectrum, ones)(x, w), dot(x, w))
    np.testing.assert_array_equal(merge(spectrum, ones, w), w)
    assert 2e-3 < _relative(merge(spectrum, ones), w) < 4e-3
    z = jnp.asarray(rng.uniform(0.5, 1.5, len(s)), jnp.float32)
    exact = (u * (s * np.asarray(z))) @ vt
    assert 2e-3 < _relative(merge(spectrum, z), exact) < 4e-3
    assert 1e-3 < _relative(merge(spectrum, z, w), exact) < 2.5e-3
    assert 3e-3 < _relative(Factored(spectrum, z)(x, w), x64 @ exact.T) < 5e-3
    assert 1e-3 < _relative(delta(spectrum, z)(x, w), x64 @ exact.T) < 3.5e-3
    slope = s * np.einsum("BTR,BTR->R", x64 @ vt.T, g @ u)
    for form in (Factored, delta):
        grad = jax.grad(lambda z, form=form: jnp.sum(form(spectrum, z)(x, w).astype(jnp.float32) * g))(z)
        assert grad.dtype == jnp.float32
        assert 1e-3 < _relative(grad, slope) < 1e-2


def test_a_bfloat16_model_is_its_base_where_z_is_one():
    lm = toy_lm(dtype="bfloat16")
    spectra = sva.decompose(lm, "all", progress=False)
    ids, mask = np.arange(12).reshape(2, 6), np.ones((2, 6), int)
    z = {name: jnp.stack([jnp.ones(len(x.s)), jnp.linspace(0.5, 1.5, len(x.s))]) for name, x in spectra.items()}
    base = np.asarray(lm.logits(ids, mask))
    rows = logits(lm.model, lm.params, ids, mask, {name: delta(spectra[name], x) for name, x in z.items()})
    np.testing.assert_array_equal(rows[0], base[0])
    ones = {name: x[0] for name, x in z.items()}
    np.testing.assert_array_equal(sva.merge(lm, spectra, ones).logits(ids, mask), base)
    assert 1e-3 < np.abs(lm.logits(ids, mask, ones) - base).max() / np.abs(base).max() < 0.1  # factored is only near


def test_multiply_adds_are_those_of_the_products():
    for shape in SHAPES.values():
        w, spectrum = _layer(_random(*shape))
        z = jnp.ones(len(spectrum.s))
        forms = {
            ("dense", None): lambda x, w=w: dot(x, w),
            ("factored", None): lambda x, w=w, z=z, spectrum=spectrum: Factored(spectrum, z)(x, w),
            ("delta", 3): lambda x, w=w, z=z, spectrum=spectrum: delta(spectrum, z, np.arange(3))(x, w),
        }
        for (form, k), run in forms.items():
            eqns = jax.make_jaxpr(run)(jnp.ones((1, 1, shape[1]))).jaxpr.eqns
            products = [eqn for eqn in eqns if eqn.primitive.name == "dot_general"]
            count = sum(eqn.invars[0].aval.size * eqn.invars[1].aval.size // _summed(eqn) for eqn in products)
            scales = len(spectrum.s) if form == "factored" else k or 0
            assert multiply_adds(spectrum, form, k) == count + scales


def _summed(eqn):
    """Length of the contracted axis."""
    return eqn.invars[0].aval.shape[eqn.params["dimension_numbers"][0][0][0]]


def _abstract(out, into, rank=None):
    rank = rank or min(out, into)
    return Spectrum(*(jax.ShapeDtypeStruct(x, jnp.float32) for x in ((out, rank), (rank,), (rank, into))))


@pytest.mark.parametrize(
    ("shape", "use", "about", "form"),
    [
        ((4096, 4096), "train", {}, "factored"),
        ((14336, 4096), "train", {}, "factored"),
        ((14336, 4096), "train", {"moved": 512}, "delta"),
        ((4096, 4096), "rows", {"moved": 2040}, "delta"),  # half of R, for a square matrix
        ((4096, 4096), "rows", {"moved": 2056}, "factored"),
        ((4096, 14336), "rows", {"moved": 904}, "delta"),  # 4096^2 / (4096 + 14336) = 910
        ((4096, 14336), "rows", {"moved": 920}, "factored"),
        ((576, 1536), "one", {}, "dense"),
        ((576, 1536), "one", {"tokens": 1600}, "dense"),  # more than the larger side
        ((576, 1536), "one", {"tokens": 1500}, "factored"),
        ((576, 1536), "one", {"tokens": 1500, "moved": 8}, "delta"),
        ((576, 1536), "exact_base", {}, "delta"),
    ],
)
def test_the_cheapest_exact_form_follows_shape_and_use(shape, use, about, form):
    assert cheapest(_abstract(*shape), use, **about) == form


def test_a_truncated_spectrum_never_runs_factored():
    assert cheapest(_abstract(64, 64, 8), "rows") == "delta"
    assert cheapest(_abstract(64, 64, 8), "one", tokens=1) == "delta"


def test_adapters_take_the_cheapest_form_matrix_by_matrix(setting):
    lm, spectra, z, ids, _ = setting
    up, down = (f"model.layers.{{}}.mlp.{kind}_proj.weight" for kind in ("up", "down"))
    mixed = {up.format(i): z[up.format(i)] for i in range(2)} | {
        down.format(i): jnp.tile(z[down.format(i)], (3, 1)) for i in range(2)
    }
    params, adapter = adapted(lm, spectra, mixed)
    assert set(adapter) == {down.format(0), down.format(1)}
    assert all(isinstance(form, Factored) for form in adapter.values())
    mask = np.ones_like(ids)
    expected = sva.merge(lm, spectra, {name: z[name] for name in mixed}).logits(ids, mask)
    _close(logits(lm.model, params, ids, mask, adapter), expected)
    few, rest = adapted(lm, spectra, {name: z[name] for name in mixed}, tokens=ids.size)
    assert few is lm.params
    assert set(rest) == set(mixed)


def _peers(shape, rng):
    draw = lambda *shape: jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32)  # noqa: E731
    low_rank = (draw(4, shape[1]), draw(shape[0], 4), 2.0)
    return {
        "LoRA": LowRank(*low_rank),
        "IA3": Outputs(1 + draw(shape[0])),
        "DoRA": Directed(*low_rank, magnitude=1 + draw(shape[0])),
    }


@pytest.mark.parametrize("peer", ["LoRA", "IA3", "DoRA"])
def test_another_method_joins_without_the_models_knowledge(setting, peer):
    lm, _, _, ids, mask = setting
    names = {"LoRA": "attention", "IA3": r"(k_proj|v_proj|down_proj)", "DoRA": "attention_full"}[peer]
    weights, rng = lm.named_params(), np.random.default_rng(3)
    adapter = {name: _peers(weights[name].shape, rng)[peer] for name in select(expected(lm.model.cfg), names)}
    merged = lm.model.nest(weights | {name: one.merge(weights[name]) for name, one in adapter.items()})
    keep = mask > 0
    found = np.asarray(logits(lm.model, lm.params, ids, mask, adapter))
    _close(found[keep], np.asarray(logits(lm.model, merged, ids, mask))[keep])
    assert np.abs(found - lm.logits(ids, mask))[keep].max() > 0.1
    grads = jax.grad(lambda adapter: jnp.mean(jnp.square(logits(lm.model, lm.params, ids, mask, adapter))))(adapter)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    # Beside an adapter of another kind.
    gate = [name for name in select(weights, "mlp") if "gate" in name]
    both = adapter | {name: Delta(jnp.zeros((48, 0)), jnp.zeros((0, 32)), jnp.zeros(0)) for name in gate}
    np.testing.assert_array_equal(logits(lm.model, lm.params, ids, mask, both), found)
