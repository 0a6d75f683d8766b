"""Which option a completion chooses; completions/arc_values.txt holds denials, numbers for letters and other kinds."""

from itertools import permutations
from pathlib import Path

import pytest

import sva.tasks
from sva.tasks.grading import choices

TABLE = (Path(__file__).parent / "completions" / "arc_values.txt").read_text()
ROWS = [line.split(" | ") for line in TABLE.splitlines() if not line.startswith("#")]
OPTIONS = ("copper", "plastic", "rubber", "glass")


@pytest.mark.parametrize("row", ROWS, ids=" | ".join)
def test_an_option_is_chosen_as_a_fair_reader_would(row):
    *own, labels, gold, completion, verdict = row
    options = own[0].split("; ") if own else list(OPTIONS)
    example = {"question": "?", "choices": {"label": list(labels), "text": options}, "answerKey": gold}
    completion = completion.replace("\\n", "\n")
    assert sva.tasks.task("arc_easy").grade(completion, example).correct == (verdict == "right")


def test_the_table_is_large_and_has_both_verdicts():
    assert len(ROWS) > 190
    assert sum(row[-1] == "wrong" for row in ROWS) > 60


@pytest.mark.parametrize(
    "form",
    [
        "It is not {no}, it is {yes}.",
        "Not {no}. It is {yes}.",
        "The answer is not {no} but {yes}.",
        "{no} is wrong. The answer is {yes}.",
        "The answer isn't {no}, it's {yes}.",
        "The answer is {yes}, not {no}.",
        "Instead of {no}, choose {yes}.",
    ],
)
@pytest.mark.parametrize("labels", ["ABCD", "1234"])
def test_whichever_option_is_denied_the_other_is_chosen(form, labels):
    for no, yes in permutations(range(4), 2):
        for names in (labels, OPTIONS):
            completion = form.format(no=names[no], yes=names[yes])
            assert choices.choice(completion, labels, OPTIONS) == labels[yes], completion


@pytest.mark.parametrize(
    "form", ["{}", "({})", "{}.", "The answer is {}.", "Option {}", "{}) plastic", "\\boxed{{{}}}"]
)
def test_a_letter_stands_for_a_number_by_its_place_and_the_other_way_round(form):
    assert choices.choice(form.format("B"), "1234", OPTIONS) == "2"
    assert choices.choice(form.format("2"), "ABCD", OPTIONS) == "B"
    assert choices.choice(form.format("2"), "ABCD", ("2 cm", "4 cm", "plastic", "glass")) != "B"
