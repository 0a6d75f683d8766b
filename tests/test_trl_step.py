import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from experiments.benchmarks.trl import our_side, trl_step

ROOT = Path(__file__).parent.parent
PINS = ROOT / "experiments" / "benchmarks" / "trl" / "requirements.txt"


def part(seconds, **more):
    return {"seconds": seconds, "cpu_seconds": seconds, "rewards": [-1.0, 0.5], "peak_gb": 2.0, "steps": 5} | more


SHORTS = {
    "short-svf": part([90, 9, 1, 2, 3]),
    "short-trl-1x64": part([1, 1, 12, 14, 13], batch=[1, 64]),
    "short-trl-2x32": part([99, 50, 8, 7, 9], batch=[2, 32]),
    "short-trl-4x16": part([2, 2, 20, 20, 20], batch=[4, 16]),
}


def test_the_best_setting_is_that_of_the_shortest_warm_step():
    assert trl_step.best(SHORTS) == [2, 32]


def test_no_setting_is_the_best_before_all_are_measured():
    with pytest.raises(SystemExit, match="short-trl-4x16; run these parts first"):
        trl_step.best({name: x for name, x in SHORTS.items() if name != "short-trl-4x16"})


def test_the_table_says_what_was_not_run_and_how_much_faster_svf_is():
    rows = {line.split(" | ")[0].lstrip("| "): line for line in trl_step.table(SHORTS).splitlines()}
    assert "| 8.0 | 8.0 | 4.00 |" in rows["short-trl-2x32"]
    assert "not run" in rows["trl"]


def command(*words):
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "experiments.benchmarks.trl.trl_step", *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env, timeout=100, check=False)


def test_what_is_measured_is_printed_without_trl_and_not_measured_again(tmp_path):
    output = tmp_path / "result.json"
    output.write_text(json.dumps(SHORTS))
    made = command("--parts", "short-trl-2x32", "--output", output)
    assert (made.returncode, made.stderr) == (0, "")
    assert "| short-trl-2x32 | 8.0 |" in made.stdout
    other = command("--parts", "short-trl-2x32", "--short", 7, "--output", output)
    assert other.returncode == 2
    assert "need --trl-python" in other.stderr


def test_both_sides_train_at_the_same_size():
    for method in our_side.METHODS:
        config = our_side.config_of(method, Path("somewhere"), 20)
        rollout = config.rollout
        assert (rollout.prompts, rollout.samples, rollout.max_new_tokens, rollout.temperature) == (8, 8, 8, 1.0)
        assert (config.train.steps, config.reinforce.algorithm, config.reinforce.kl_coef) == (21, "grpo", 0.0)


def test_the_extra_bench_pins_what_trls_interpreter_has():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = set(PINS.read_text().splitlines())
    ours = {pin for pin in extras["bench"] if not pin.startswith(("llama-cpp-python", "lm-eval"))}
    assert {pin.partition("==")[0] for pin in ours} >= {
        "torch",
        "trl",
        "peft",
        "transformers",
        "accelerate",
        "datasets",
    }
    assert ours <= pinned
