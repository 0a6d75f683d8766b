import numpy as np
import pytest

from sva.cli import demonstration as demo
from sva.evaluation import evaluate
from sva.evaluation.evaluate import Record
from sva.spectral.expert import Expert
from sva.tasks.labels import OTHER


def _records(verdicts):
    return [Record("task", f"question {i}", "text", None, bool(ok), 3) for i, ok in enumerate(verdicts)]


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


def test_the_mixed_set_has_300_held_out_prompts_of_each_kind_in_turn(shipped):
    names = [demo.LIVE, *(str(e.metadata["task"]) for e in shipped if "labels" not in e.metadata), OTHER]
    todo, kinds = demo.mixed(names)
    assert len(todo) == len(kinds) >= 300
    assert kinds[: len(names)] == names
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


def test_answers_are_kept_until_the_expert_is_another(toy, tmp_path):
    import sva
    from sva.generation.testing import NameAColour

    todo = evaluate.items(NameAColour(), "test", 2)
    spectra = sva.decompose(toy, "mlp", progress=False)
    experts = [Expert({k: np.full(len(v.s), x, np.float32) for k, v in spectra.items()}) for x in (0.5, 2.0)]
    demo.alone(toy, todo, "base", tmp_path)
    for expert in [*experts, *experts]:
        demo.alone(toy, todo, "colour", tmp_path, expert)
    assert len(list((tmp_path / "alone").iterdir())) == 3


def test_the_classifier_learnt_the_descriptions_that_its_tasks_have_now(shipped):
    (classifier,) = (expert for expert in shipped if "labels" in expert.metadata)
    labels = demo.make_task("routing", routes=classifier.metadata["config"]["routes"]).labels
    assert classifier.metadata["labels"] == {label.name: label.description for label in labels}
