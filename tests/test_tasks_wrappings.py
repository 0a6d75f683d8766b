"""Thinking and answer tags around answers of every kind."""

import pytest
from growth import is_linear

import sva.tasks
from sva.tasks import code, jsonl, reasoning
from sva.tasks.grading.wrappings import unwrapped

LONG = "<think>\n" + "Let me see. " * 200 + "\n</think>\n\n"
CASE = [  # grader, right answer, completion
    ("exact", "Paris", "<think>\n\n</think>\n\nParis"),
    ("exact", "Paris", "<think>\nLyon?\n</think>\n\nParis"),
    ("number", "18", "<think>\n16 - 3 - 4 = 9, 9 * 2 = 18\n</think>\n\n18"),
    ("word", "Paris", LONG + "Paris"),
    ("letter", "e", LONG + "e"),
    ("word", "Paris", "<answer>Paris</answer>"),
    ("number", "18", "<answer>18</answer>"),
    ("letter", "e", "<answer>e</answer>"),
    ("math", "18", "<answer>18</answer>"),
    ("solution", "18", "<think>\n5\n</think>\n\n18"),
    ("math", "18", "<think>\n5\n</think>\n\n18"),
    ("word", "Paris", "Paris"),
]


def graded(grader, answer, completion):
    row = {"prompt": "q", "answer": answer, "grader": grader}
    return jsonl.Jsonl(
        name="t", label="own", description="", max_new_tokens=9, licence="", origin="", path="t.jsonl"
    ).grade(completion, row)


@pytest.mark.parametrize(("grader", "answer", "completion"), CASE)
def test_an_answer_in_wrappings_is_right(grader, answer, completion):
    assert graded(grader, answer, completion).correct


NEW = [  # grader, right answer, completion, the answer found
    # thinking
    ("exact", "Paris", "<think></think>Paris", "paris"),
    ("exact", "Paris", "<thinking>Lyon or Paris?</thinking>\nParis.", "paris"),
    ("exact", "Paris", "<THINK>Lyon</THINK> Paris", "paris"),
    ("exact", "Paris", "<thought>Lyon</thought>Paris", "paris"),
    ("exact", "Paris", "<reasoning>\nIt is in France.\n</reasoning>\n<answer>\nParis\n</answer>\n", "paris"),
    ("exact", "Paris", "<scratchpad>Lyon</scratchpad>\n\nParis", "paris"),
    ("exact", "Paris", "[THINK]Lyon?[/THINK]Paris", "paris"),
    ("exact", "Paris", "Is it Lyon? No.\n</think>\n\nParis", "paris"),  # the prompt opened it
    ("exact", "Paris", "<think>a <think> b </think> c </think> Paris", "paris"),
    ("exact", "Paris", "<think>I should close the <think> tag.</think>Paris", "paris"),
    ("exact", "Paris", "<think>one</think><think>two</think>Paris", "paris"),
    ("exact", "Paris", "Paris <think>Was that right? Yes.</think>", "paris"),
    ("exact", "Paris", "Paris\n<think>Let me check that", "paris"),
    ("exact", "Paris", "<think>Lyon?</think>Paris<think>Yes, I", "paris"),
    ("exact", "Paris", "<think>\nThe capital of France is Paris", None),
    ("exact", "Paris", "<think>Paris</think>", None),
    ("exact", "Paris", "<think>\nParis\n</think>\n\n", None),
    ("exact", "Paris", "Paris</think>", None),
    ("exact", "Paris", "<think>Paris</think>Lyon", "lyon"),
    ("word", "Paris", "<think>Paris", None),
    ("word", "Paris", "<think>\n" + "Is it Lyon? " * 30_000 + "\n</think>\n\nParis", "paris"),
    ("word", "Paris", "<think>\n" + "Is it Paris? " * 30_000, None),
    ("name", "Buenos Aires", "<think>Rosario?</think>\nThe capital is Buenos Aires.", "buenos aires"),
    ("numbers", "1, 2, 3", "<think>3, 2, 1</think>\n1, 2, 3", "1, 2, 3"),
    ("words", "a, b, c", "<think>c, b, a</think> a, b, c", "a, b, c"),
    ("letters", "ta", "<think>t, then a: ta</think>\nta", "ta"),
    ("letter", "e", "<think>t-a-b-l-e</think>\n\nThe last letter is **e**.", "e"),
    ("number", "18", "<think>5</think>\n\nThe answer is 18.", "18"),
    ("number", "18", "<think>18", None),
    ("solution", "18", "<think>The answer is 5.</think> She makes $18 a day.", "18"),
    ("solution", "18", "<think>The answer is 18.", None),
    ("solution", "18", "<think>The answer is 18.</think>", None),
    ("solution", "18", "<think>So \\boxed{5}</think>\n\\boxed{18}", "18"),
    ("solution", "18", "<think>#### 5</think>\n18", "18"),
    ("math", "18", "<think>so $\\boxed{5}$</think>\n\nIt is $\\boxed{18}$.", "18"),
    ("math", "18", "<think>so $\\boxed{18}$", None),
    ("math", "\\frac{1}{2}", "<Think>2</Think>\n<Answer>\\frac{1}{2}</Answer>", "\\frac{1}{2}"),
    # answer tags
    ("exact", "Paris", "<ANSWER>Paris</ANSWER>", "paris"),
    ("exact", "Paris", "<Answer> Paris </Answer>", "paris"),
    ("exact", "Paris", "<final_answer>Paris</final_answer>", "paris"),
    ("exact", "Paris", "<Final Answer>Paris</Final Answer>", "paris"),
    ("exact", "Paris", "<final>Paris</final>", "paris"),
    ("exact", "Paris", "[ANSWER]Paris[/ANSWER]", "paris"),
    ("exact", "Paris", '<answer type="city">Paris</answer>', "paris"),
    ("exact", "Paris", "Here it is:\n<answer>Paris</answer>\nI hope this helps!", "paris"),
    ("exact", "Paris", "<answer>Lyon</answer> No: <answer>Paris</answer>", "paris"),
    ("exact", "Paris", "<answer>Paris</answer> and never <answer>Lyon</answer>", "lyon"),
    ("exact", "Paris", "<answer><answer>Paris</answer></answer>", "paris"),
    ("exact", "Paris", "<answer>Paris", "paris"),  # a stop string took the closing tag
    ("exact", "Paris", "<answer>Paris</ans", "paris"),
    ("exact", "Paris", "Paris</answer>", "paris"),
    ("exact", "Paris", "<answer>Paris<answer>", "paris"),
    ("exact", "Paris", "I put it into <answer> tags: <answer>Paris</answer>", "paris"),
    ("exact", "Paris", "<answer>Paris</answer>\nIt stands in <answer> tags.", "paris"),
    ("exact", "Paris", "Paris <answer></answer>", None),
    ("exact", "Paris", "<answer>Paris</answer><answer></answer>", "paris"),
    ("exact", "Paris", "<solution>Paris</solution>", "paris"),
    ("exact", "Paris", "<response>Sure.\n<answer>Paris</answer></response>", "paris"),
    ("exact", "Paris", "<think>Lyon? <answer>Lyon</answer></think><answer>Paris</answer>", "paris"),
    ("exact", "Paris", "<think>It is in France. <answer>Paris</answer>", "paris"),  # thinking ends in the answer
    ("exact", "Paris", "<think>Like <answer>Paris</answer>? Let me", None),
    ("exact", "Paris", "<answer>Paris</answer><think>Done.</think>", "paris"),
    ("exact", "Paris", "<answer><think>Lyon?</think>Paris</answer>", "paris"),
    ("exact", "<answer>Paris</answer>", "<answer>Paris</answer>", "paris"),  # a right answer with tags
    ("exact", "a < b", "a < b", "a < b"),
    ("word", "Paris", "The city is <answer>Paris</answer>, and 3 others are not.", "paris"),
    ("number", "18", "<answer>18</answer> Let me know if you have 2 more questions!", "18"),
    ("number", "18", "<answer> 18. </answer>", "18"),
    ("number", "1080", "<answer>1 080</answer>", "1080"),
    ("number", "18", "<answer>18 or 20</answer>", None),
    ("letter", "e", "<think>t</think><answer>'e'</answer>", "e"),
    ("solution", "18", "9 * 2 = 18 <answer>18</answer> for 3 days", "18"),
    ("solution", "18", "So 16. <answer>$18 per day</answer>", "18"),
    ("solution", "18", "18 <answer>none</answer>", None),
    ("solution", "18", "<answer>\\boxed{18}</answer>", "18"),
    ("solution", "18", "The answer is [answer].\nThe answer is 18.", "18"),
    ("math", "18", "<answer>$18$</answer> since 5 < 6", "18"),
    ("math", "x+1", "<think>x-1</think><answer>x+1</answer>", "x+1"),
]


@pytest.mark.parametrize(("grader", "answer", "completion", "found"), NEW)
def test_the_answer_is_what_the_wrappings_hold(grader, answer, completion, found):
    grade = graded(grader, answer, completion)
    assert grade.answer == found
    assert grade.correct == (found is not None and found != "lyon")


def test_the_table_of_new_answers_is_long_enough():
    assert len(NEW) >= 60


PROGRAM = "def f(x):\n    return x + 1\n"


@pytest.mark.parametrize(
    "completion",
    [
        f"<think>\n```python\ndef f(x):\n    return 0\n```\n</think>\n\n```python\n{PROGRAM}```",
        f"<think>def f(x):\n    return 0\n</think>\n{PROGRAM}",
        f"<answer>\n{PROGRAM}</answer>\nThis adds 1.",
        f"<answer>\n```python\n{PROGRAM}```\n</answer>",
        f"```python\ndef f(x):\n    return 0\n```\nBetter:\n<answer>{PROGRAM}</answer>",
        f"<think>{'Hm. ' * 40_000}</think>\n{PROGRAM}",
    ],
)
def test_the_program_is_the_one_outside_the_thinking(completion):
    assert "x + 1" in code.extract(completion, "f")


def test_thinking_without_an_end_holds_no_program():
    assert code.extract(f"<think>\n```python\n{PROGRAM}```\nBut is it right?", "f") is None


def test_a_continuation_behind_thinking_keeps_its_indentation():
    prompt = 'def f(x):\n    """Add one."""\n'
    assert "return x + 1" in code.extract("<think>\nEasy.\n</think>\n\n    return x + 1\n", "f", prompt)


def test_every_other_grader_sees_through_wrappings():
    row = {
        "question": "?",
        "choices": {"label": list("ABCD"), "text": ["red", "green", "blue", "grey"]},
        "answerKey": "B",
    }
    arc = sva.tasks.task("arc_easy")
    assert arc.grade("<think>A? The answer is C.</think>\n\nB", row).correct
    assert arc.grade("<answer>B</answer> and not C", row).correct
    assert arc.grade("<think>The answer is B.", row) == (False, None, "")
    gsm8k = sva.tasks.task("gsm8k")
    assert gsm8k.grade("<think>20</think><answer>18</answer>", {"question": "?", "answer": "#### 18"}).correct
    assert reasoning.final_answer("<think>Answer: 4</think>\n<answer>5</answer>") == "5"
    assert reasoning.final_answer("<think>Answer: 4") is None
    routing = sva.tasks.task("routing", routes=["gsm8k", "arc_easy"])
    assert routing.grade("<think>science?</think>\nmath", {"question": "q", "label": "math"}).correct


def test_the_public_codes_verdict_is_on_the_raw_text():
    gsm8k = sva.tasks.task("gsm8k", "reference")
    row = {"question": "?", "answer": "#### 18"}
    assert gsm8k.grade("<answer>18</answer> in 3 days", row) == (False, "3", "")
    assert gsm8k.grade("<think>The answer is 18", row).correct


def test_a_text_without_tags_comes_back_as_it_is():
    for text in ("", " a\n", "1 < 2 > 0", "<b>x</b>", "<thinker>", "f[0] < g[answer]"):
        assert unwrapped(text) == text


@pytest.mark.parametrize(
    "piece",
    ["<think>", "</think>", "<answer>", "</answer>", "<answer>x</answer>", "<", "[think]", "<solution><answer>"],
)
def test_reading_tags_takes_time_linear_in_the_text(piece):
    assert is_linear(unwrapped, piece)
    unwrapped(piece * (1_000_000 // len(piece)))  # a megabyte is read too
