import numpy as np
import pytest

import sva
from sva.cli import demo_answers, demo_report
from sva.cli import demonstration as demo
from sva.evaluation import evaluate
from sva.evaluation.evaluate import Record
from sva.generation.testing import NameAColour
from sva.spectral.expert import Expert
from sva.tasks.labels import OTHER


def _records(verdicts, task="task", label=""):
    return [
        Record(task, f"question {i}", f"text {ok}", None, bool(ok), 3, label=label) for i, ok in enumerate(verdicts)
    ]


@pytest.fixture(scope="module")
def shipped():
    """The experts in the package, with no model to check them against."""
    return [Expert.load(path) for path in demo.asset_files()]


def test_the_shipped_classifier_knows_the_labels_of_all_the_demos_experts(shipped):
    (classifier,) = (expert for expert in shipped if "labels" in expert.metadata)
    config = classifier.metadata["config"]
    experts = {expert.metadata["task"]: expert.metadata["label"] for expert in shipped if expert is not classifier}
    assert {*experts, demo.LIVE} == set(config["routes"])
    assert set(classifier.metadata["labels"]) > set(experts.values())
    assert OTHER in classifier.metadata["labels"]


def test_shipped_experts_share_one_base_model_and_gained(shipped):
    assert len({expert.metadata["fingerprint"] for expert in shipped}) == 1
    for expert in shipped:
        assert expert.metadata["metrics"]["gain"]["low"] > 0
        assert expert.metadata["metrics"]["n"] >= 50


def test_the_mixed_set_has_held_out_prompts_of_each_kind_in_turn_in_whole_batches(shipped):
    names = [demo.LIVE, *(str(e.metadata["task"]) for e in shipped if "labels" not in e.metadata), OTHER]
    todo = demo.mixed(names)
    assert len(todo) == demo.PER_KIND * len(names)
    assert len(todo) % demo.BATCH == 0
    assert [item.task.name for item in todo[: len(names)]] == names
    assert demo.SHOWN in names
    assert len(names) >= 4
    trained = {row["question"] for name in names for row in demo.make_task(name).source("train")}
    assert not trained & {item.question for item in todo}


def test_the_table_compares_the_same_prompts_and_names_the_best_single_expert():
    answers = {
        "base": _records([0, 0, 1, 0]),
        "x everywhere": _records([1, 0, 0, 0]),
        "y everywhere": _records([0, 1, 0, 1]),
        "two-pass": _records([1, 1, 1, 1]),
    }
    found = demo_report.table(answers, ["x", "y", "x", "y"])
    assert found["best_single"] == "y everywhere"
    assert found["by_kind"]["x everywhere"] == {"x": 0.5, "y": 0.0}
    assert found["two_pass_over_base"]["mean"] == 0.75
    assert found["two_pass_over_best_single"]["mean"] == 0.5
    assert found["accuracy"]["base"]["mean"] == 0.25


@pytest.fixture(scope="module")
def experts(toy):
    spectra = sva.decompose(toy, "mlp", progress=False)
    return [Expert({k: np.full(len(v.s), x, np.float32) for k, v in spectra.items()}) for x in (0.5, 2.0)]


def test_answers_are_kept_batch_by_batch_until_the_expert_is_another(toy, experts, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_answers, "BATCH", 2)
    todo = evaluate.items(NameAColour(), "test", 4)
    first = demo_answers.answers(demo_answers.alone(toy, "base", None, 4), todo[:2], tmp_path)
    whole = demo_answers.answers(demo_answers.alone(toy, "base", None, 4), todo, tmp_path)
    assert whole[:2] == first
    assert len(list(tmp_path.glob("base-*/*.jsonl"))) == 2
    for expert in experts:
        demo_answers.answers(demo_answers.alone(toy, "colour", expert, 4), todo[:2], tmp_path)
    assert len(list(tmp_path.glob("colour-*"))) == 2

    def fail():
        pytest.fail("a model was made to answer again")

    kept = [demo_answers.alone(toy, "base", None, 4), demo_answers.alone(toy, "colour", experts[1], 4)]
    again = [demo_answers.answers(system._replace(make=fail), todo[:2], tmp_path) for system in kept]
    assert again[0] == first


def test_what_an_expert_answered_in_the_second_pass_is_not_answered_twice(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "BATCH", 1)
    todo = evaluate.items(NameAColour(), "test", 4)
    both = [record._replace(label=label) for record, label in zip(_records([1, 1, 0, 0]), "aaba", strict=True)]
    asked = []

    def answer(batch):
        asked.extend(item.question for item in batch)
        return [Record("colour", item.question, "alone", None, False, 1) for item in batch]

    system = demo_answers.System("a everywhere", toy, "digest", lambda: answer)
    records = demo._rest(system, "a", both, todo, tmp_path)
    assert [record.completion for record in records] == ["alone", "text 1", "alone", "text 0"]
    assert asked == [todo[0].question, todo[2].question]  # the first batch was asked of both at the start


@pytest.mark.parametrize(
    ("terminal", "unwanted", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_the_first_answers_are_coloured_on_a_terminal_that_wants_it(terminal, unwanted, coloured, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", unwanted)
    monkeypatch.setenv("TERM", "xterm")
    base, expert = _records([0, 1, 0], demo.SHOWN), _records([0, 0, 1], demo.SHOWN)
    text = demo_report.contrast(demo.SHOWN, [*_records([0]), *base], [*_records([1]), *expert])
    assert "question 2" in text  # the first of this kind that the expert alone has right
    assert "The first of 3 held-out 'capitals' prompts that the expert answers rightly and the base wrongly" in text
    assert "the base has 1 right, the expert 1" in text
    assert ("\033[31mtext 0\033[0m" in text) == coloured
    assert ("\033[32mtext 1\033[0m" in text) == coloured


def test_the_first_prompt_is_shown_where_the_expert_wins_none(monkeypatch):
    same = _records([1, 0], demo.SHOWN)
    text = demo_report.contrast(demo.SHOWN, same, same)
    assert "question 0" in text
    assert "The first of 2 held-out 'capitals' prompts;" in text


def test_the_classifier_learnt_the_descriptions_that_its_tasks_have_now(shipped):
    (classifier,) = (expert for expert in shipped if "labels" in expert.metadata)
    labels = demo.make_task("routing", routes=classifier.metadata["config"]["routes"]).labels
    assert classifier.metadata["labels"] == {label.name: label.description for label in labels}
