"""Tasks made from seeds: what the splits share (nothing), and that the rows stay what they are."""

import itertools
import re
import subprocess
import sys
from collections import Counter

import pytest

from sva.tasks import procedural
from sva.tasks.grading import answers
from sva.tasks.sources import builders, kinds
from sva.utils import paths
from sva.utils.errors import UserError

SPLITS = tuple(kinds.ROWS)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def everything():
    """{split: rows of every kind}"""
    return {split: [row for name in kinds.NAMES for row in kinds.rows(name, split)] for split in SPLITS}


def test_no_word_is_in_two_splits(everything):
    """Over all kinds together, the answers' words and the alternatives included; names as wholes."""
    names = {
        split: {name for row in rows if row["kind"] == "capitals" for name in row["operands"]}
        for split, rows in everything.items()
    }
    words = {}
    for split, rows in everything.items():
        rows = [row for row in rows if row["kind"] != "capitals"]
        texts = [text for row in rows for text in (*row["operands"], *row["also"])]
        words[split] = {w.casefold() for text in texts for w in re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?", text)}
        assert len(words[split]) > 300
    for one, other in itertools.combinations(SPLITS, 2):
        assert not words[one] & words[other]
        assert not names[one] & names[other]


def test_no_operand_tuple_is_in_two_splits_in_any_order(everything):
    keys = {split: {(row["kind"], *sorted(row["operands"])) for row in rows} for split, rows in everything.items()}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not keys[one] & keys[other]


def test_no_question_is_in_two_splits_or_twice_in_one(everything):
    seen = Counter(q for rows in everything.values() for q in {(row["kind"], row["question"]) for row in rows})
    assert max(seen.values()) == 1
    for name in kinds.NAMES:
        for split in SPLITS:
            questions = [row["question"] for row in kinds.rows(name, split)]
            assert len(set(questions)) == len(questions)


def test_numbers_to_compare_are_never_in_two_splits(everything):
    for name in ("largest", "smallest", "sort3", "parity"):
        numbers = {
            split: {n for row in rows if row["kind"] == name for n in row["operands"]}
            for split, rows in everything.items()
        }
        for one, other in itertools.combinations(SPLITS, 2):
            assert not numbers[one] & numbers[other]


def test_pairs_commute_into_the_same_split():
    assert all(kinds.owner(a, b) == kinds.owner(b, a) for a in range(50) for b in range(50))
    shares = Counter(kinds.owner(a, b) for a in range(100) for b in range(a, 100))
    assert shares["train"] / shares.total() == pytest.approx(0.50, abs=0.03)
    assert shares["test"] / shares.total() == pytest.approx(0.35, abs=0.03)


@pytest.mark.parametrize("name", kinds.NAMES)
def test_there_are_enough_rows_to_measure_with(name):
    sizes = {split: len(kinds.rows(name, split)) for split in SPLITS}
    assert sizes["train"] >= 100
    assert sizes["validation"] >= 20
    short = {"capitals": 80, "opposites": 70, "plurals": 70, "other": 140}  # no more countries, few opposites
    assert sizes["test"] >= short.get(name, 200)


@pytest.mark.parametrize("name", kinds.KINDS)
def test_answers_follow_from_their_operands(name):
    compute = {
        "last_letter": lambda ops: ops[0][-1],
        "second_letter": lambda ops: ops[0][1],
        "first_letters": lambda ops: ops[0][:2],
        "product": lambda ops: str(int(ops[0]) * int(ops[1])),
        "sum2": lambda ops: str(int(ops[0]) + int(ops[1])),
        "sum3": lambda ops: str(int(ops[0]) + int(ops[1])),
        "parity": lambda ops: "even" if ops[0][-1] in "02468" else "odd",
        "next_number": lambda ops: str(int(ops[0]) + 4 * int(ops[1])),
        "largest": lambda ops: str(max(map(int, ops))),
        "smallest": lambda ops: str(min(map(int, ops))),
        "sort3": lambda ops: ", ".join(map(str, sorted(map(int, ops)))),
        "alphabetical": lambda ops: sorted(ops)[0],
        "longest_word": lambda ops: sorted(ops, key=len)[-1],
        "count": lambda ops: str(len(ops)),
        "list_last": lambda ops: ops[-1],
        "reverse_words": lambda ops: ", ".join(reversed(ops)),
        "copy": " ".join,
    }
    for row in kinds.rows(name, "test"):
        assert row["kind"] == name
        if name in compute:
            assert row["answer"] == compute[name](row["operands"])
        elif re.search(rf'of "?{re.escape(row["operands"][0])}["?.]', row["question"]):
            assert row["answer"] == row["operands"][1]
        else:
            assert row["answer"] == row["operands"][0]


@pytest.mark.parametrize("name", kinds.NAMES)
def test_every_right_answer_is_graded_right_and_those_of_other_rows_wrong(name):
    task = procedural.task(name)
    rows = kinds.rows(name, "train")[:300] + kinds.rows(name, "test")
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        assert all(task.grade(text, row).correct for text in (row["answer"], row["answer"].upper(), *row["also"]))
        form = kinds.KINDS[row["kind"]].form
        if row["kind"] != other["kind"] or answers.find(other["answer"], form) != answers.find(row["answer"], form):
            assert not task.grade(other["answer"], row).correct


def test_a_question_never_gives_its_answer_as_a_bare_reading():
    """Repeating the question is wrong, whatever its form."""
    for name in kinds.KINDS:
        for row in kinds.rows(name, "validation")[:50]:
            assert not procedural.task(name).grade(row["question"], row).correct


def test_the_other_task_takes_turns_between_its_kinds():
    found = [row["kind"] for row in kinds.rows("other", "test")]
    assert found[:4] == list(kinds.MIXTURES["other"]) * 2
    assert len(set(Counter(found).values())) == 1


def test_word_lists_are_clean():
    words = kinds._lines("words")
    assert list(words) == sorted(set(words))
    assert all(re.fullmatch("[a-z]{3,9}", word) for word in words)
    assert len(words) > 900


def test_rows_are_the_same_in_another_process():
    script = "from sva.tasks.sources import kinds, upstream; print(upstream.checksum(kinds.rows('sum3', 'train', 5)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    from sva.tasks.sources import upstream

    assert done.stdout.strip() == upstream.checksum(kinds.rows("sum3", "train", 5))


def test_seeds_draw_other_rows_from_the_same_splits():
    first, second = kinds.rows("sum2", "train", 0), kinds.rows("sum2", "train", 1)
    assert first != second
    assert {kinds.owner(*row["operands"]) for row in second} == {"train"}
    prepared = procedural.task("sum2", seed=1).source("train")
    assert [prepared[i] for i in range(20)] == second[:20]


@pytest.mark.parametrize("name", ["last_letter", "capitals", "reverse_words", "other"])
def test_prepared_rows_are_the_rows_made(name):
    assert list(procedural.task(name).source("test")) == kinds.rows(name, "test")


def test_preparing_prints_nothing(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path))
    procedural.task("parity", seed=3).source("test")
    procedural.task("parity", seed=0).source("test")
    assert capfd.readouterr() == ("", "")


def test_damaged_records_are_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path))
    rows = list(procedural.task("product").source("test"))
    for file in tmp_path.rglob("*.array_record*"):
        file.write_bytes(file.read_bytes()[:100])
    assert list(procedural.task("product").source("test")) == rows


def test_two_processes_may_prepare_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path))
    script = "from sva.tasks import procedural as p; print(len(p.task('count').source('test')))"
    running = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in running] == ["600", "600"]
    assert [process.returncode for process in running] == [0, 0]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SVA_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot be written"):
        procedural.task("product").source("test")


def test_the_cache_changes_its_name_with_the_rows(monkeypatch):
    assert f"procedural-{kinds.fingerprint()}" in {p.name for p in (paths.cache_dir() / "datasets").iterdir()}
    assert builders.SvaProcedural.BUILDER_CONFIGS[0].name == kinds.NAMES[0]


def test_a_kind_is_described_by_its_own_phrase_or_its_labels():
    described = {
        name: procedural.task(name).description for name in ("largest", "smallest", "list_last", "count", "other")
    }
    assert described == {
        "largest": "which number is the largest",
        "smallest": "comparing numbers",
        "list_last": "which word is last in a list",
        "count": "counting, picking or turning round the words of a list",
        "other": "anything else",
    }
