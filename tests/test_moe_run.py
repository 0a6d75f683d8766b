"""A whole training run on a toy mixture of experts."""

import json
import re

import numpy as np
import pytest
from mixtures import toy_mixture

import sva
from sva.generation.testing import NameAColour
from sva.spectral.expert import Expert
from sva.training import config, metrics
from sva.training import run as runs
from sva.training.checkpoint import Checkpoints
from sva.utils.errors import UserError

STEPS = ["train.steps=2", "rollout.prompts=4", "rollout.samples=2", "rollout.max_new_tokens=4", "evaluate.size=3"]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Of four modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield toy_mixture(4)


def test_a_run_on_modules_learns_by_name_and_tells_their_balance(mixture, tmp_path):
    asked = config.load(overrides=[*STEPS, "task=name_a_colour", "targets=moe", f"run_dir={tmp_path / 'run'}"])
    expert, result = runs.train(asked, lm=mixture, task=NameAColour(), progress=False)
    assert set(expert.names) == set(sva.decompose(mixture, "moe", progress=False))
    assert len(expert.names) == 2 * 4 * 3
    assert result["parameters"] == sum(x.size for x in expert.raw.values())
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert all(1 <= row["moe_load"] <= 2 for row in rows)  # of 4 modules, 2 a token: at most twice the fair part
    assert all(row["logprob_gap"] < 1e-3 for row in rows)
    again = Expert.load(tmp_path / "run" / "expert.safetensors", fingerprint=mixture.fingerprint)
    assert set(again.names) == set(expert.names)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["config"]["targets"] == "moe"


def test_the_state_has_one_entry_for_the_modules_of_a_layer_and_the_expert_one_for_each(mixture, tmp_path, monkeypatch):
    save, states = Checkpoints.save, []

    def seen(self, step, state):
        states.append(state)
        save(self, step, state)

    monkeypatch.setattr(Checkpoints, "save", seen)
    more = ["rollout.form=factored", "validation.every=1", "validation.size=3", f"run_dir={tmp_path / 'run'}"]
    asked = config.load(overrides=[*STEPS, "task=name_a_colour", "targets=moe", *more])
    expert, _ = runs.train(asked, lm=mixture, task=NameAColour(), progress=False)
    best = states[-1].best.raw
    kinds = ("gate_proj", "up_proj", "down_proj")
    assert set(best) == {f"model.layers.{layer}.mlp.experts.*.{kind}.weight" for layer in (0, 1) for kind in kinds}
    for name, value in expert.raw.items():
        before, after = re.split(r"(?<=experts\.)\d+", name)
        module = int(name[len(before) : -len(after)])
        np.testing.assert_array_equal(value, best[f"{before}*{after}"][module])


def test_a_run_that_holds_no_module_validates_on_short_answers(mixture, tmp_path):
    mixture.save(tmp_path / "model")
    more = ["rollout.form=factored", "validation.every=1", "validation.size=3", f"run_dir={tmp_path / 'run'}"]
    settings = [*STEPS, f"model={tmp_path / 'model'}", "task=name_a_colour", "targets=moe", *more]
    _, result = runs.train(config.load(overrides=settings), task=NameAColour(), progress=False)
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert NameAColour().max_new_tokens < 64
    assert [0 <= row["validation_accuracy"] <= 1 for row in rows] == [True, True]
    assert result["n"] == 3


def test_a_search_on_modules_keeps_them_apart(mixture, tmp_path):
    more = ["train.method=evolution", "evolution.population=4", f"run_dir={tmp_path / 'run'}"]
    asked = config.load(overrides=[*STEPS, "task=name_a_colour", "targets=moe", *more])
    expert, _ = runs.train(asked, lm=mixture, task=NameAColour(), progress=False)
    assert set(expert.names) == set(sva.decompose(mixture, "moe", progress=False))


def test_a_parametrisation_without_a_z_is_refused_in_modules_before_anything_runs(mixture, tmp_path):
    for spelt in ("core:r=2", "lora:r=2,alpha=4"):
        asked = config.load(
            overrides=[
                *STEPS,
                "task=name_a_colour",
                "targets=moe",
                f"parametrisation={spelt}",
                f"run_dir={tmp_path / 'run'}",
            ]
        )
        with pytest.raises(UserError, match=r"does not train in the modules of a mixture \(model\.layers\.0\.mlp"):
            runs.train(asked, lm=mixture, task=NameAColour(), progress=False)
        assert not (tmp_path / "run" / "config.yaml").exists()
