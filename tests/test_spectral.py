import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sva.spectral.expert import Expert
from sva.spectral.forms import Spectrum
from sva.spectral.mixing import bank, mix, mix_rows
from sva.spectral.parametrisations import LINEAR, SIGMOID_NUCLEAR, family
from sva.spectral.svd import svd
from sva.utils.errors import UserError
from sva.utils.trees import nearest, select


def _weight(out, into, rank=None, seed=0):
    rng = np.random.default_rng(seed)
    rank = rank or min(out, into)
    return (rng.standard_normal((out, rank)) @ rng.standard_normal((rank, into))).astype(np.float32)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_gradient_of_sigmoid_nuclear_equals_finite_differences(shape):
    w = _weight(*shape)
    s = jnp.asarray(svd(w).s)
    rng = np.random.default_rng(0)
    raw, direction, g = (rng.standard_normal(5) for _ in range(3))

    def value(raw):  # in float64, by the formula
        gate = 1 / (1 + np.exp(-raw))
        total = np.asarray(s, np.float64)
        return (g * gate * total.sum() / (total * gate).sum()).sum()

    slope = jax.grad(lambda raw: jnp.sum(jnp.asarray(g, jnp.float32) * SIGMOID_NUCLEAR.matrix_z(raw, s)))(
        jnp.asarray(raw, jnp.float32)
    )
    numeric = (value(raw + 1e-5 * direction) - value(raw - 1e-5 * direction)) / 2e-5
    assert float(slope @ direction) == pytest.approx(numeric, rel=1e-4)
    # Along "all of p" at a constant p nothing changes.
    flat = jax.grad(lambda raw: jnp.sum(jnp.asarray(g, jnp.float32) * SIGMOID_NUCLEAR.matrix_z(raw, s)))(
        jnp.full(5, 0.1)
    )
    assert abs(float(flat.sum())) < 1e-5 * float(jnp.abs(flat).sum())


def test_a_matrix_of_zeros_keeps_z_and_its_gradient_finite():
    z, slope = jax.value_and_grad(lambda raw: jnp.sum(SIGMOID_NUCLEAR.matrix_z(raw, jnp.zeros(4))))(jnp.full(4, 0.1))
    assert np.isfinite(z)
    assert np.isfinite(slope).all()


def test_constant_p_and_unit_z_are_the_identity():
    s = jnp.asarray(np.linspace(3, 0.01, 50), jnp.float32)
    np.testing.assert_array_equal(LINEAR.matrix_z(LINEAR.init(s), s), np.ones(50, np.float32))
    for p in (-2.0, 0.1, 3.0):
        assert np.abs(SIGMOID_NUCLEAR.matrix_z(jnp.full(50, p), s) - 1).max() < 1e-5
    z = SIGMOID_NUCLEAR.matrix_z(jnp.asarray(np.random.default_rng(0).standard_normal(50), jnp.float32), s)
    assert float(jnp.sum(s * z)) == pytest.approx(float(jnp.sum(s)), rel=1e-5)
    with pytest.raises(UserError, match="linear, sigmoid_nuclear"):
        family("sigmoid")


def test_mixture_stands_around_the_base():
    zs = [{"a": jnp.asarray([2.0, 1.0])}, {"a": jnp.asarray([1.0, 3.0]), "b": jnp.asarray([4.0])}]
    mixed = mix(zs, [0.5, 2.0])
    np.testing.assert_allclose(mixed["a"], [1.5, 5.0])
    np.testing.assert_allclose(mixed["b"], [7.0])
    np.testing.assert_allclose(mix(zs, {"a": [1, 0], "b": [0, 0]})["b"], [1.0])
    with pytest.raises(UserError, match="2 alphas"):
        mix(zs, [1.0])


def test_bank_slots_mix_by_row_and_slot_zero_is_the_base():
    spectra = {"a": Spectrum(jnp.ones((2, 2)), jnp.ones(2), jnp.ones((2, 2)))}
    table = bank([{"a": jnp.asarray([2.0, 3.0])}], spectra, 3)
    np.testing.assert_allclose(table["a"], [[1, 1], [2, 3], [1, 1]])
    rows = mix_rows(table["a"], jnp.asarray([[1.0, 0, 0], [0, 1, 0], [0, 0.5, 0]]))
    np.testing.assert_allclose(rows, [[1, 1], [2, 3], [1.5, 2]])
    with pytest.raises(UserError, match="the bank has 1"):
        bank([{}], spectra, 1)


def test_a_z_that_a_bank_or_a_mixture_would_drop_is_refused():
    spectra = {"a": Spectrum(jnp.ones((4, 4)), jnp.ones(4), jnp.ones((4, 4)))}
    with pytest.raises(UserError, match="the expert adapts b, which is not among the 1 decomposed weights"):
        bank([{"a": jnp.ones(4), "b": jnp.ones(4)}], spectra, 3)
    with pytest.raises(UserError, match="a: z has 3 entries, its spectrum has 4"):
        bank([{"a": jnp.ones(3)}], spectra, 3)
    with pytest.raises(UserError, match="b: an expert adapts it"):
        mix([{"a": jnp.ones(4), "b": jnp.ones(4)}], {"a": [1.0]})


def test_an_experts_digest_follows_its_numbers_and_not_its_metadata():
    one = Expert({"a": np.arange(3.0), "b": np.ones(2)}, "linear", {"task": "x"})
    assert one.digest == Expert({"b": np.ones(2), "a": np.arange(3.0)}, "linear").digest
    others = [Expert({"a": np.arange(3.0), "b": np.zeros(2)}, "linear"), Expert(one.raw, "sigmoid_nuclear")]
    assert len({one.digest, *(other.digest for other in others)}) == 3


def test_expert_file_round_trips_and_refuses_another_base(tmp_path):
    path = tmp_path / "e.safetensors"
    Expert({"a": np.arange(3.0)}, "sigmoid_nuclear", {"fingerprint": "f" * 64, "base": "mine"}).save(path)
    expert = Expert.load(path, fingerprint="f" * 64)
    np.testing.assert_array_equal(expert.raw["a"], np.arange(3.0))
    assert expert.parametrisation == "sigmoid_nuclear"
    with pytest.raises(UserError, match=r"mine .* not on yours"):
        Expert.load(path, fingerprint="0" * 64, base="yours")
    assert Expert.load(path, fingerprint="0" * 64, transfer=True).raw.keys() == {"a"}
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(UserError, match="damaged"):
        Expert.load(path)
    path.write_bytes(whole.replace(b"sigmoid_nuclear", b"sigmoid_nucleus"))
    with pytest.raises(UserError, match="unknown parametrisation 'sigmoid_nucleus'"):
        Expert.load(path)
    save_file({"a": np.ones(2, np.float32)}, path)
    with pytest.raises(UserError, match="no sva expert"):
        Expert.load(path)
    with pytest.raises(UserError, match="no expert file"):
        Expert.load(tmp_path / "none.safetensors")


def test_expert_that_does_not_fit_is_refused():
    spectra = {"a": Spectrum(jnp.ones((2, 2)), jnp.ones(2), jnp.ones((2, 2)))}
    for raw, reason in (
        ({"b": [1.0]}, "not among"),
        ({"a": [1.0]}, "a: raw has shape .1., linear needs .2."),
        ({"a": [[1.0, 1.0]]}, "shape .1, 2., linear needs .2."),
        ({"a": [1.0, np.nan]}, "NaN"),
        ({"a": [1.0, np.inf]}, "NaN or infinite"),
    ):
        with pytest.raises(UserError, match=reason):
            Expert({name: np.asarray(x) for name, x in raw.items()}).z(spectra)


def test_targets_select_or_say_why_not():
    parts = ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj", "input_layernorm")
    names = [f"model.layers.{i}.{part}.weight" for i in range(2) for part in parts]
    assert len(select(names, "mlp")) == 4
    assert len(select(names, "attention")) == 2
    assert select(names, r"layers\.1\.mlp\.up") == ["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match="matches no weight"):
        select(names, "mpl")
    with pytest.raises(UserError, match="regular expression"):
        select(names, "(")


def test_a_misspelt_name_gets_its_nearest_or_all():
    assert nearest("stepz", ["steps", "lr", "seed"]) == " (did you mean steps?)"
    assert nearest("xyz", ["steps", "lr"]) == " (known: lr, steps)"


@pytest.mark.parametrize("alphas", [np.zeros(3), np.zeros((2, 4)), np.zeros((1, 2, 3))], ids=["a row", "slots", "rank"])
def test_alphas_of_another_shape_are_refused_by_name_of_the_check(alphas):
    with pytest.raises(AssertionError, match="assert_"):
        mix_rows(jnp.ones((3, 5)), jnp.asarray(alphas))
