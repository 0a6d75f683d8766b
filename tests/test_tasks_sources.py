"""Tasks from a user's own files, and from reasoning-gym."""

import gzip
import importlib.util
import json

import pytest

import sva.tasks
from sva.tasks.grading import reasoning_worker
from sva.tasks.reasoning import final_answer
from sva.utils.errors import UserError


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SVA_DATA", str(tmp_path))


def problem(n):
    return {"problem": f"What is ${n}+{n}$?", "level": "Level 1", "type": "Algebra", "solution": f"\\boxed{{{2 * n}}}."}


def fill(folder, split, numbers):
    for n in numbers:
        place = folder / "MATH" / split / ("algebra" if n % 2 else "geometry")
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{n}.json").write_text(json.dumps(problem(n)))


def test_math_is_read_from_a_folder_and_splits_do_not_meet(tmp_path):
    fill(tmp_path, "train", range(60))
    fill(tmp_path, "test", range(55, 75))
    task = sva.tasks.task("math")
    rows = {split: [task.text(row) for row in task.source(split)] for split in sva.tasks.SPLITS}
    assert len(rows["test"]) == 20
    assert len(rows["train"]) + len(rows["validation"]) == 55  # five are test problems
    assert 4 <= len(rows["validation"]) <= 6
    assert not set(rows["train"]) & {*rows["validation"], *rows["test"]}
    row = task.source("test")[0]
    assert task.grade(f"The answer is {row['solution']}", row).correct
    assert not task.grade("\\boxed{1}", row).correct
    assert "\\boxed{}" in task.question(row)
    reference = sva.tasks.task("math", splits="reference")
    assert list(reference.source("train")) == list(task.source("test"))
    fill(tmp_path, "test", [90])  # the user's files change
    assert len(task.source("test")) == 21


def test_math_is_read_from_files_of_lines(tmp_path):
    for split, numbers in (("train", range(20)), ("test", range(30, 33))):
        lines = "".join(json.dumps(problem(n)) + "\n" for n in numbers)
        (tmp_path / f"math_{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert [row["problem"] for row in sva.tasks.task("math").source("test")] == [
        f"What is ${n}+{n}$?" for n in range(30, 33)
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem": "p"}', "math_test.jsonl, line 1 is not a problem of MATH .*'solution'"),
        ("x", "math_test.jsonl, line 1 is not a problem"),
        ('{"problem": "p", "solution": "none"}', "math_test.jsonl, line 1: the solution has no .boxed"),
    ],
)
def test_a_file_that_is_not_math_is_named_with_its_line(tmp_path, line, message):
    (tmp_path / "math_train.jsonl").write_text(json.dumps(problem(1)) + "\n")
    (tmp_path / "math_test.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        sva.tasks.task("math").source("test")


def test_where_math_is_not_the_message_says_what_to_do():
    with pytest.raises(UserError, match=r"neither a folder MATH .* nor math_test.jsonl .* set \$SVA_DATA"):
        sva.tasks.task("math").source("test")


MINE = """
from dataclasses import dataclass
from sva.tasks import Grade, Task

@dataclass(frozen=True, kw_only=True)
class Mine(Task):
    def _rows(self, split):
        return [{"n": n, "answer": str(n + 1)} for n in range(5)]
    def question(self, example):
        return f"What comes after {example['n']}?"
    def grade(self, completion, example):
        return Grade(completion.strip() == example["answer"], completion.strip() or None)

TASK = Mine(name="mine", label="mine", description="counting", max_new_tokens=4, licence="MIT", origin="here")
"""


def test_a_small_python_file_is_a_task(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    task = sva.tasks.task(str(path), shots=2)
    row = task.source("test")[3]
    assert task.grade_many(["4", "5", ""], [row] * 3) == [(True, "4", ""), (False, "5", ""), (False, None, "")]
    assert [turn["content"] for turn in task.turns(row)] == [
        *("What comes after 0?", "1", "What comes after 1?", "2"),
        "What comes after 3?",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1\ny = nothing\n", r"mine.py, line 2: NameError"),
        ("x = = 1\n", r"mine.py, line 1: SyntaxError"),
        ("TASK = 3\n", r"mine.py must define TASK, .*; it has one of type int"),
        ("import sys\nsys.exit(0)\n", r"mine.py, line 2: SystemExit: 0"),
        ("x = 1\n", r"mine.py must define TASK, .*; it has none"),
    ],
)
def test_a_python_file_that_is_no_task_is_one_line(tmp_path, monkeypatch, content, message):
    path = tmp_path / "mine.py"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        sva.tasks.task(str(path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        sva.tasks.task("mine.py")
    with pytest.raises(UserError, match="does not exist"):
        sva.tasks.task(str(tmp_path / "other.py"))


def test_the_public_codes_prompts_on_demand():
    row = {"question": "Why?", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "A"}
    task = sva.tasks.task("arc_easy", prompt="reference")
    system, user = task.turns(row)
    assert system["role"] == "system"
    assert user["content"] == "Why?\nOptions:\nA. x\nB. y\n"
    assert (task.max_new_tokens, task.stop[0]) == (512, "Instruction:")
    assert task.opening("llama") == "Let's think step by step"
    assert task.opening("mistral") == ""
    assert sva.tasks.task("math", prompt="reference").max_new_tokens == 1024
    assert sva.tasks.task("arc_easy").turns(row) == [
        {"role": "user", "content": sva.tasks.task("arc_easy").question(row)}
    ]


def test_worked_examples_of_gsm8k_end_as_they_are_asked_to():
    row = {"question": "?", "answer": "2 + 2 = <<2+2=4>>4 eggs.\n#### 1,004"}
    task = sva.tasks.task("gsm8k")
    assert task.answer(row) == "2 + 2 = 4 eggs.\nThe answer is 1,004."
    assert task.grade(task.answer(row), row).correct


@pytest.mark.parametrize(
    ("answer", "plain"),
    [
        ("12", True),
        ("(3 + 4) * 2", True),
        ("sin(x) + x**2/2 + C", True),
        ("a, b, c", True),
        ("1.5", True),
        ("__import__('os')", False),
        ("print(1)", False),
        ("x.is_zero", False),
        ("().__class__", False),
        ("9**9**9", False),
        ("[].append(1)", False),
        ("(lambda: 1)", False),
        ("f (1)", False),
        ("1" * 1001, False),
    ],
)
def test_only_plain_expressions_are_handed_to_scorers(answer, plain):
    assert reasoning_worker.is_plain(answer) == plain


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("So 2.\nAnswer: 4", "4"),
        ("**Answer:** 4.", "4"),
        ("<answer> 4 </answer> done", "4"),
        ("4", "4"),
        ("one\ntwo", None),
        ("", None),
        ("<answer>" * 3000, "<answer>" * 2500),
    ],
)
def test_the_answer_stands_where_it_is_asked_for(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="the extra `reasoning` is not installed")
def test_an_environment_of_reasoning_gym_is_a_task():
    task = sva.tasks.task("reasoning_gym:countdown")
    rows = {split: task.source(split) for split in sva.tasks.SPLITS}
    questions = [row["question"] for split in rows.values() for row in split]
    assert len(questions) == len(set(questions)) > 1000
    row = rows["test"][0]
    assert task.grade(task.answer(row), row).correct
    assert task.grade(f"Answer: ({row['answer']})", row).correct
    assert not task.grade("Answer: 1 + 1", row).correct
    assert task.grade("Answer: __import__('os').getcwd()", row).reason == "unreadable: more than an expression"
    with pytest.raises(UserError, match="answers to it are wrong"):
        sva.tasks.task("reasoning_gym:syllogism")
    with pytest.raises(UserError, match="nope"):
        sva.tasks.task("reasoning_gym:nope")


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is not None, reason="reasoning-gym is installed")
def test_without_reasoning_gym_the_message_says_how_to_get_it():
    with pytest.raises(UserError, match=r"pip install 'sva\[reasoning\]'"):
        sva.tasks.task("reasoning_gym:countdown")
