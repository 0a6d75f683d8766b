"""Files of results: resumed by the same settings, locked, and never another's file."""

import json

import pytest

from sva.utils.errors import UserError
from sva.utils.jsonl import read_records, resumed

ROWS = [{"index": 0, "prompt": "ä"}, {"index": 1, "prompt": "b"}]


def test_a_cut_off_last_line_is_dropped_and_the_rest_is_resumed(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    with resumed(path, {"seed": 1}) as file:
        assert file.add(ROWS[0]) == ROWS[0]
    with path.open("a") as raw:
        raw.write('{"index": 1, "pro')
    assert read_records(path) == ({"seed": 1}, ROWS[:1])
    with resumed(path, {"seed": 1}) as file:
        assert file.records == ROWS[:1]
        file.add(ROWS[1])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"settings": {"seed": 1}}, *ROWS]


def test_a_header_that_was_cut_off_is_written_anew(tmp_path):
    path = tmp_path / "a.jsonl"
    for begun in ("", '{"set', '{"settings": {"seed": 1'):
        path.write_text(begun)
        with resumed(path, {"seed": 1}, {"command": "x"}) as file:
            assert file.records == []
        assert json.loads(path.read_text()) == {"settings": {"seed": 1}, "made_with": {"command": "x"}}


def test_a_file_that_an_editor_saved_again_is_resumed(tmp_path):
    path = tmp_path / "a.jsonl"
    with resumed(path, {"seed": 1}) as file:
        file.add(ROWS[0])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    with resumed(path, {"seed": 1}) as file:
        assert file.records == ROWS[:1]
        file.add(ROWS[1])
    assert read_records(path) == ({"seed": 1}, ROWS)


def test_settings_pass_through_json_before_they_are_compared(tmp_path):
    path = tmp_path / "a.jsonl"
    for _ in range(2):
        with resumed(path, {"stop": ("a", "b"), "model": None}):
            pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("mine", "has no settings in its first line"),
        ("mine\n", "line 1 is not JSON"),
        ("[1]\n", "has no settings in its first line"),
        ('{"settings": 3}\n', "has no settings in its first line"),
        ('{"settings": {"seed": 1}}\n7\n', "line 2 is not an object"),
        ('{"settings": {"seed": 1}}\n{"index": 0\n', "line 2 is not JSON"),
        ('{"settings": {"seed": 2}}\n', r"was begun with other settings \(seed: 2 there, 1 asked for\)"),
    ],
)
def test_anothers_file_is_refused_and_left_as_it_is(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message), resumed(path, {"seed": 1}):
        pass
    assert path.read_text() == content


def test_a_second_process_is_told_to_wait(tmp_path):
    path = tmp_path / "a.jsonl"
    again, busy = resumed(path, {}), pytest.raises(UserError, match="another process writes")
    with resumed(path, {}), busy, again:
        pass


def test_a_full_disk_is_one_line(tmp_path):
    with open("/dev/full", "w") as full, resumed(tmp_path / "a.jsonl", {}) as file:
        file.close()
        file._file = full
        with pytest.raises(UserError, match="disk is full"):
            file.add(ROWS[0])
        with pytest.raises(UserError, match="disk is full"):
            file.close()
