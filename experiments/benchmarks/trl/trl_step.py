"""A step of training and what twenty of them teach: sva with SVF, sva with LoRA, TRL with PEFT's LoRA, in turn.

    python -m experiments.benchmarks.trl.trl_step --trl-python /tmp/trl-venv/bin/python      # writes result.json here

GRPO on the task `largest`, SmolLM2-135M-Instruct in float32: 8 prompts x 8 samples x 8 new tokens a step, the same
prompts in the same order, no KL, one update a batch. sva saves the checkpoint that all of them load. `requirements.txt`
says what TRL's interpreter has; `README.md` what came out.

Each part is a process of its own, so that its peak of memory is its own, and is saved when it is done; the same
command skips what is there. The parts in their order:

short-*   a few steps of everything; TRL at 64 completions at once, 2 x 32 and 4 x 16 by gradient accumulation
svf, trl, lora   --steps updates and one more rollout, whose rewards are those after so many updates; TRL at the
          setting whose step was the shortest
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
BATCHES = {"1x64": (1, 64), "2x32": (2, 32), "4x16": (4, 16)}  # micro-batches x completions of each
# TRL's stand between sva's, so that a machine that gets slower or faster favours nobody.
SHORT = ("short-trl-1x64", "short-svf", "short-trl-2x32", "short-lora", "short-trl-4x16")
PARTS = (*SHORT, "svf", "trl", "lora")
COLD = 2  # steps that compile or fill caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", type=Path, help="the interpreter that has TRL and PEFT")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        metavar="PART",
        help="one or several of " + ", ".join(PARTS) + " (default: all that are missing)",
    )
    parser.add_argument("--steps", type=int, default=20, help="updates of the long parts (default: %(default)s)")
    parser.add_argument("--short", type=int, default=5, help="updates of the short parts (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=HERE / "result.json", help="(default: result.json here)")
    arguments = parser.parse_args()
    jobs = [{"part": part, "steps": arguments.short if part in SHORT else arguments.steps} for part in arguments.parts]
    found = read(arguments.output)
    missing = [job for job in jobs if found.get(job["part"], {}).get("steps") != job["steps"]]
    python = arguments.trl_python
    if any("trl" in job["part"] for job in missing) and not (python and python.exists()):
        parser.error("TRL's parts need --trl-python PYTHON, of an environment made from requirements.txt")
    if missing:
        measure(missing, python, arguments.output)
    print(table(read(arguments.output)))


def measure(jobs: Sequence[dict[str, Any]], trl_python: Path, output: Path) -> None:
    """Runs the parts one after another on one checkpoint, and saves what each found.

    Raises:
      SystemExit: the checkpoint could not be made, or TRL's best setting is not known yet.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepare = {"part": "prepare", "steps": 1 + max(job["steps"] for job in jobs)}
        if run(sys.executable, "our_side", directory, prepare) is None:
            sys.exit("the checkpoint could not be made, for the reason above")
        for job in jobs:
            part = job["part"]
            if "trl" in part:
                job["batch"] = BATCHES[part.removeprefix("short-trl-")] if part in SHORT else best(read(output))
                found = run(trl_python, "trl_side", directory, job)
            else:
                found = run(sys.executable, "our_side", directory, job)
            if found is None:
                print(f"{part}: failed, for the reason above; the same command tries it again", file=sys.stderr)
            else:
                save(output, read(output) | {part: job | found})


def run(python: str | Path, module: str, directory: Path, job: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a part found, in a process of its own; None where it failed. The load is that of other work."""
    print(f"{job['part']} ...", file=sys.stderr, flush=True)
    before = os.getloadavg()[0]
    settings, out = directory / "job.json", directory / "out.json"
    settings.write_text(json.dumps(dict(job)))
    out.unlink(missing_ok=True)
    command = [str(python), "-m", f"experiments.benchmarks.trl.{module}", str(directory)]
    code = subprocess.run(command, cwd=ROOT, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"}).returncode
    if code or not out.is_file():
        return None
    return json.loads(out.read_text()) | {"load_before": before, "load_after": os.getloadavg()[0]}


def best(found: Mapping[str, Any]) -> Sequence[int]:
    """TRL's batch setting whose warm step was the shortest.

    Raises:
      SystemExit: one of the three was not measured.
    """
    names = [name for name in SHORT if "trl" in name]
    if missing := [name for name in names if name not in found]:
        sys.exit(f"TRL's best setting is not known before {', '.join(missing)}; run these parts first")
    return found[min(names, key=lambda name: seconds(found[name]))]["batch"]


def seconds(part: Mapping[str, Any], of: str = "seconds") -> float:
    """The median of a part's warm steps."""
    times = part[of]
    return median(times[min(COLD, len(times) - 1) :])


def table(found: Mapping[str, Any]) -> str:
    """Markdown: a row a part; a long part's step beside the short ones' of the same round in `ratio`."""
    lines = [
        "| part | seconds a warm step | CPU seconds | SVF is faster by | peak memory, GB | reward at first | after |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in PARTS:
        if name not in found:
            lines.append(f"| {name} | not run | | | | | |")
            continue
        part, beside = found[name], found.get("short-svf" if name in SHORT else "svf")
        ratio = f"{seconds(part) / seconds(beside):.2f}" if beside else ""
        after = f"{part['rewards'][-1]:+.2f} ({part['steps']} updates)"
        batch = f" ({part['batch'][0]} x {part['batch'][1]})" if "batch" in part and name not in SHORT else ""
        numbers = f"{seconds(part):.1f} | {seconds(part, 'cpu_seconds'):.1f} | {ratio} | {part['peak_gb']:.2f}"
        lines.append(f"| {name}{batch} | {numbers} | {part['rewards'][0]:+.2f} | {after} |")
    return "\n".join(lines)


def read(path: Path) -> dict[str, Any]:
    """The results so far."""
    return json.loads(path.read_text()) if path.is_file() else {}


def save(path: Path, result: Mapping[str, Any]) -> None:
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".part").replace(path)


if __name__ == "__main__":
    main()
