"""One training step at the paper's setting and Llama-3-8B's shape: rollout, update, and the public way beside them.

    python experiments/benchmarks/paper_step/paper_step.py              # one GPU of 80 GB; writes result.json here
    python experiments/benchmarks/paper_step/paper_step.py --toy        # a small shape, on any machine; writes toy.json

256 prompts with one completion each, of the lengths in `../rollout/lengths.json` (up to 512 new tokens), REINFORCE with
KL 0.1, sigmoid_nuclear on mlp, q and v, bfloat16. Weights and spectra are random: spectra are drawn, not decomposed,
and a target weight is U diag(s) V^T of its own. No end token: a row stops at its length.

Each part (rollout, update, public) runs in a process of its own, so that its peak of memory is its own, and is saved
when it is done; the same command skips what is there, and `--minutes` starts no part that the time left is unlikely to
be enough for. Compiling is told apart: every part runs once on few tokens first.

`public` is the public code's way in torch: W' = U diag(s z) V^T composed and copied into transformers' model, its
`generate` for the rollout, one sequence at a time with dense gradients for the update. It runs on a part of the batch;
its times of a whole step are scaled by tokens and so marked.

By hand, in GB: weights 16.1, spectra 17.0 (mlp 14.5, q and v 2.5), merged copies of the targets 12.6, keys and values
of 128 rows of 704 slots 11.8; an update needs no merged copies. Factored rollouts hold no target weights: 3.5 + 17.0.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]
PARTS = {"rollout": 3.0, "update": 3.0, "public": 3.0}  # minutes that a part is expected to take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a small shape, for any machine")
    parser.add_argument("--layers", type=int, help="the first so many layers of the shape")
    parser.add_argument("--form", choices=["dense", "factored"], default="dense", help="of the rollout")
    parser.add_argument("--scan", action="store_true", help="one compiled layer for all")
    parser.add_argument("--rows", type=int, default=128, help="completions drawn at a time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="tokens between two looks at the queue")
    parser.add_argument("--micro", type=int, default=8, help="prompts of a micro-batch (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=256, help="of the step (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=14.0, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, help="the JSON file of results (default: result.json, or toy.json)")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    output = arguments.output or HERE / ("toy.json" if arguments.toy else "result.json")
    if arguments.part:
        run_part(arguments.part, arguments, output)
        return
    deadline = time.monotonic() + 60 * arguments.minutes
    for part in arguments.parts:
        left = deadline - time.monotonic()
        if read(output).get(name(part, arguments), {}).get("settings") == settings(arguments):
            print(f"{name(part, arguments)}: already in {output}", file=sys.stderr)
        elif left < 60 * (1 if arguments.toy else PARTS[part]):
            print(f"{part}: {left / 60:.1f} minutes are left, it takes about {PARTS[part]}", file=sys.stderr)
        else:
            command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--minutes", str(left / 60)]
            try:
                code = subprocess.run(command, timeout=left, check=False).returncode
            except subprocess.TimeoutExpired:
                code = "no time left"
            if code:
                print(f"{part}: ended with {code}; the same command tries it again", file=sys.stderr)
    print(json.dumps(read(output), indent=2))


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What numbers depend on."""
    names = ("toy", "layers", "form", "scan", "rows", "steps", "micro", "prompts")
    return {name: getattr(arguments, name) for name in names}


def name(part: str, arguments: argparse.Namespace) -> str:
    """Of the part's results; the forms that can be compared are kept beside each other."""
    if part == "public":
        return part
    return f"{part}, {arguments.form}, {'scanned' if arguments.scan else 'unrolled'}"


def read(path: Path) -> dict[str, Any]:
    """The results so far."""
    return json.loads(path.read_text()) if path.is_file() else {}


def run_part(part: str, arguments: argparse.Namespace, output: Path) -> None:
    """Runs one part in this process, and saves it."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    started = time.perf_counter()
    if part == "public":
        import public_way

        found = public_way.run(arguments)
    else:
        import our_way

        found = {"rollout": our_way.rollout, "update": our_way.update}[part](arguments)
    found |= {"seconds_in_all": time.perf_counter() - started, "settings": settings(arguments)}
    result = read(output) | {name(part, arguments): found}
    output.with_suffix(".part").write_text(json.dumps(result, indent=2) + "\n")
    output.with_suffix(".part").replace(output)


if __name__ == "__main__":
    main()
