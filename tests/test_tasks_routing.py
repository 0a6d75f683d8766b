"""Telling tasks apart."""

from collections import Counter

import pytest

import sva.tasks
from sva.utils.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def routing():
    return sva.tasks.task("routing", routes=["last_letter", "product"])


def test_tasks_take_turns_and_other_is_among_them(routing):
    for split in sva.tasks.SPLITS:
        rows = routing.source(split)
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == {"letters", "arithmetic", "other"}
        assert len(set(counts.values())) == 1
        assert rows[0]["question"] == sva.tasks.task("last_letter").source(split)[0]["question"]
        assert rows[-1] == rows[len(rows) - 1]


def test_the_question_lists_every_label(routing):
    row = routing.source("test")[0]
    question = routing.question(row)
    assert row["question"] in question
    assert [label.name for label in routing.labels] == ["letters", "arithmetic", "other"]
    assert all(f"- {label.name}: {label.description}" in question for label in routing.labels)


@pytest.mark.parametrize("completion", ["letters", " Letters.", "**letters**", '"letters"', "letters: it asks for one"])
def test_the_first_word_is_the_answer(routing, completion):
    assert routing.grade(completion, {"question": "q", "label": "letters"})[:2] == (True, "letters")


@pytest.mark.parametrize("completion", ["", "other", "letter", "The category is letters", "arithmetic, letters", "..."])
def test_anything_else_is_wrong(routing, completion):
    assert not routing.grade(completion, {"question": "q", "label": "letters"}).correct


def test_routes_belong_to_routing_alone():
    with pytest.raises(UserError, match="needs some"):
        sva.tasks.task("routing")
    with pytest.raises(UserError, match="no other takes any"):
        sva.tasks.task("product", routes=["sort3"])
    with pytest.raises(UserError, match="no task 'prodct'; did you mean product"):
        sva.tasks.task("routing", routes=["prodct"])
    labels = sva.tasks.task("routing", routes=["product", "opposites"]).labels
    assert [label.name for label in labels] == ["arithmetic", "other"]
