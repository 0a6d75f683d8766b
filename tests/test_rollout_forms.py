import json

import pytest

from sva.generation.testing import THINGS, toy_lm
from sva.training import config, metrics
from sva.training import run as runs
from sva.utils.errors import UserError


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """(name, *overrides) -> Config of a run of two steps on the toy model, with budgets of 64 tokens."""
    directory = tmp_path_factory.mktemp("forms")
    toy_lm().save(directory / "toy")
    lines = [{"prompt": f"what colour the {a} of the {b} ?", "answer": "red red"} for a in THINGS for b in THINGS[:4]]
    task = directory / "red.jsonl"
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    base = [f"model={directory / 'toy'}", f"task={task}", "train.steps=2", "train.lr=0.05", "evaluate.size=3"]
    base += ["rollout.prompts=4", "rollout.samples=2", "rollout.max_new_tokens=64", "reinforce.baseline=none"]

    def load(name, *overrides):
        return config.load(overrides=[*base, f"run_dir={directory / name}", *overrides])

    return load


def losses(settings):
    return [row["loss"] for row in metrics.read(runs.to_path(settings.run_dir) / "metrics.jsonl")]


@pytest.mark.parametrize("kl_coef", [0, 0.1])
def test_a_run_without_the_target_weights_is_the_run_with_them(settings, kl_coef):
    found = {}
    for form in ("dense", "factored"):
        cfg = settings(f"{form}-{kl_coef}", f"rollout.form={form}", f"reinforce.kl_coef={kl_coef}")
        _, result = runs.train(cfg, progress=False)
        found[form] = result["before"], result["after"], losses(cfg)
    assert found["factored"][:2] == found["dense"][:2]
    assert found["factored"][2] == pytest.approx(found["dense"][2], rel=1e-3, abs=1e-4)
    assert found["dense"][2][1] != 0


def test_what_adds_to_the_weights_is_refused_without_them(settings):
    with pytest.raises(UserError, match=r"rollout\.form=factored leaves the target weights out, and core:r=3"):
        settings("core", "rollout.form=factored", "parametrisation=core:r=3")
