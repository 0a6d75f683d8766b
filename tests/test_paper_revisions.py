"""A tiny cell's results: where these tests fail, a change altered results, and a revision is to be raised."""

import json

import pytest

from experiments.paper import revisions

RAISE = "results changed: raise {} in experiments/paper/revisions.py and run python -m experiments.paper.revisions"


def _expected():
    return json.loads(revisions.EXPECTED.read_text())


def test_expected_results_are_of_the_current_revisions():
    assert {name: _expected()[name] for name in ("training", "grading")} == revisions.CURRENT._asdict()


def test_grading_gives_the_verdicts_of_its_revision():
    assert revisions.tiny_grading() == _expected()["tiny_grading"], RAISE.format("GRADING")


def test_training_comes_to_what_it_did_in_its_revision(tmp_path, monkeypatch):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path))
    found, expected = revisions.tiny_training(), _expected()["tiny_training"]
    assert found.keys() == expected.keys()
    for method, values in expected.items():
        assert found[method] == pytest.approx(values, rel=1e-3, abs=1e-5), f"{method}: {RAISE.format('TRAINING')}"
