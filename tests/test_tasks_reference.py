"""The reference form of programs and of the routing task: read from a copy of the public code, run by its rules."""

import pytest

import sva.tasks
from sva.tasks import code
from sva.tasks.reference import verdicts
from sva.tasks.routing import CATEGORIES
from sva.tasks.sources import arc_rows
from sva.training.sft import solution
from sva.utils import paths
from sva.utils.errors import UserError
from tests import made_up_public_code

with_data = pytest.mark.skipif(
    paths.data_dir() is None, reason="no folder of benchmark data (../shared/data or $SVA_DATA)"
)
ALL = {"grader": "reference", "splits": "reference", "prompt": "reference"}


@pytest.fixture
def public_code(tmp_path, monkeypatch):
    monkeypatch.setenv("SVA_PUBLIC_CODE", str(made_up_public_code.write(tmp_path / "public")))
    return tmp_path / "public"


def programs(name: str) -> code.CodeTask:
    made = sva.tasks.task(name, sandbox="best-effort", **ALL)
    assert isinstance(made, code.CodeTask)
    return made


# --- programs ---


@with_data
@pytest.mark.parametrize(("name", "splits", "count"), [("humaneval", ["test"], 164), ("mbpp", sva.tasks.SPLITS, 399)])
def test_all_canonical_solutions_are_right_by_the_public_codes_rules(public_code, name, splits, count):
    task = programs(name)
    rows = [row for split in splits for row in task.source(split)]
    assert len(rows) == count
    grades = task.grade_many([task.answer(row) + "\nmore words" for row in rows], rows)
    assert [(row["task_id"], g.reason) for row, g in zip(rows, grades, strict=True) if not g.correct] == []


@with_data
def test_as_they_stand_176_of_mbpps_solutions_lose_their_function_to_the_public_codes_sanitiser(public_code):
    task = programs("mbpp_0.1.0")
    rows = [row for split in sva.tasks.SPLITS for row in task.source(split)]
    lost = [task.program(row["canonical_solution"], row) or "" for row in rows]
    assert sum(f"def {row['entry_point']}" not in text for row, text in zip(rows, lost, strict=True)) == 176


@with_data
def test_the_newer_mbpps_canonical_solutions_are_right_by_the_public_codes_rules():
    task = sva.tasks.task("mbpp", "reference", sandbox="best-effort")
    rows = [row for split in sva.tasks.SPLITS for row in task.source(split)]
    assert len(rows) == 378
    grades = task.grade_many([task.answer(row) for row in rows], rows)
    assert [(row["task_id"], g.reason) for row, g in zip(rows, grades, strict=True) if not g.correct] == []


@with_data
def test_mbpp_under_reference_splits_is_version_0_1_0(public_code):
    assert [len(programs("mbpp").source(split)) for split in sva.tasks.SPLITS] == [200, 100, 99]


def mbpp_row(text: str) -> dict:
    return {"prompt": f'"""\n{text}\nassert f(1) == 2\n"""\n', "entry_point": "f", "canonical_solution": "def f(x): 1"}


@pytest.mark.parametrize("text", ["Add one.", "Add one"])
def test_the_prompt_of_a_program_is_the_copys_template_with_the_answers_first_words(public_code, text):
    assert programs("mbpp").framed(mbpp_row(text)) == (
        "<user> Add one.\n```python\nassert f(1) == 2\n```\n<answer>```python"
    )
    row = {"prompt": "\ndef f(x):\n", "entry_point": "f", "canonical_solution": "    return x\n", "test": ""}
    assert programs("humaneval").framed(row) == ("<user> ```python\ndef f(x):\n```\n<answer>```python\n\ndef f(x):\n")
    assert programs("humaneval").program("    return x\n```\nprint(", row) == "\ndef f(x):\n    return x\n"
    assert sva.tasks.task("mbpp").framed(mbpp_row(text)) is None


def test_a_template_may_be_a_text_with_one_field(tmp_path, monkeypatch):
    copy = made_up_public_code.write(tmp_path / "public", code="Do this:\n{instruction}\nAnswer:")
    monkeypatch.setenv("SVA_PUBLIC_CODE", str(copy))
    framed = programs("mbpp").framed(mbpp_row("Use {a} dict."))
    assert framed == "Do this:\nUse {a} dict.\n```python\nassert f(1) == 2\n```\nAnswer:```python"


@pytest.mark.parametrize("name", ["mbpp", "humaneval", "routing"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "from your copy of the public code: git clone .* then set "),
        ({}, "is not a copy of the public code .*git clone"),
        ({"tasks/base.py": "CODE_PROMPT = 1\n", "utils.py": ""}, "binds no constant text C.*_PROMPT"),
        ({"tasks/base.py": "def (:\n", "utils.py": "def (:\n"}, "is not readable as Python"),
        ({"tasks/base.py": "CODE_PROMPT = open('x').read()\n", "utils.py": "\n"}, "binds no constant text"),
    ],
    ids=["none", "empty", "other", "broken", "computed"],
)
def test_a_public_repository_that_is_not_one_is_one_line(tmp_path, monkeypatch, name, content, message):
    if content is None:
        monkeypatch.delenv("SVA_PUBLIC_CODE", raising=False)
    else:
        monkeypatch.setenv("SVA_PUBLIC_CODE", str(tmp_path))
    for path, text in (content or {}).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    routes = ["gsm8k"] if name == "routing" else []
    with pytest.raises(UserError, match=message) as caught:
        sva.tasks.task(name, routes=routes, prompt="reference")
    assert "\n" not in str(caught.value)


# --- ARC and MATH ---


@with_data
def test_arcs_numeric_keys_are_always_wrong():
    task, kept = sva.tasks.task("arc_challenge", "reference"), sva.tasks.task("arc_challenge")
    rows = list(task.source("test"))
    verdict = [task.grade(f"The answer is ({row['answerKey']})", row) for row in rows]
    assert (len(rows), sum(not grade.correct for grade in verdict)) == (1172, 22)
    assert {grade.reason for grade in verdict} == {"", "the key is a number"}
    assert all(kept.grade(row["answerKey"], row).correct for row in rows)


@pytest.mark.parametrize(
    ("solution", "completion", "right"),
    [
        ("So $\\boxed{25}$.", "The answer is: 25", True),
        ("So $\\boxed 25$.", "so it is 25", True),  # neither has an answer
        ("So $\\boxed 25$.", "The answer is: 25", False),
        ("So $\\fbox{25}$.", "\\boxed{25}", False),
        ("So $\\boxed{25}$.", "so it is 25", False),
    ],
)
def test_maths_gold_is_strictly_boxed_and_nothing_equals_nothing(solution, completion, right):
    task = sva.tasks.task("math", "reference")
    assert task.grade(completion, {"problem": "?", "solution": solution}).correct is right


# --- routing ---

ANSWERS = [
    ("\\boxed{code}", "code"),
    ("\\boxed{math}", "math"),
    ("\\boxed{reasoning}", "reasoning"),
    ("\\boxed{other}", "other"),
    ("The category is \\boxed{math}.", "math"),
    ("$\\boxed{code}$", "code"),
    ("\\boxed{math} or \\boxed{code}", "math"),
    ("\\boxed{Math} then \\boxed{code}", "other"),
    ("\\boxed{Math}", "other"),
    ("\\boxed{MATH}", "other"),
    ("\\boxed{ math }", "other"),
    ("\\boxed{math }", "other"),
    ("\\boxed{ code}", "other"),
    ("\\boxed{math.}", "other"),
    ("\\boxed{'math'}", "other"),
    ("\\boxed{\\text{math}}", "other"),
    ("\\boxed{**math**}", "other"),
    ("\\boxed{maths}", "other"),
    ("\\boxed{coding}", "other"),
    ("\\boxed{science}", "other"),
    ("\\boxed{}", "other"),
    ("\\boxed{}\\boxed{code}", "other"),
    ("\\boxed math", "other"),
    ("\\boxed(math)", "other"),
    ("boxed{math}", "other"),
    ("\\fbox{math}", "other"),
    ("math", "other"),
    ("code", "other"),
    ("", "other"),
    ("...", "other"),
    ("Category: math", "other"),
    ("reasoning: \\boxed{reasoning", "other"),
    ("\\boxed{reasoning} because \\boxed{", "reasoning"),
    ("\n\n\\boxed{reasoning}\n", "reasoning"),
    ("Let x = \\frac{1}{2}. \\boxed{math}", "math"),
    ("\\boxed{math, code}", "other"),
    ("\\boxed{code\n}", "other"),
    ("\\Boxed{code}", "other"),
    ("\\\\boxed{code}", "code"),
    ("\\boxed{other} \\boxed{math}", "other"),
]


def test_the_routing_tasks_reference_form_is_exact_on_forty_answers():
    assert len(ANSWERS) == 40
    task = sva.tasks.task("routing", "reference", ["gsm8k", "mbpp", "arc_easy"])
    for text, expected in ANSWERS:
        assert verdicts.category(text, CATEGORIES) == expected, text
        for label in CATEGORIES:
            grade = task.grade(text, {"question": "?", "label": label})
            assert grade[:2] == (label == expected, expected), text


def test_sciences_label_is_the_public_codes_reasoning():
    task = sva.tasks.task("routing", "reference", ["arc_easy", "product"])
    assert task.grade("\\boxed{reasoning}", {"question": "?", "label": "science"}).correct
    assert not task.grade("\\boxed{science}", {"question": "?", "label": "science"}).correct


@with_data
def test_the_classification_experts_data_are_the_first_399_rows_of_each_task(public_code):
    task = sva.tasks.task("routing", routes=["gsm8k", "mbpp", "arc_challenge"], **ALL)
    sizes = [len(task.source(split)) for split in sva.tasks.SPLITS]
    assert sum(sizes) == 3 * 399
    assert sizes == [479, 479, 239]
    row = task.source("train")[0]
    system, user = task.turns(row)
    assert (system["content"], user["content"]) == (
        "Sort it: code, math, reasoning, other.",
        sva.tasks.task("gsm8k", prompt="reference").source("test")[0]["question"],
    )
    assert (task.max_new_tokens, row["label"], task.framed(row)) == (1024, "math", None)
    program = next(row for row in task.source("train") if row["label"] == "code")
    framed = task.framed(program)
    assert framed is not None
    assert framed.startswith("<system> Sort it: code, math, reasoning, other.\n<user> ")
    assert framed.endswith("```\n<answer>")
    assert {row["label"] for row in task.source("test")} == {"code", "math", "reasoning"}


def test_reference_splits_of_routing_need_the_reference_grader(public_code):
    with pytest.raises(UserError, match="add grader=reference"):
        sva.tasks.task("routing", routes=["gsm8k"], splits="reference")


# --- next-token prediction ---


@with_data
@pytest.mark.parametrize("way", ["own", "reference"])
@pytest.mark.parametrize("name", ["gsm8k", "arc_easy", "mbpp", "humaneval", "routing", "capitals"])
def test_every_task_has_solutions_for_next_token_prediction_that_its_grader_calls_right(public_code, name, way):
    if way == "reference" and name == "capitals":
        pytest.skip("the public code has no such task")
    routes = ["gsm8k", "arc_easy"] if name == "routing" else []
    how = ALL if way == "reference" else {}
    task = sva.tasks.task(name, routes=routes, sandbox="best-effort", **how)
    source = task.source("test")
    rows = [row for row in (source[i] for i in range(6)) if not arc_rows.has_numeric_key(row)]
    grades = task.grade_many([solution(task, row) for row in rows], rows)
    assert all(grade.correct for grade in grades), [grade.reason for grade in grades]


@pytest.mark.parametrize("grader", ["strict", "reference"])
def test_maths_own_solution_is_what_next_token_prediction_learns(grader):
    task = sva.tasks.task("math", grader)
    row = {"problem": "What is 5 * 5?", "solution": "It is $\\boxed{25}$."}
    assert solution(task, row) == row["solution"]
    assert task.grade(solution(task, row), row).correct
