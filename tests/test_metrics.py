import errno
import json

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sva.training.metrics import MetricsLog, read
from sva.utils.errors import UserError


def test_a_resumed_log_drops_what_comes_after_its_step_and_goes_on(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in range(4):
        log.write({"step": step, "reward": step / 2, "note": "x"})
    log.close()
    log = MetricsLog(tmp_path, 2)
    log.write({"step": 2, "reward": 9.0})
    log.close()
    assert [(row["step"], row["reward"]) for row in read(tmp_path / "metrics.jsonl")] == [(0, 0), (1, 0.5), (2, 9)]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read(path) == []
    path.write_text(json.dumps({"step": 0}) + '\n{"step": 1, "rew')
    assert read(path) == [{"step": 0}]


def test_events_are_those_of_the_rows_and_tensorboard_is_told_where_a_run_went_on(tmp_path):
    log = MetricsLog(tmp_path, 5)
    log.write({"step": 5, "reward": 0.25, "note": "x"})
    log.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:  # a record is its length (8 bytes), a check (4), the event, a check (4)
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert [event.step for event in events] == [0, 5, 5]
    assert events[1].session_log.status == SessionLog.START
    assert [(value.tag, value.simple_value) for value in events[2].summary.value] == [("reward", 0.25)]


def test_a_full_disk_is_one_line_and_closing_adds_none(tmp_path, monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    log = MetricsLog(tmp_path, 0)
    monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.flush", full)
    with pytest.raises(UserError, match="the disk is full"):
        log.write({"step": 0})
    log.close()
    monkeypatch.undo()
    log._board.close()


def test_a_byte_order_mark_hides_no_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"step": 0}\r\n{"step": 1}\r\n')
    assert read(path) == [{"step": 0}, {"step": 1}]
