"""Whole models behind one router (`sva.ensembles`)."""

import re

import pytest

import sva
from sva.ensembles.compare import as_text, compare
from sva.ensembles.ensemble import bytes_a_token, bytes_held, ensemble, parameters_held
from sva.evaluation.evaluate import evaluate, items
from sva.generation.testing import NameAColour, toy_lm
from sva.utils.errors import UserError

QUESTIONS = ["what colour the apple ?", "name the thing of the green house", "blue ?", "what", "the of the of"]
NEW = 4


@pytest.fixture(scope="module")
def members(toy):
    return {"colour": toy, "thing": toy_lm(seed=1)}


@pytest.fixture(scope="module")
def group(members):
    return ensemble(members)


def _alone(lm, questions):
    model = ensemble({"a": lm, "b": lm}).by("fixed:a")
    return [answer.text for answer in model.answer(questions, NEW)]


def test_every_question_is_answered_by_the_member_that_was_chosen(group, members):
    group = group.by("random", seed=1)
    chosen = [name for name, _ in group.choose(QUESTIONS)]
    assert len(set(chosen)) == 2
    answers = group.answer(QUESTIONS, NEW, rows=2)
    assert [answer.member for answer in answers] == chosen
    for name, lm in members.items():
        own = _alone(lm, QUESTIONS)
        assert [a.text for a in answers if a.member == name] == [
            text for text, member in zip(own, chosen, strict=True) if member == name
        ]
    assert all(0 < answer.prob <= 1 and 0 < answer.tokens <= NEW for answer in answers)


def test_the_oracle_and_a_fixed_router_choose_what_they_are_told(group):
    right = ["thing", "colour", "thing", "nothing here", "colour"]
    assert [name for name, _ in group.by("oracle").choose(QUESTIONS, right)] == [
        "thing", "colour", "thing", "colour", "colour",
    ]  # fmt: skip
    assert {name for name, _ in group.by("fixed:thing").choose(QUESTIONS)} == {"thing"}


def test_a_question_of_no_label_goes_to_the_fallback(members):
    assert {name for name, _ in ensemble(members).by("fixed:other").choose(QUESTIONS)} == {"colour"}
    group = ensemble(members, fallback="thing")
    assert {name for name, _ in group.by("fixed:other").choose(QUESTIONS)} == {"thing"}
    with_other = ensemble({**members, "other": members["colour"]})
    assert {name for name, _ in with_other.by("fixed:other").choose(QUESTIONS)} == {"other"}


def test_what_members_share_is_counted_once(members):
    one, other = members.values()
    size = sum(weight.size for weight in one.stored_params().values())
    assert parameters_held(ensemble(members)) == 2 * size
    assert parameters_held(ensemble({"a": one, "b": one}, other)) == 2 * size
    assert bytes_held(ensemble({"a": one, "b": one})) == 4 * size
    untied = one.stored_params()["model.embed_tokens.weight"].nbytes
    assert bytes_a_token(one) == 4 * size - untied  # the toy's head is a weight of its own


def test_a_comparison_picks_among_answers_that_members_gave_alone(group, members):
    todo = items(NameAColour(), "test", 12)
    found = compare(group.by("fixed:thing"), todo, NEW, rows=4)
    for name, lm in members.items():
        right = [record.correct for record in evaluate(lm, todo, max_new_tokens=NEW, progress=False)]
        assert found["single"][name]["accuracy"]["mean"] == pytest.approx(sum(right) / 12)
    assert found["routed"]["accuracy"] == found["single"]["thing"]["accuracy"]
    assert found["oracle"]["accuracy"] == found["single"]["colour"]["accuracy"]  # the task's label
    assert found["right_member"]["mean"] == 0
    best = found["single"][found["best_single"]]["accuracy"]["mean"]
    gain = found["routed"]["accuracy"]["mean"] - best
    assert found["routed"]["minus_best_single"]["mean"] == pytest.approx(gain)
    assert re.search(r"routed .*%.* MB a token", as_text(found))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: ensemble({"colour": m["colour"]}), "two models or more"),
        (lambda m: ensemble(m, descriptions={"shape": "a shape"}), "no model of the ensemble has the label 'shape'"),
        (lambda m: ensemble(m | {"other": m["colour"]}, descriptions={"other": "x"}), "'other' stands for everything"),
        (lambda m: ensemble(m, fallback="shape"), "no model of the ensemble has the label 'shape'"),
        (lambda m: ensemble(m).by("uniform"), "whole models have none"),
        (lambda m: ensemble(m).by("fixed:shape"), "no expert carries the label 'shape'"),
        (lambda m: ensemble(m).answer([], NEW), "no question to answer"),
    ],
)
def test_what_makes_no_ensemble_is_one_clear_line(members, make, message):
    with pytest.raises(UserError, match=message):
        make(members)


def test_the_api_has_it():
    assert sva.ensemble is ensemble
