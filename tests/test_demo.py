import numpy as np
import pytest

import sva
from sva.cli import demonstration as demo
from sva.evaluation import evaluate
from sva.evaluation.evaluate import Record
from sva.generation.testing import NameAColour
from sva.spectral.expert import Expert
from sva.tasks.labels import OTHER


def _records(verdicts, task="task"):
    rows = [Record(task, f"question {i}", f"text {ok}", None, bool(ok), 3) for i, ok in enumerate(verdicts)]
    return dict(enumerate(rows))


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
    assert len(todo) == demo.PER_KIND * len(names) >= 250
    assert [item.task.name for item in todo[: len(names)]] == names
    assert len(todo) % demo.BATCH == demo.COMMON * len(names) % demo.BATCH == 0
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
    found = demo.table(answers, ["x", "y", "x", "y"])
    assert found["best_single"] == "y everywhere"
    assert found["by_kind"]["x everywhere"] == {"x": 0.5, "y": 0.0}
    assert found["two_pass_over_base"]["mean"] == 0.75
    assert found["two_pass_over_best_single"]["mean"] == 0.5
    assert found["accuracy"]["base"]["mean"] == 0.25
    assert found["accuracy"]["base"]["n"] == 4


def test_an_expert_that_answered_a_part_is_measured_on_what_all_answered():
    answers = {
        "base": _records([0, 0, 0, 0]),
        "x everywhere": {place: _records([0, 1, 1, 0])[place] for place in (0, 1)},
        "y everywhere": _records([1, 1, 0, 0]),
        "two-pass": _records([1, 1, 1, 0]),
    }
    found = demo.table(answers, ["x", "y", "x", "y"])
    assert found["best_single"] == "y everywhere"
    assert found["accuracy"]["x everywhere"]["n"] == 2
    assert found["accuracy"]["x everywhere"]["mean"] == 0.5
    assert found["two_pass_over_best_single"]["mean"] == 0.25  # of all four


@pytest.fixture(scope="module")
def experts(toy):
    spectra = sva.decompose(toy, "mlp", progress=False)
    return [Expert({k: np.full(len(v.s), x, np.float32) for k, v in spectra.items()}) for x in (0.5, 2.0)]


def test_answers_are_kept_until_the_expert_or_the_part_is_another(toy, experts, tmp_path):
    answers = demo.Answers(toy, evaluate.items(NameAColour(), "test", 4), tmp_path)
    first = answers.of("base", None, range(2))
    assert list(first) == [0, 1]
    for expert in [*experts, *experts]:
        answers.of("colour", expert, range(2))
    assert len(list((tmp_path / "alone").iterdir())) == 3
    answers.of("colour", experts[0], range(2, 4))
    assert len(list((tmp_path / "alone").iterdir())) == 4
    assert answers.of("base", None, []) == {}


def test_every_expert_answers_the_common_prompts_and_its_own_and_the_best_answers_all(monkeypatch):
    class Fixed(demo.Answers):
        def of(self, name, expert, places):
            asked.append((name, len(places)))
            return {i: Record(name, "", "", None, name == "y" and i % 2 == 0, 1) for i in places}

    asked = []
    monkeypatch.setattr(demo, "BATCH", 2)
    monkeypatch.setattr(demo, "COMMON", 2)
    tasks = [NameAColour(name=name) for name in ("x", "y", "other")]
    todo = evaluate.mixed(tasks, "test", 4)
    found = demo.singles(Fixed(None, todo, None), {"x": None, "y": None})
    assert list(found["base"]) == list(found["y everywhere"]) == list(range(12))
    assert list(found["x everywhere"]) == [0, 1, 2, 3, 4, 5, 6, 9]
    assert sum(count for name, count in asked if name == "y") == 12  # nothing is answered twice


@pytest.mark.parametrize(
    ("terminal", "unwanted", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_the_first_answers_are_coloured_on_a_terminal_that_wants_it(terminal, unwanted, coloured, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", unwanted)
    monkeypatch.setenv("TERM", "xterm")
    base, expert = _records([0, 0, 1], demo.SHOWN), _records([0, 1, 1], demo.SHOWN)
    text = demo.contrast(base, expert)
    assert "question 1" in text  # the first that they answer differently
    assert ("\033[31mtext 0\033[0m" in text) == coloured
    assert ("\033[32mtext 1\033[0m" in text) == coloured
    assert "text 0" in text.replace("\033", "")


def test_the_classifier_learnt_the_descriptions_that_its_tasks_have_now(shipped):
    (classifier,) = (expert for expert in shipped if "labels" in expert.metadata)
    labels = demo.make_task("routing", routes=classifier.metadata["config"]["routes"]).labels
    assert classifier.metadata["labels"] == {label.name: label.description for label in labels}
