"""The graders of the benchmarks over realistic completions, each with the verdict of a fair reader (`strict`) and the
one that the public code gave when it was run (`reference`); tests/completions holds them."""

import json
from pathlib import Path

import pytest
from growth import is_linear

import sva.tasks
from sva.tasks import math_hendrycks
from sva.tasks.grading.worker import Worker
from sva.tasks.reference import verdicts

TABLES = Path(__file__).parent / "completions"
ROWS = {
    name: [json.loads(line) for line in (TABLES / f"{name}.jsonl").read_text().splitlines()]
    for name in ("gsm8k", "arc", "math")
}


def example(family, row):
    """The row of a benchmark that a completion of the table answers."""
    if family == "gsm8k":
        return {"question": "?", "answer": f"Some reasoning.\n#### {row['gold']}"}
    if family == "math":
        return {"problem": "?", "solution": f"Some reasoning gives $\\boxed{{{row['gold']}}}$."}
    return {
        "question": "?",
        "choices": {"label": list(row["labels"]), "text": row["options"]},
        "answerKey": row["gold"],
    }


@pytest.mark.parametrize("grader", ["strict", "reference"])
@pytest.mark.parametrize("family", ROWS)
def test_every_completion_gets_the_verdict_that_it_deserves(family, grader):
    task = sva.tasks.task({"arc": "arc_easy"}.get(family, family), grader)
    assert len(ROWS[family]) >= 200
    wrong = [
        (row, grade)
        for row in ROWS[family]
        if (grade := task.grade(row["completion"], example(family, row))).correct != row[grader]
    ]
    assert not wrong


def test_the_tables_hold_what_the_two_graders_differ_in():
    differing = {name: sum(row["strict"] != row["reference"] for row in rows) for name, rows in ROWS.items()}
    assert min(differing.values()) > 20, differing


def test_the_public_codes_faults_are_kept_on_demand():
    task = sva.tasks.task("gsm8k", "reference")
    thousand = {"question": "?", "answer": "#### 1,080"}
    assert task.grade("The answer is 80.", thousand) == (True, "80", "")
    assert not task.grade("The answer is 1080.", thousand).correct
    assert task.grade("It is 5 degrees.", {"question": "?", "answer": "#### -5"}).correct
    assert sva.tasks.task("gsm8k").grade("The answer is 80.", thousand) == (False, "80", "")
    row = {"question": "?", "choices": {"label": list("ABCD"), "text": list("wxyz")}, "answerKey": "A"}
    assert sva.tasks.task("arc_easy", "reference").grade("no idea", row) == (True, None, "right by luck")
    assert [verdicts.lucky(n) for n in (3, 4, 5)] == ["C", "A", "A"]
    assert verdicts.letter("The answer is Because") == "B"
    assert math_hendrycks.reference("The answer is: 25", "0.25").correct


BOMBS = [
    "9^{9^{9^{9}}}",
    "10^{10^{10}}!",
    "\\binom{10^{9}}{10^{8}}",
    "\\left(" * 300,
    "{" * 900,
    "2^{2^{2^{2^{2^{2}}}}}",
    "\\int_0^{10} x^{x^{x^{x}}} dx",
    "__import__('os').system('touch /tmp/x')",
    "sin(\"__import__('os').getcwd()\")",
    "9**9**9**9**9",
    "\x00\x1b[31m\u202e",
]


@pytest.fixture(scope="module")
def judge():
    worker = Worker("math_worker.py", cpu_secs=0.5)
    yield lambda policy, gold, answer: worker.ask({"policy": policy, "gold": gold, "answer": answer})
    worker.close()


@pytest.mark.parametrize("policy", ["strict", "reference"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_no_answer_makes_the_judge_linger_and_it_serves_on(judge, policy, bomb):
    assert not judge(policy, "10", bomb).equal
    assert judge(policy, "10", "5*2" if policy == "reference" else "5 \\cdot 2").equal


def test_an_answer_that_is_given_up_on_says_so(judge):
    verdict = judge("strict", "10", "9^{9^{9^{9}}}")
    assert verdict.note.startswith(("gave up after 0.5 CPU seconds", "unreadable"))
    assert math_hendrycks.compare("strict", "10", "1" * 1_001).note == "unreadable: too long"


@pytest.mark.parametrize("family", ROWS)
@pytest.mark.parametrize("grader", ["strict", "reference"])
@pytest.mark.parametrize(
    "piece", ["x", "1", " ", "\\boxed{", "answer is ", "Answer: ", "A ", "$", "#### ", "\n", "}", "-1,"]
)
def test_grading_takes_time_linear_in_the_completion(family, grader, piece):
    task = sva.tasks.task({"arc": "arc_easy"}.get(family, family), grader)
    row = example(family, ROWS[family][-1])
    assert is_linear(lambda completion: task.grade(completion, row), piece)
    task.grade(piece * (1_000_000 // len(piece)), row)  # a megabyte is graded too


@pytest.mark.parametrize(
    ("family", "completion", "answer"),
    [
        ("gsm8k", "Total: 18 dollars\n\nNote: she ate 3 eggs for breakfast.", "18"),
        ("gsm8k", "Total: 18 dollars\n\nNote: the answer is 3.", "3"),
        ("gsm8k", "Profit = 200000 - 130000 = $70 000", "70000"),
        ("gsm8k", "The distance is 45 miles from home at the end of 4 hours.", "45"),
        ("gsm8k", "She should read 42 pages if she wants to finish half of the remaining 84 pages.", "42"),
        ("gsm8k", "The total cost is $990, which includes the $50 setup fee.", "990"),
        ("gsm8k", "There were 3 boxes with 8 pens each, which makes 24 pens.", "24"),
        ("gsm8k", "He has 2 left; the other 8 he gave to his 4 friends.", "2"),
        ("gsm8k", "Answer - 5600", "5600"),
        ("arc", "I think it's B, not C.", "B"),
        ("arc", "The third option", "C"),
        ("arc", "The fifth option", None),
        ("arc", "Not B.", None),
    ],
)
def test_notes_asides_and_what_is_denied_are_no_answers(family, completion, answer):
    options = ["circulation", "digestion", "reproduction", "respiration"]
    row = {"gold": "B", "labels": "ABCD", "options": options} if family == "arc" else {"gold": "18"}
    task = sva.tasks.task({"arc": "arc_easy"}.get(family, family))
    assert task.grade(completion, example(family, row)).answer == answer
