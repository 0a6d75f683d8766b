"""What holds for every task: names, splits, prompts, verdicts on a right, a wrong and a garbage answer."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sva.tasks
from sva.tasks import arc, gsm8k
from sva.tasks.grading import amounts
from sva.tasks.sources import arc_rows, kinds
from sva.utils import paths
from sva.utils.errors import UserError

BENCHMARKS = ("gsm8k", *arc_rows.NAMES)
GARBAGE = (
    "",
    "I cannot help with that.",
    "\x00\x1b[31m",
    "9^{9^{9^{9}}}",
    "e, l, b, a, t",
    "word " * 5000,
    "1" * 100_000,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(params=[*kinds.NAMES, *BENCHMARKS])
def task(request):
    if request.param in BENCHMARKS and paths.data_dir() is None:
        pytest.skip("no folder of benchmark data (../shared/data or $SVA_DATA)")
    return sva.tasks.task(request.param)


def gold(task, example):
    """A completion that is right."""
    return example["answerKey"] if isinstance(task, arc.Arc) else example["answer"]


def test_a_task_says_what_a_dispatcher_and_a_reader_need(task):
    assert task.label.isalpha()
    assert task.label.islower()
    assert task.description
    assert task.licence
    assert task.origin
    assert hash(task) == hash(sva.tasks.task(task.name))


def test_every_split_is_read_by_random_access(task):
    for split in sva.tasks.SPLITS:
        rows = task.source(split)
        assert len(rows) > 20
        assert rows[-1] == rows[len(rows) - 1] == rows[len(rows) - 2 :][1]
        assert task.question(rows[0]).strip()
        with pytest.raises(IndexError):
            rows[len(rows)]


def test_right_wrong_and_garbage_answers_get_their_verdicts(task):
    rows = task.source("validation")
    for i in range(40 if len(rows) > 40 else len(rows)):
        right = gold(task, rows[i])
        assert task.grade(right, rows[i]).correct
        sentence = f"The answer is {amounts.final_number(right) if isinstance(task, gsm8k.Gsm8k) else right}."
        assert task.grade(sentence, rows[i]).correct or rows[i].get("kind") == "copy"
        wrong = next(g for g in (gold(task, rows[j % len(rows)]) for j in range(i + 1, i + 99)) if g != right)
        if not isinstance(task, gsm8k.Gsm8k) or gsm8k.gold(rows[i]) not in wrong:
            assert not task.grade(wrong, rows[i]).correct
        for garbage in GARBAGE:
            assert not task.grade(garbage, rows[i]).correct


def test_an_unknown_split_is_named_beside_those_that_exist():
    with pytest.raises(UserError, match="no split 'valid'.*train, validation, test"):
        sva.tasks.task("last_letter").source("valid")


def test_a_misspelt_task_is_offered_the_nearest_names():
    with pytest.raises(UserError, match="no task 'last_leter'; did you mean last_letter"):
        sva.tasks.task("last_leter")
    with pytest.raises(UserError, match="no task 'qqq'; there are .*gsm8k.*jsonl"):
        sva.tasks.task("qqq")
    with pytest.raises(UserError, match=r"no grader 'fair'.*strict"):
        sva.tasks.task("last_letter", grader="fair")


def test_every_name_is_known():
    for name in sva.tasks.names():
        routes = ["product", "sort3"] if name == "routing" else []
        assert sva.tasks.task(name, routes=routes).name == name


def test_nothing_in_tasks_imports_jax():
    for file in Path(sva.tasks.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                assert module.split(".")[0] not in ("jax", "flax", "torch", "tensorflow"), f"{file.name}: {module}"
                allowed = ("sandbox", "tasks", "utils")
                known = module.split(".")[:2] in (["sva", part] for part in allowed)
                assert known or not module.startswith("sva"), f"{file.name}: {module}"
    script = "import sva.tasks, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
