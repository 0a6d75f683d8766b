"""Code tasks: finding the program, evalplus' comparison, splits, and every canonical solution against its tests."""

import gzip
import itertools
import json
import math
import random

import pytest

import sva.tasks
from sva.sandbox import Job, Sandbox
from sva.tasks import code, humaneval, mbpp
from sva.tasks.grading import oracles
from sva.tasks.reference import programs
from sva.utils import paths
from sva.utils.errors import UserError

with_data = pytest.mark.skipif(
    paths.data_dir() is None, reason="no folder of benchmark data (../shared/data or $SVA_DATA)"
)
LEVEL = "best-effort"  # what CI's machine can do is for test_sandbox.py to say


def task(name: str, grader: str = "strict") -> code.CodeTask:
    made = sva.tasks.task(name, grader, sandbox=LEVEL)
    assert isinstance(made, code.CodeTask)
    return made


def all_rows(name: str):
    splits = ("test",) if name == "humaneval" else sva.tasks.SPLITS
    return [row for split in splits for row in task(name).source(split)]


def solutions(rows):
    return [row["prompt"] + row["canonical_solution"] for row in rows]


def stubs(rows, is_continued: bool):
    if is_continued:
        return [row["prompt"] + "\n    pass\n" for row in rows]
    return [f"def {row['entry_point']}(*args, **kwargs): pass\n" for row in rows]


# --- every canonical solution passes, every stub fails ---


@with_data
def test_all_canonical_humaneval_solutions_pass_and_all_stubs_fail():
    rows = all_rows("humaneval")
    assert len(rows) == 164
    failed = [
        (row["task_id"], verdict.reason)
        for row, verdict in zip(rows, task("humaneval").verdicts(solutions(rows), rows), strict=True)
        if not verdict.passed
    ]
    assert not failed
    assert not any(verdict.passed for verdict in task("humaneval").verdicts(stubs(rows, True), rows))


def base_only(rows):
    return [row | {"plus_input": []} for row in rows]


@with_data
def test_all_canonical_mbpp_solutions_pass_the_base_tests_and_all_stubs_fail():
    rows = base_only(all_rows("mbpp_0.1.0"))
    assert (len(rows), len(all_rows("mbpp"))) == (399, 378)
    verdicts = task("mbpp_0.1.0").verdicts(solutions(rows), rows)
    assert not [(r["task_id"], v.reason) for r, v in zip(rows, verdicts, strict=True) if not v.passed]
    verdicts = task("mbpp_0.1.0").verdicts(stubs(rows, False), rows)
    assert not [r["task_id"] for r, v in zip(rows, verdicts, strict=True) if v.passed]


@with_data
@pytest.mark.long
@pytest.mark.parametrize("name", ["mbpp", "mbpp_0.1.0"])
def test_all_canonical_mbpp_solutions_pass_the_plus_tests(name):
    rows = all_rows(name)
    verdicts = task(name).verdicts(solutions(rows), rows)
    assert not [(r["task_id"], v.reason) for r, v in zip(rows, verdicts, strict=True) if not v.passed]


@with_data
def test_the_assertions_that_come_with_mbpp_hold_but_for_an_import_that_one_lacks():
    rows = [row for row in mbpp.upstream_rows("0.2.0") if row["task_id"] in ("Mbpp/120", "Mbpp/293") or not row["atol"]]
    jobs = [
        Job(
            row["canonical_solution"],  # the assertions live on what it imports
            f"{row['canonical_solution']}\n{row['entry_point']} = lambda *args: call({row['entry_point']!r}, *args)\n"
            + row["assertion"],
        )
        for row in rows
    ]
    verdicts = code.shared_sandbox(LEVEL).run(jobs)
    failed = {row["task_id"]: v.reason for row, v in zip(rows, verdicts, strict=True) if not v.passed}
    assert failed == {"Mbpp/120": "NameError: name 'math' is not defined"}
    (faulty,) = [job for job, verdict in zip(jobs, verdicts, strict=True) if not verdict.passed]
    (verdict,) = code.shared_sandbox(LEVEL).run([Job(faulty.program, "import math\n" + faulty.tests)])
    assert verdict.passed


@pytest.mark.parametrize(
    ("number", "args", "expected"),
    [
        (3, [[1, [2]]], [[1, [2]]]),
        (2, [[3, 4], [5]], [(3, 4), (5,)]),
        (63, [[[1, 2], [3]]], [[(1, 2), (3,)]]),
        (259, [[[1, 2]], [[3]]], [((1, 2),), ((3,),)]),
        (278, [[1, [2, [3]]]], [(1, (2, [3]))]),
        (580, [[1, [2, [3]]]], [(1, (2, (3,)))]),
        (307, [[1, []], 2, [3]], [(1, []), 2, [3]]),
        (413, [[[1, 2]], 1], [[(1, 2)], 1]),
        (106, [[5], [9]], [[5], (9,)]),
        (115, [[[1, 1], []]], [[{1}, {}]]),
        (124, ["0", "1j"], [0.0, 1j]),
        (252, ["1+2j"], [1 + 2j]),
        (722, [{"a": [1, 2]}, 6.0], [{"a": (1, 2)}, 6.0]),
    ],
)
def test_inputs_get_the_types_back_that_json_took(number, args, expected):
    assert repr(mbpp.restored(f"Mbpp/{number}", args)) == repr(expected)


# --- splits and questions ---


@with_data
def test_mbpp_is_split_as_the_public_code_does():
    rows = mbpp.upstream_rows("0.1.0")
    random.seed(16)
    order = list(range(300))
    random.shuffle(order)
    expected = {"train": order[:200], "validation": order[200:], "test": range(300, 399)}
    for split, places in expected.items():
        found = {row["task_id"] for row in task("mbpp_0.1.0").source(split)}
        assert found == {rows[i]["task_id"] for i in places}
        newer = {row["task_id"] for row in task("mbpp").source(split)}
        assert newer <= found
    assert [len(task("mbpp").source(split)) for split in sva.tasks.SPLITS] == [186, 96, 96]


@with_data
def test_questions_hold_the_prompt_and_one_assertion():
    row = mbpp.upstream_rows("0.2.0")[0]
    question = task("mbpp").question(row)
    assert question.startswith("Write a function to find the shared elements from the given two lists.\n\nYour code")
    assert question.count("assert set(similar_elements((3, 4, 5, 6),(5, 7, 4, 10))) == set((4, 5))") == 1
    row = all_rows("humaneval")[0]
    assert row["prompt"].strip() in task("humaneval").question(row)


@with_data
@pytest.mark.parametrize("name", ["mbpp", "humaneval"])
def test_worked_examples_are_answered_right(name):
    rows = list(task(name).source("test")[:3])
    assert [g.reason for g in task(name).grade_many([task(name).answer(row) for row in rows], rows)] == [""] * 3


@with_data
def test_no_question_is_in_two_splits():
    texts = [" ".join(task("mbpp_0.1.0").question(row).casefold().split()) for row in all_rows("mbpp_0.1.0")]
    assert len(set(texts)) == len(texts) == 399


# --- programs ---

ADD = "def add(a, b):\n    return a + b"


def test_a_completion_of_a_megabyte_is_read_in_no_time_and_gets_a_verdict():
    row = {"task_id": "Mbpp/1", "prompt": "", "entry_point": "add", "canonical_solution": ADD, "base_input": [[1, 2]]}
    row |= {"plus_input": [], "atol": 0}
    grades = task("mbpp").grade_many(
        ["x = 1\n" * 170_000, f"```python\n{ADD}\n```" + " " * 1_000_000, "\0\x1b" * 9], [row] * 3
    )
    assert [grade.correct for grade in grades] == [False, True, False]
    assert grades[0].reason == "no program that defines add"


# --- the public code's way ---


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (f"{ADD}\n", ADD),
        (f"import math\n{ADD}\nprint(add(1, 2))\nx = 1", f"import math\n{ADD}"),
        (f"{ADD}\nx = 2\ndef g(:\n", ADD),
        ("def add(a, b):\n  return a + b", ""),  # no return indented by four: nothing is left
        ("def add(a, b):\n   return a + b", ""),
    ],
)
def test_the_public_codes_way_keeps_its_faults(body, expected):
    def made(text):
        return programs.sanitised(f'"""Add."""\n{programs.body(text, is_open=False)}', "add")

    program = made(f"```python\n{body}```\nwords")
    assert program.removeprefix('"""Add."""').strip() == expected
    assert made(body) == program


@with_data
def test_the_reference_grader_runs_base_tests_only():
    (row,) = [row for row in mbpp.upstream_rows("0.2.0") if row["task_id"] == "Mbpp/3"]
    table = {args[0]: None for args in row["base_input"]}
    names: dict = {}
    exec(row["canonical_solution"], names)
    answers = {n: names["is_not_prime"](n) for n in table}
    text = f"```python\ndef is_not_prime(n):\n    return {answers!r}.get(n)\n```"
    strict, reference = (task("mbpp", grader).grade(text, row) for grader in code.GRADERS)
    assert (strict.correct, reference.correct) == (False, True)
    assert strict.reason.startswith("plus tests: wrong: is_not_prime(")
    assert strict.answer == f"def is_not_prime(n):\n    return {answers!r}.get(n)\n"


# --- comparison ---


@pytest.mark.parametrize(
    ("name", "args", "out", "expected", "atol", "verdict"),
    [
        ("f", [1], 2, 2, 0, True),
        ("f", [1], 2, 3, 0, False),
        ("f", [1], 2.0000001, 2.0, 0, True),  # 1e-6 where a float is expected
        ("f", [1], 2.00001, 2.0, 0, False),
        ("f", [1], 2, 2.0, 0, True),
        ("f", [1], 3, 2.9999999, 0, False),  # of another type: only exactly equal will do
        ("f", [1], [1.0, 2.0000001], [1.0, 2.0], 0, True),
        ("f", [1], (1.0, 2.0000001), [1.0, 2.0], 0, False),
        ("f", [1], [1.0], [1.0, 2.0], 0, False),
        ("f", [1], [1.0, [2.0000001]], [1.0, [2.0]], 0, False),  # a nested list is not one of floats
        ("f", [1], [1.0, [2.00001]], [1.0, [2.0]], 1e-4, True),
        ("f", [1], 2.00005, 2.0, 1e-4, True),
        ("f", [1], math.nan, 2.0, 0, False),
        ("f", [1], math.inf, math.inf, 0, True),
        ("f", [1], 1 + 1.00001j, 1 + 1j, 1e-4, True),
        ("f", [1], "2", 2, 1e-4, False),
        ("similar_elements", [1], [2, 1, 1], (1, 2), 0, True),
        ("check_str", ["a"], "match", True, 0, True),
        ("check_str", ["a"], None, True, 0, False),
        ("check_str", ["a"], False, True, 0, False),
        ("sum_div", [8], 0, 7, 0, True),
        ("are_equivalent", [1, 2], True, False, 0, True),
        ("are_equivalent", [1, 2], None, False, 0, False),
        ("surface_Area", [3, 4], 33, 34, 0, False),
        ("surface_Area", [3, 4], round(9 + 6 * math.hypot(1.5, 4)), 0, 0, True),
        ("digit_distance_nums", [1, 23], 4, 0, 0, True),
        ("find_zero", [[1, 2]], -0.5, None, 1e-4, True),
        ("find_zero", [[1, 2]], -0.4, None, 1e-4, False),
    ],
)
def test_answers_are_compared_as_evalplus_does(name, args, out, expected, atol, verdict):
    assert oracles.matches(name, args, out, expected, atol) is verdict


def test_very_large_answers_are_compared_by_digest():
    reference = "def f(n): return [(i, str(i)) for i in range(n)]"
    tests = code.comparison("f", reference, [[600_000]], 0)
    wrong = reference.replace("(i, str(i))", "(i, str(i + (i == 9)))")
    verdicts = code.shared_sandbox(LEVEL).run([Job(reference, *tests), Job(wrong, *tests)])
    assert [v.passed for v in verdicts] == [True, False]
    assert "gave <list of 600000 items>" in verdicts[1].reason


def test_an_input_that_takes_far_longer_than_the_reference_fails_it(monkeypatch):
    tests, data = code.comparison("f", "def f(x): return x", [[1]], 0)
    tests = tests.replace("_LEAST_SECS = 4.0, 5.0", "_LEAST_SECS = 4.0, 0.2")
    (verdict,) = code.shared_sandbox(LEVEL).run([Job("def f(x):\n  while True: pass", tests, data)])
    assert verdict.is_time_limit
    assert verdict.reason == "time limit: 0.2 s for one call"


# --- pass@k ---


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 2), (5, 2, 4), (6, 0, 3), (6, 6, 6), (4, 1, 4)])
def test_pass_at_k_is_the_mean_over_all_ways_to_draw_k(n, c, k):
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert code.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_refuses_what_makes_no_sense():
    for numbers in ((5, 6, 1), (5, 2, 6), (5, 2, 0), (5, -1, 1)):
        with pytest.raises(ValueError, match="correct among"):
            code.pass_at_k(*numbers)


# --- evalplus' tests for HumanEval, and bad input ---


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    folder = paths.data_dir()
    assert folder is not None
    (tmp_path / "humaneval.jsonl.gz").symlink_to(folder / "humaneval.jsonl.gz")
    monkeypatch.setenv("SVA_DATA", str(tmp_path))
    return tmp_path


@with_data
def test_plus_tests_of_humaneval_are_run_where_the_user_has_them(own_data):
    rows = all_rows("humaneval")
    assert "plus_input" not in rows[0]
    plus = [{"task_id": row["task_id"], "plus_input": [[[9.0, 9.1], 0.5]], "atol": 0} for row in rows]
    (own_data / humaneval.PLUS_FILE).write_bytes(gzip.compress("\n".join(map(json.dumps, plus)).encode()))
    row = all_rows("humaneval")[0]
    right = row["prompt"] + row["canonical_solution"]
    forgetful = right.replace("    for idx,", "    if 9.1 in numbers: return False\n    for idx,", 1)
    grades = task("humaneval").grade_many([f"```python\n{text}\n```" for text in (right, forgetful)], [row] * 2)
    assert [grade.correct for grade in grades] == [True, False]
    assert grades[1].reason == "plus tests: wrong: has_close_elements([9.0, 9.1], 0.5) gave False, not True"


@with_data
@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"{}", mtime=0), gzip.compress(b'{"task_id": "HumanEval/0"}', mtime=0)],
    ids=["no gzip", "no fields", "one field"],
)
def test_damaged_plus_tests_are_refused_by_name(own_data, content):
    (own_data / humaneval.PLUS_FILE).write_bytes(content)
    with pytest.raises(UserError, match="humanevalplus.jsonl.gz is damaged or lacks a task"):
        all_rows("humaneval")


def test_misspelt_names_are_refused():
    with pytest.raises(UserError, match="did you mean mbpp"):
        sva.tasks.task("mbp")
    with pytest.raises(UserError, match="task mbpp: no grader 'lenient'; there is strict and reference"):
        sva.tasks.task("mbpp", "lenient")
    with pytest.raises(UserError, match="task humaneval: no sandbox 'none'; there is strict and best-effort"):
        sva.tasks.task("humaneval", sandbox="none")
    with pytest.raises(UserError, match="task humaneval has no split 'train'; all of it is for testing"):
        sva.tasks.task("humaneval").source("train")


def test_grading_refuses_where_the_level_cannot_be_had(monkeypatch):
    monkeypatch.setattr(code, "shared_sandbox", lambda level: Sandbox(level, means=()))
    with pytest.raises(UserError, match="sandbox=strict cannot be had"):
        sva.tasks.task("humaneval").grade(
            "```python\ndef f(): 0\n```", {"prompt": "def f():\n", "entry_point": "f", "test": ""}
        )
