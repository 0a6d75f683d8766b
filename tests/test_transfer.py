import numpy as np
import pytest

from sva.spectral.transfer import transfer
from sva.utils.errors import UserError

Z = {"a": np.array([0.5, 1.5, 2.0]), "b": np.array([3.0, 4.0])}


def test_z_moves_by_index_and_lengths_are_cut_or_filled_with_the_base():
    moved = transfer(Z, {"a": 2, "b": 4, "c": 5})
    np.testing.assert_array_equal(moved["a"], np.float32([0.5, 1.5]))
    np.testing.assert_array_equal(moved["b"], np.float32([3, 4, 1, 1]))
    assert moved.keys() == Z.keys()
    same = transfer(Z, {name: len(z) for name, z in Z.items()})
    for name, z in Z.items():
        np.testing.assert_array_equal(same[name], z)
        assert same[name].dtype == np.float32


def test_the_control_keeps_each_vectors_values_and_is_the_seeds_own():
    z = {name: np.linspace(0, 2, 50) for name in "ab"}
    ranks = {"a": 50, "b": 50}
    one, again, other = (transfer(z, ranks, seed) for seed in (1, 1, 2))
    for name in z:
        np.testing.assert_allclose(np.sort(one[name]), z[name].astype("f4"))
        np.testing.assert_array_equal(one[name], again[name])
        assert not np.array_equal(one[name], other[name])
    assert not np.array_equal(one["a"], one["b"])
    alone = transfer({"b": z["b"]}, ranks, 1)  # whatever else the expert holds
    np.testing.assert_array_equal(alone["b"], one["b"])


def test_weights_that_the_other_model_lacks_are_listed():
    with pytest.raises(UserError, match="lacks 1 of the expert's 2 weights: b;"):
        transfer(Z, {"a": 3})
    with pytest.raises(UserError, match="lacks 8 of the expert's 8 weights: w0, w1, w2, w3, w4 and 3 more;"):
        transfer({f"w{i}": np.ones(2) for i in range(8)}, {"a": 3})
