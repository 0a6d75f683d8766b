"""A user's own task from a JSONL file."""

import json

import pytest

import sva.tasks
from sva.tasks import from_jsonl
from sva.tasks.jsonl import GRADERS, split_of
from sva.utils.errors import UserError


def written(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def squares(tmp_path):
    rows = [{"prompt": f"What is {n} squared?", "answer": n * n, "id": n} for n in range(200)]
    return written(tmp_path / "squares.jsonl", rows)


def test_a_file_is_a_task(squares):
    task = from_jsonl(squares, grader="number", label="squares", description="squares of numbers")
    sizes = [len(task.source(split)) for split in sva.tasks.SPLITS]
    assert sum(sizes) == 200
    assert min(sizes) > 8
    assert sizes[0] > 140
    row = task.source("test")[0]
    assert task.question(row) == row["prompt"]
    assert task.grade(f"The answer is {row['answer']}.", row).correct
    assert not task.grade("7 and 8", row).correct


def test_a_path_is_a_task_by_name(squares):
    task = sva.tasks.task(str(squares))
    assert (task.name, task.label, task.description) == ("squares", "squares", "squares")
    row = task.source("train")[0]
    assert task.grade(row["answer"], row)[:2] == (True, row["answer"])
    assert not task.grade(f"The answer is {row['answer']}.", row).correct  # "exact" is the default


def test_a_label_is_the_files_name_and_never_that_of_the_base(tmp_path):
    rows = [{"prompt": f"Prompt {n}", "answer": "x"} for n in range(99)]
    for name, label in (("Bus routes", "busroutes"), ("First_word", "firstword"), ("other", "own"), ("-", "own")):
        assert from_jsonl(written(tmp_path / f"{name}.jsonl", rows)).label == label


def test_no_prompt_is_in_two_splits(tmp_path):
    rows = [{"prompt": f"{space}Prompt {n} ", "answer": "x"} for n in range(99) for space in ("", "  ")]
    task = from_jsonl(written(tmp_path / "twice.jsonl", rows))
    prompts = [{row["prompt"].strip() for row in task.source(split)} for split in sva.tasks.SPLITS]
    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]
    assert not prompts[1] & prompts[2]
    assert split_of("A  b") == split_of("a b\n")


@pytest.mark.parametrize(
    ("grader", "gold", "right", "wrong"),
    [
        ("exact", "a*b = 1", "A*b = 1.", "ab = 1"),
        ("number", "1,080", "It is 1080.", "1081"),
        ("numbers", "1, 2", "1 2", "2, 1"),
        ("word", "apple", "The word is Apple.", "apples"),
        ("words", "a, b, c", "a b c", "c b a"),
        ("letter", "e", "E.", "f"),
        ("letters", "ta", "t, a", "at"),
        ("name", "New York", "The city is New York.", "York"),
        ("solution", "so 2 + 2 = 4", "2 and 2 are 4 eggs. The answer is 4.", "The answer is 5."),
        ("math", r"\frac{1}{2}", "The answer is $0.5$.", "The answer is $2$."),
    ],
)
def test_each_grader_reads_its_form(tmp_path, grader, gold, right, wrong):
    rows = [{"prompt": f"p{n}", "answer": gold, "grader": grader} for n in range(20)]
    task = from_jsonl(written(tmp_path / "own.jsonl", rows))
    row = task.source("train")[0]
    assert task.grade(gold, row).correct
    assert task.grade(right, row).correct
    assert not task.grade(wrong, row).correct


def test_the_table_above_is_whole():
    assert set(GRADERS) == {
        "exact",
        "number",
        "numbers",
        "word",
        "words",
        "letter",
        "letters",
        "name",
        "solution",
        "math",
    }


def test_prompts_of_two_splits_that_differ_in_marks_only_are_refused_by_name(tmp_path):
    pairs = [(f"Name colour {n}", f"Name colour {n}!") for n in range(99)]
    one, other = next(pair for pair in pairs if split_of(pair[0]) != split_of(pair[1]))
    path = written(tmp_path / "twice.jsonl", [{"prompt": text, "answer": "red"} for text in (one, other)])
    with pytest.raises(UserError, match=rf"twice.jsonl: '{one}.*' is in (two splits|\w+ and \w+)"):
        sva.tasks.task(str(path)).source("train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "answer": ', r"line 2 is not JSON"),
        ('["a", "b"]', r"line 2 is not an object"),
        ('{"prompt": "a"}', r"line 2 has no 'answer'; it has 'prompt'"),
        ('{"question": "a", "answer": "b"}', r"line 2 has no 'prompt'; it has 'question', 'answer'"),
        ('{"prompt": "a", "answer": null}', r"line 2: 'answer' is None, not a text"),
        ('{"prompt": "a", "answer": true}', r"line 2: 'answer' is True, not a text"),
        ('{"prompt": " ", "answer": "b"}', r"line 2: 'prompt' is ' ', not a text"),
        ('{"prompt": "a", "answer": "b", "grader": "fair"}', r"line 2: no grader 'fair'; there are exact"),
        ('{"prompt": "a", "answer": "b", "gradr": "word"}', r"line 2 has 'gradr'; did you mean 'grader'"),
        (
            '{"prompt": "a", "answer": "b", "grader": "number"}',
            r"line 2: the grader 'number' cannot read the answer 'b'; these can: exact, letter",
        ),
        (
            '{"prompt": "a", "answer": "1/2", "grader": "word"}',
            r"cannot read the answer '1/2'; these can: exact, solution, math",
        ),
        ('{"prompt": "a", "answer": "...", "grader": "word"}', r"cannot read the answer '...'; no grader can"),
        ("\udcff", r"line 2 is not JSON"),
    ],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, line, message):
    path = tmp_path / "own.jsonl"
    path.write_bytes(b'{"prompt": "p", "answer": "a"}\n' + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(UserError, match=message):
        from_jsonl(path)


def test_files_that_are_no_task_are_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        sva.tasks.task(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(UserError, match="is empty"):
        from_jsonl(written(tmp_path / "empty.jsonl", ["\n\n"]))
    with pytest.raises(UserError, match="no grader 'fair'"):
        from_jsonl(written(tmp_path / "own.jsonl", [{"prompt": "p", "answer": "a"}]), grader="fair")
    with pytest.raises(UserError, match=r"none of its 1 lines falls in .*add lines"):
        [from_jsonl(tmp_path / "own.jsonl").source(split) for split in sva.tasks.SPLITS]


def test_a_byte_order_mark_and_windows_line_ends_are_skipped(squares):
    plain = from_jsonl(squares, grader="number")
    content = squares.read_bytes().replace(b"\n", b"\r\n")
    half = content.index(b"\r\n", len(content) // 2) + 2
    marked = squares.with_name("marked.jsonl")
    marked.write_bytes(b"\xef\xbb\xbf" + content[:half] + b"\xef\xbb\xbf" + content[half:])  # two files, joined
    for split in sva.tasks.SPLITS:
        assert list(from_jsonl(marked, grader="number").source(split)) == list(plain.source(split))
    marked.write_text(squares.read_text(), encoding="utf-16")
    with pytest.raises(UserError, match=r"line 1 is not JSON \(it is not UTF-8 \(byte 1\); save the file as UTF-8\)"):
        from_jsonl(marked)
