import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "experiments" / "benchmarks" / "paper_step" / "paper_step.py"


def step(output, *more):
    sizes = ["--toy", "--prompts", "4", "--rows", "2", "--micro", "2", "--parts", "rollout", "update"]
    command = [sys.executable, SCRIPT, *sizes, "--output", output, *more]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, timeout=500, check=True)


def test_the_papers_step_runs_at_a_toy_shape_and_what_is_done_is_not_done_again(tmp_path):
    output = tmp_path / "result.json"
    made = step(output)
    saved = json.loads(output.read_text())
    assert set(saved) == {"rollout, dense, unrolled", "update, dense, unrolled"}, made.stderr
    found = {name.partition(",")[0]: about for name, about in saved.items()}
    listed = json.loads((SCRIPT.parents[1] / "rollout" / "lengths.json").read_text())
    tokens = sum(max(row[0] // 16, 2) for row in listed["answers"][:4])
    assert (found["rollout"]["rows_finished"], found["rollout"]["tokens"]) == (4, tokens)
    assert abs(found["update"]["metrics"]["kl"]) < 1e-3  # the first policy is the base
    assert found["update"]["metrics"]["grad_norm"] > 0
    again = step(output)
    assert again.stderr.count("already in") == 2
    assert json.loads(output.read_text()) == saved
    late = step(tmp_path / "late.json", "--minutes", "0.5")
    assert "0.5 minutes are left" in late.stderr
    assert not (tmp_path / "late.json").exists()
