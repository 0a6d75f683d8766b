import sys
import types

import pytest

from sva.training.tracking import wandb
from sva.utils.errors import UserError


class Run:
    def __init__(self, **settings):
        self.settings, self.rows, self.is_finished = settings, [], False

    def log(self, row, step):
        self.rows.append((step, row))

    def finish(self):
        self.is_finished = True


def test_without_a_project_nothing_is_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for nothing in (None, "", False):
        with wandb(nothing, tmp_path, {}) as sink:
            sink({"step": 0})


def test_rows_go_to_a_run_that_a_resumed_one_finds_again(tmp_path, monkeypatch):
    runs = []

    def init(**settings):
        runs.append(Run(**settings))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for step in range(2):
        with wandb("mine", tmp_path / "a", {"seed": 3}) as sink:
            sink({"step": step, "reward": 0.5})
    assert runs[0].rows == [(0, {"step": 0, "reward": 0.5})]
    assert all(run.is_finished for run in runs)
    assert runs[0].settings["id"] == runs[1].settings["id"]
    assert (runs[0].settings["project"], runs[0].settings["config"]) == ("mine", {"seed": 3})


def test_what_is_missing_or_refused_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="not installed"), wandb("mine", tmp_path, {}):
        pass
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: [][0]))
    with pytest.raises(UserError, match="wandb login") as caught, wandb("mine", tmp_path, {}):
        pass
    assert "\n" not in str(caught.value)
