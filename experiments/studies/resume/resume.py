"""A run killed with SIGKILL at ten random moments and resumed each time, beside one that nothing disturbed.

    python experiments/studies/resume/resume.py                                  # the toy model: writes toy.json
    python experiments/studies/resume/resume.py smollm2-135m-instruct-q4_1       # writes NAME.json beside this file

Both runs are 20 steps of policy gradient in processes of their own. Moments are drawn from one seed, in steps: a whole
number of finished steps and a part of the next, which is waited for by the last step's time once the process is in its
loop; so a kill falls into rollouts, updates, saves and the writing of metrics alike. What is compared are the bytes of
z, of the optimiser's moments and of the metrics but for times.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from sva.generation.decompose import decompose
from sva.generation.load import load
from sva.generation.testing import NameAColour, toy_lm
from sva.parallel import compile_cache as runtime
from sva.spectral.parametrisations import SIGMOID_NUCLEAR
from sva.tasks import task
from sva.training.config.reinforce import ReinforceConfig
from sva.training.config.rollout import RolloutConfig
from sva.training.config.train import TrainConfig
from sva.training.loop import fit
from sva.training.metrics import read
from sva.training.run import command, versions
from sva.utils.files import write_json

STEPS, KILLS = 20, 10


def run(model: str, run_dir: Path) -> None:
    """One process of the run: goes on where the last was killed, and leaves the final state's bytes."""
    runtime.start()
    run_dir.mkdir(exist_ok=True)
    is_toy = model == "toy"
    lm = toy_lm() if is_toy else load(model, progress=False)
    state = fit(
        lm,
        decompose(lm, "mlp", progress=False),
        SIGMOID_NUCLEAR,
        NameAColour() if is_toy else task("last_letter"),
        run_dir,
        # The toy's steps are made long enough to be met in the z.
        rollouts=RolloutConfig(32, 16) if is_toy else RolloutConfig(4, 4, max_new_tokens=8),
        loss=ReinforceConfig(kl_coef=0.1),
        cfg=TrainConfig(steps=STEPS, micro_batch=2, remat=False),
        seed=0,
    )
    leaves = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(state)}
    np.savez(run_dir / "final.npz", **leaves)


def child(model: str, run_dir: Path) -> subprocess.Popen:
    """The same in a process of its own."""
    return subprocess.Popen([sys.executable, __file__, model, "--run-dir", str(run_dir)])


def disturbed(model: str, run_dir: Path) -> list[float]:
    """Runs to the end, killed on the way; returns the moments, in steps."""
    rng = np.random.default_rng(0)
    moments = np.sort(rng.uniform(0, STEPS, KILLS))
    log = run_dir / "metrics.jsonl"
    for moment in moments:
        before = file_of(log)
        process = child(model, run_dir)
        while file_of(log) in (before, None) and process.poll() is None:  # written anew when the loop begins
            time.sleep(0.01)
        while len(rows := read(log)) < int(moment) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(float(moment % 1) * (rows[-1]["step_seconds"] if rows else 1.0))
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError(f"the run ended by itself before moment {moment:.2f}")
        print(f"killed at {moment:.2f} steps", file=sys.stderr)
    if child(model, run_dir).wait():
        raise RuntimeError("the last process failed")
    return moments.tolist()


def file_of(path: Path) -> int | None:
    """What tells a file from its replacement."""
    return path.stat().st_ino if path.exists() else None


def metrics_of(run_dir: Path) -> list[dict]:
    """The rows but for times."""
    rows = read(run_dir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.endswith(("_seconds", "_per_second"))} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="toy")
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run_dir:
        run(arguments.model, arguments.run_dir)
        return
    started = time.time()
    with tempfile.TemporaryDirectory() as temporary:
        whole, killed = Path(temporary) / "whole", Path(temporary) / "killed"
        if child(arguments.model, whole).wait():
            raise RuntimeError("the undisturbed run failed")
        moments = disturbed(arguments.model, killed)
        with np.load(whole / "final.npz") as one, np.load(killed / "final.npz") as two:
            differing = [name for name in one.files if one[name].tobytes() != two[name].tobytes()]
            result = {
                "model": arguments.model,
                "steps": STEPS,
                "killed_at_steps": moments,
                "arrays": len(one.files),
                "arrays_that_differ": differing,
                "numbers": int(sum(one[name].size for name in one.files)),
                "metrics_equal": metrics_of(whole) == metrics_of(killed),
                "rows": len(metrics_of(killed)),
                "seconds": round(time.time() - started, 1),
                "versions": versions(),
                "command": command(),
            }
    write_json(Path(__file__).with_name(f"{arguments.model}.json"), result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
