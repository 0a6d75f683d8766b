from sva.evaluation import records

ROWS = [{"correct": True, "prompt": "ä"}, {"correct": False, "prompt": "b"}]


def test_records_that_an_editor_saved_again_are_read_and_gone_on_with(tmp_path):
    path = tmp_path / "a.jsonl"
    with records.opened(path, {"task": "x"}, {}) as file:
        file.append(0, ROWS[0])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    with records.opened(path, {"task": "x"}, {}) as file:
        assert file.rows == {0: {"index": 0, **ROWS[0]}}
        file.append(1, ROWS[1])
    assert records.read(path) == ({"task": "x"}, {place: {"index": place, **row} for place, row in enumerate(ROWS)})
