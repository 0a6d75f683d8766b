import errno
import json

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sva.errors import UserError
from sva.files import save_tensors, write_atomically, write_json
from sva.spectral import store
from sva.spectral.expert import Expert


def _full_disk(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"x": 1})

    def half(temporary):
        temporary.write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_atomically(path, half)
    assert json.loads(path.read_text()) == {"x": 1}
    assert list(path.parent.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        write_json(tmp_path / "file" / "a.json", {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_that_says_what_to_do(number, tmp_path):
    def full(_):
        raise OSError(number, "full")

    with pytest.raises(UserError, match=r"the disk is full: .*MiB free.*SVA_CACHE") as caught:
        write_atomically(tmp_path / "a", full)
    assert "\n" not in str(caught.value)


def test_a_disk_that_fills_under_an_expert_or_a_spectrum_is_the_same_line(tmp_path, monkeypatch):
    monkeypatch.setattr("safetensors.numpy.save_file", _full_disk)
    with pytest.raises(UserError, match="the disk is full"):
        Expert({"a": np.ones(3)}).save(tmp_path / "e.safetensors")
    with pytest.raises(UserError, match="the disk is full"):
        store.decompose({"a": store.Source((3, 3), lambda: np.eye(3))}, "f", tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_arrays_in_any_order_of_memory_come_back_as_they_were(tmp_path):
    given = {
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "steps": np.arange(12.0).reshape(3, 4)[::2, 1:],
    }
    save_tensors(tmp_path / "x.safetensors", given, {})
    found = load_file(tmp_path / "x.safetensors")
    for name, tensor in given.items():
        np.testing.assert_array_equal(found[name], tensor)
