import json

import numpy as np
import pytest
from filelock import FileLock

from sva.cli.main import main
from sva.generation.testing import THINGS
from sva.spectral.expert import Expert
from sva.training import config, metrics
from sva.training import run as runs
from sva.utils.errors import UserError
from sva.utils.remote import Mirror


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """run_dir, *overrides -> Config of a run on a task file of 48 lines."""
    path = tmp_path_factory.mktemp("task") / "red.jsonl"
    lines = [{"prompt": f"what colour the {a} of the {b} ?", "answer": "red red"} for a in THINGS for b in THINGS[:4]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = [f"task={path}", "train.steps=3", "rollout.prompts=4", "rollout.samples=2", "rollout.max_new_tokens=4"]
    base += ["reinforce.baseline=none"]  # so that wrong answers alone teach something

    def load(run_dir, *overrides):
        return config.load(overrides=[*base, f"run_dir={run_dir}", "evaluate.size=3", *overrides])

    return load


@pytest.fixture(scope="module")
def run(toy, settings, tmp_path_factory):
    """(run_dir, expert, result) of one finished run; tests leave the directory as it is."""
    run_dir = tmp_path_factory.mktemp("runs") / "a" / "b"
    return run_dir, *runs.train(settings(run_dir), lm=toy, progress=False)


def test_a_run_leaves_everything_that_tells_what_it_did(run, settings, toy):
    run_dir, expert, result = run
    assert {path.name for path in run_dir.iterdir()} >= {
        "config.yaml",
        "state",
        "metrics.jsonl",
        "spectrum.png",
        "tensorboard",
        "before.jsonl",
        "after.jsonl",
        "expert.safetensors",
        "result.json",
    }
    assert config.load(run_dir / "config.yaml") == settings(run_dir)
    assert json.loads((run_dir / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["config"]["train"]["steps"] == result["train_steps"] == 3
    assert result["fingerprint"] == toy.fingerprint
    assert result["n"] == len((run_dir / "after.jsonl").read_text().splitlines()) > 0
    assert {"jax", "python", "sva", "transformers"} <= result["versions"].keys()
    assert result["command"]
    assert [row["step"] for row in metrics.read(run_dir / "metrics.jsonl")] == [0, 1, 2]
    assert any((run_dir / "tensorboard").iterdir())
    for name in ("before", "after", "gain"):
        assert result[name]["low"] <= result[name]["mean"] <= result[name]["high"]


def test_a_run_of_an_adapter_without_spectra_is_like_any_other(settings, toy, tmp_path):
    lora = settings(tmp_path / "run", "parametrisation=lora:r=2,alpha=4", "train.steps=1")
    expert, result = runs.train(lora, lm=toy, progress=False)
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"state", "before.jsonl", "after.jsonl", "expert.safetensors", "result.json"} <= found
    assert "spectrum.png" not in found
    assert result["parameters"] == sum(x.size for x in expert.arrays.values()) > 0
    assert any(np.any(x) for key, x in expert.arrays.items() if key.endswith("/b"))
    assert Expert.load(tmp_path / "run" / "expert.safetensors", fingerprint=toy.fingerprint).digest == expert.digest
    again, same = runs.train(lora, lm=toy, progress=False)
    assert (again.digest, same["after"]) == (expert.digest, result["after"])
    with pytest.raises(UserError, match="is of a higher rank than a target matrix"):
        runs.train(settings(tmp_path / "x", "parametrisation=lora:r=99,alpha=4"), lm=toy, progress=False)
    assert not (tmp_path / "x" / "config.yaml").exists()


def test_a_run_in_a_bucket_goes_on_elsewhere_when_its_machine_is_lost(run, settings, toy, bucket, monkeypatch):
    remote = settings("gs://bucket/runs/one")
    send = Mirror.push

    def sends_no_second_step(self):
        if not (self.local / "state" / "2").exists():
            send(self)

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "push", sends_no_second_step)
        patch.setattr(runs, "merge", lambda *_: 1 / 0)  # after the last step
        with pytest.raises(ZeroDivisionError):
            runs.train(remote, lm=toy, progress=False)
    there = bucket / "runs" / "one"
    assert [row["step"] for row in metrics.read(there / "metrics.jsonl")] == [0]
    _, result = runs.train(remote, lm=toy, progress=False)
    run_dir, _, whole = run
    assert Expert.load(there / "expert.safetensors").digest == Expert.load(run_dir / "expert.safetensors").digest
    for name in ("before.jsonl", "after.jsonl"):
        assert (there / name).read_text() == (run_dir / name).read_text()
    assert result["gain"] == whole["gain"]
    assert (there / "tensorboard").is_dir()
    with pytest.raises(UserError, match=r"gs://bucket/runs/one holds a run of other settings \(train.lr"):
        runs.train(settings("gs://bucket/runs/one", "train.lr=1e-3"), lm=toy, progress=False)
    assert main(["report", "gs://bucket/runs/one"]) == 0
    assert (there / "report.html").stat().st_size > 10_000


def test_a_log_of_a_run_holds_lines_and_no_carriage_return(settings, toy, tmp_path, capsys):
    runs.train(settings(tmp_path / "run", "train.steps=2"), lm=toy)
    err = capsys.readouterr().err
    assert "\r" not in err
    assert "2 of 2 steps after " in err
    assert "sva: evaluate base: 3 of 3 prompts" in err


def test_the_task_is_made_with_the_settings_that_name_the_public_code():
    names = {"grader": "reference", "splits": "reference", "prompt": "reference"}
    task = runs.task_of(config.load(overrides=["task=gsm8k", *(f"{name}={value}" for name, value in names.items())]))
    assert {name: getattr(task, name) for name in names} == names
    assert task.stop
    assert runs.task_of(config.load(overrides=["task=mbpp", "sandbox=best-effort"])).sandbox == "best-effort"
    assert runs.task_of(config.load(overrides=["task=capitals", "shots=3"])).shots == 3
    with pytest.raises(UserError, match="shots=-1 must be at least 0"):
        config.load(overrides=["shots=-1"])


def test_the_experts_file_is_for_this_base_and_says_what_it_is(run, toy):
    run_dir, expert, _ = run
    loaded = Expert.load(run_dir / "expert.safetensors", fingerprint=toy.fingerprint)
    assert loaded.parametrisation == expert.parametrisation == "sigmoid_nuclear"
    assert loaded.metadata == json.loads(json.dumps(expert.metadata))
    assert (loaded.metadata["task"], loaded.metadata["label"], loaded.metadata["base"]) == ("red", "red", "toy-0")
    for name, raw in expert.raw.items():
        np.testing.assert_array_equal(loaded.raw[name], raw)
        assert np.ptp(raw) > 0  # trained
    with pytest.raises(UserError, match="toy-0.*not on other"):
        Expert.load(run_dir / "expert.safetensors", fingerprint="0" * 64, base="other")


def test_a_finished_run_is_read_and_not_repeated(run, settings, toy, monkeypatch):
    run_dir, expert, result = run
    monkeypatch.setattr("sva.evaluation.evaluate.evaluate", lambda *_, **__: pytest.fail("evaluated again"))
    monkeypatch.setattr("sva.training.methods.sample", lambda *_, **__: pytest.fail("trained again"))
    again, same = runs.train(settings(run_dir), lm=toy, progress=False)
    for name, raw in expert.raw.items():
        np.testing.assert_array_equal(again.raw[name], raw)
    assert {name: same[name] for name in ("before", "after", "gain", "n")} == {
        name: result[name] for name in ("before", "after", "gain", "n")
    }


def test_a_directory_of_other_settings_is_refused_by_name(run, settings, toy):
    run_dir = run[0]
    with pytest.raises(UserError, match=r"seed: 0 there, 7 asked for; train\.lr: 0\.01 there, 0\.02 asked") as caught:
        runs.train(settings(run_dir, "seed=7", "train.lr=0.02"), lm=toy, progress=False)
    assert "\n" not in str(caught.value)


def test_a_setting_that_an_earlier_version_did_not_have_counts_as_its_default(run, settings, tmp_path):
    text = (run[0] / "config.yaml").read_text()
    without = text[: text.index("guards:")] + text[text.index("validation:") :]
    (tmp_path / "config.yaml").write_text(without)
    runs._check_same(settings(run[0]), tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"guards\.not_finite: stop there, skip asked for"):
        runs._check_same(settings(run[0], "guards.not_finite=skip"), tmp_path / "config.yaml")


def test_a_run_that_validates_yields_its_best_step(settings, toy, tmp_path, monkeypatch):
    found = iter([0.0, 0.5, 0.25, 0.25])
    monkeypatch.setattr("sva.training.loop._accuracy", lambda *_: next(found))
    expert, result = runs.train(settings(tmp_path / "run", "validation.every=1"), lm=toy, progress=False)
    assert result["best_step"] == 1
    one, _ = runs.train(settings(tmp_path / "one", "train.steps=1"), lm=toy, progress=False)
    for name, raw in one.raw.items():
        np.testing.assert_array_equal(expert.raw[name], raw)


def test_a_directory_in_use_is_refused_and_freed_after_a_failure(settings, toy, tmp_path, monkeypatch):
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="another process trains in"):
        runs.train(settings(tmp_path), lm=toy, progress=False)
    monkeypatch.setattr("sva.training.run.fit", lambda *_, **__: 1 / 0)
    failures = []  # kept, and with them whatever their frames hold
    for _ in range(2):
        with pytest.raises(ZeroDivisionError) as caught:
            runs.train(settings(tmp_path), lm=toy, progress=False)
        failures.append(caught)


@pytest.mark.parametrize(
    ("override", "words"),
    [("targets=mpl", "matches no weight"), ("task=sum9", "sum9"), ("evaluate.split=tests", "tests")],
)
def test_settings_that_name_nothing_do_not_take_the_directory(override, words, settings, toy, tmp_path):
    with pytest.raises(UserError, match=words):
        runs.train(settings(tmp_path, override), lm=toy, progress=False)
    assert not (tmp_path / "config.yaml").exists()


def test_a_place_that_cannot_be_written_is_one_line(settings, toy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        runs.train(settings(tmp_path / "file" / "run"), lm=toy, progress=False)


def test_a_run_in_which_nothing_was_ever_right_says_so_and_what_to_try(settings, toy, tmp_path, capsys):
    lines = [{"prompt": f"what colour the {a} of the {b} ?", "answer": "42"} for a in THINGS for b in THINGS[:4]]
    task = tmp_path / "never.jsonl"
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_dir = tmp_path / "run"
    _, result = runs.train(settings(run_dir, f"task={task}", "train.steps=1"), lm=toy, progress=False)
    assert [row["accuracy"] for row in metrics.read(run_dir / "metrics.jsonl")] == [0.0]
    (warning,) = json.loads((run_dir / "result.json").read_text())["warnings"]
    assert warning == result["warnings"][0]
    assert warning.startswith(
        "no sampled answer was right in 1 step, so nothing said what a right one is; try an easier"
    )
    assert warning.count("(wrong)") == 3  # how the grader read three answers
    assert f"warning: {warning}" in capsys.readouterr().err
