import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from served import toy_expert

from sva.generation.testing import toy_lm
from sva.models.weights import expected, path_of
from sva.serving.bank import Bank, BankFull, NoExpert, check_name
from sva.utils.errors import UserError
from sva.utils.trees import select


def _bank(lm, experts=3):
    return Bank(lm, "toy", tuple(select(expected(lm.model.cfg), "mlp")), experts, progress=False)


def _put(bank, name, seed):
    return bank.put(name, bank.effective(toy_expert(bank._lm, seed)), "", {"label": "x"})


@pytest.mark.parametrize("scan", [False, True])
def test_an_expert_is_in_its_slot_and_nowhere_else(scan, tmp_path, monkeypatch):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path))
    lm = toy_lm(scan_layers=scan)
    bank = _bank(lm)
    entry = _put(bank, "a", 1)
    for name, z in entry.z.items():
        path, layer = path_of(name, scan)
        table = np.asarray(flatten_dict(bank.tree)[path].z)
        table = table if layer is None else table[layer]
        np.testing.assert_array_equal(table[entry.slot], z)
        assert (np.delete(table, entry.slot, axis=0) == 1).all()


def test_another_expert_changes_no_shape(toy):
    bank = _bank(toy)
    before = jax.tree.map(np.shape, bank.tree)
    version = bank.version
    _put(bank, "a", 1)
    _put(bank, "a", 2)
    bank.drop("a")
    assert jax.tree.map(np.shape, bank.tree) == before
    assert bank.version == version + 3


def test_a_slot_in_use_is_not_given_away(toy):
    bank = _bank(toy)
    first = _put(bank, "a", 1)
    held = bank.hold({"a": 0.5})
    assert held.alphas[first.slot] == 0.5
    bank.drop("a")
    others = [_put(bank, name, 2) for name in ("b", "c")]
    assert first.slot not in {entry.slot for entry in others}
    with pytest.raises(BankFull, match="all 3 slots"):
        _put(bank, "d", 3)
    bank.release(held)
    assert _put(bank, "d", 3).slot == first.slot


def test_replacing_leaves_answers_at_work_their_expert(toy):
    bank = _bank(toy)
    old = _put(bank, "a", 1)
    held = bank.hold({"a": 1.0})
    new = _put(bank, "a", 2)
    assert new.slot != old.slot
    assert bank.hold({"a": 1.0}).slots == (new.slot,)
    assert held.slots == (old.slot,)


def test_several_mixtures_are_held_all_or_none(toy):
    bank = _bank(toy)
    entry = _put(bank, "a", 1)
    with pytest.raises(NoExpert, match="no expert 'b' is loaded; there is a"):
        bank.hold_all([{"a": 1.0}, {"b": 1.0}])
    assert bank.uses(entry) == 0
    held = bank.hold_all([{"a": 1.0}, {}, {"a": 0.0}])
    assert [each.slots for each in held] == [(entry.slot,), (), ()]


def test_a_mixture_is_around_the_base(toy):
    bank = _bank(toy)
    one, other = _put(bank, "a", 1), _put(bank, "b", 2)
    mixed = bank.mixed({"a": 0.25, "b": 0.5})
    for name, z in mixed.items():
        np.testing.assert_allclose(z, 1 + 0.25 * (one.z[name] - 1) + 0.5 * (other.z[name] - 1), atol=1e-6)
        s, same = bank.spectrum(name, {"a": 0.25, "b": 0.5})
        np.testing.assert_allclose(same, z, atol=1e-6)
        np.testing.assert_array_equal(s, toy.spectra[name].s)


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "a\\b", "a..b", "-a", ".a", "a b", "a\0", "é", "x" * 65, "toy", "base", "adaptive"]
)
def test_names_that_are_paths_or_taken_are_refused(name):
    with pytest.raises(UserError, match="name"):
        check_name(name, "toy")


def test_names_that_files_have_are_fine():
    for name in ("a", "capitals-2", "list_last", "v1.2", "A" * 64):
        check_name(name, "toy")
