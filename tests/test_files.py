import errno
import json

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sva.spectral import store
from sva.spectral.expert import Expert
from sva.utils.errors import UserError
from sva.utils.files import decoded, read_json, read_lines, read_text, save_tensors, write_atomically, write_json


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


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("content", "text", "lines"),
    [
        (b"", "", [""]),
        (MARK, "", [""]),
        (b"a\nb\n", "a\nb\n", ["a", "b", ""]),
        (MARK + b"a\r\nb\r\n", "a\nb\n", ["a", "b", ""]),
        (MARK + "ä\r\n日".encode(), "ä\n日", ["ä", "日"]),
        ("a\u2028b\x0cc\nd".encode(), "a\u2028b\x0cc\nd", ["a\u2028b\x0cc", "d"]),
        (b"a\n" + MARK + b"b", "a\n\ufeffb", ["a", "b"]),  # two files that were joined
    ],
)
def test_text_is_read_without_mark_and_with_one_kind_of_line_end(content, text, lines, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    assert read_text(tmp_path / "a.txt") == decoded(content, "it") == text
    assert read_lines(tmp_path / "a.txt") == lines


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_other_encodings_are_one_line_that_names_file_and_place(encoding, tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": "one"}\n{"ö": 1}', encoding=encoding)
    words = r"is not UTF-8 \(byte \d+\); save the file as UTF-8"
    for read, lead in ((read_text, ""), (read_lines, r", line \d"), (read_json, r" is not valid JSON \(it")):
        with pytest.raises(UserError, match=rf"a\.json{lead} {words}") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_json_that_is_missing_broken_or_no_dictionary_is_one_line(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"a\.json: cannot be read \(No such file"):
        read_json(path)
    for content, words in ((b"{", "not valid JSON"), (MARK + b"[]", "not a list"), (MARK, "not valid JSON")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_json(path)
    path.write_bytes(MARK + b'{"a":\r\n 1}\r\n')
    assert read_json(path) == {"a": 1}
