"""Progress: a bar on a terminal, plain lines in a log."""

import io
import sys

import pytest

from sva.utils import progress
from sva.utils.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_half_minute_and_one_at_the_end(clock, capsys):
    with progress_bar("train colours", 100, "step") as bar:
        for _ in range(100):
            clock[0] += 1
            bar.set_postfix_str("reward +0.50")
            bar.update()
    assert capsys.readouterr().err.splitlines() == [
        "sva: train colours: 30 of 100 steps after 0:30, about 1:10 left, reward +0.50",
        "sva: train colours: 60 of 100 steps after 1:00, about 0:40 left, reward +0.50",
        "sva: train colours: 90 of 100 steps after 1:30, about 0:10 left, reward +0.50",
        "sva: train colours: 100 of 100 steps after 1:40, reward +0.50",
    ]


def test_what_an_earlier_run_did_does_not_shorten_the_time_that_is_left(clock, capsys):
    with progress_bar("adapt", 10, "generation", initial=8) as bar:
        clock[0] += 60
        bar.update()
        assert capsys.readouterr().err == "sva: adapt: 9 of 10 generations after 1:00, about 1:00 left\n"


def test_bytes_are_written_short(clock, capsys):
    with progress_bar("fetch", 98_400_000, "B", scale=True) as bar:
        clock[0] += 4000
        bar.update(98_400_000)
    assert capsys.readouterr().err.splitlines()[-1] == "sva: fetch: 98.4M of 98.4M B after 1:06:40"


@pytest.mark.parametrize("how", [{"leave": False}, {"hidden": True}])
def test_a_short_or_hidden_job_leaves_no_line(how, capsys):
    with progress_bar("load", 3, "weight", **how) as bar:
        bar.update(3)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar("load", 3, "weight") as bar:
        bar.update(3)
    assert "\r" in screen.getvalue()
    assert "3/3" in screen.getvalue()
