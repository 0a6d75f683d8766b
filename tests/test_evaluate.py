import numpy as np

from sva import chat, evaluate
from sva.evaluate import Item
from sva.testing import NameAColour


def test_records_are_the_greedy_answers_in_order_graded_by_their_own_task(toy):
    task, terse = NameAColour(), NameAColour(name="terse", max_new_tokens=2)
    source = task.source("test")
    todo = [Item(task if i % 2 else terse, source[i]) for i in range(5)]
    records = evaluate.evaluate(toy, todo, batch_size=2, progress=False)
    assert [record.task for record in records] == ["terse", "name_a_colour"] * 2 + ["terse"]
    assert [record.question for record in records] == [item.question for item in todo]
    for item, record in zip(todo, records, strict=True):
        ids, mask = chat.encode(toy, [chat.render(toy, item.question)])
        out = toy.generate(ids, mask, 4, [1])
        assert record.completion == chat.decode(toy, out.tokens, out.lengths)[0]
        assert record.tokens == int(out.lengths[0])
        assert (record.correct, record.answer) == task.grade(record.completion, item.example)[:2]


def test_the_budget_may_be_given(toy):
    (record,) = evaluate.evaluate(toy, evaluate.items(NameAColour(), "test", 1), max_new_tokens=1, progress=False)
    assert record.tokens == 1


def test_items_are_the_first_of_a_split():
    task = NameAColour()
    assert [item.example for item in evaluate.items(task, "validation", 3)] == task.source("validation")[:3]
    assert len(evaluate.items(task, "test", 10**6)) == len(task.source("test"))


def test_the_toy_task_keeps_its_splits_apart_and_grades_by_the_first_word():
    task = NameAColour()
    rows = [{tuple(row.values()) for row in task.source(split)} for split in ("train", "validation", "test")]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 144
    verdicts = [task.grade(text, {}).correct for text in ("red", " Red", "green thing", "the red", "", "redder")]
    np.testing.assert_array_equal(verdicts, [True, False, True, False, False, False])


def test_records_are_kept_and_made_again_only_for_other_items(toy, tmp_path):
    todo, made = evaluate.items(NameAColour(), "test", 3), []

    def answers(items):
        made.append(len(items))
        return evaluate.evaluate(toy, items, progress=False)

    path = tmp_path / "deep" / "base.jsonl"
    first = evaluate.kept(path, todo, lambda: answers(todo))
    assert evaluate.kept(path, todo, lambda: answers(todo)) == first
    assert made == [3]
    assert len(evaluate.kept(path, todo[:2], lambda: answers(todo[:2]))) == 2
    assert made == [3, 2]
