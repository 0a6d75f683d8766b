"""Llama-3-8B and 70B, and mixtures, on pods that are not there: what each chip would hold and do, by `sva compile`.

Those named paper-... are of configs/paper: 256 prompts, the base's pass for the KL, 70B with half of its layers. The
mixtures have the paper's settings too, with z on the modules' matrices alone and the modules divided over eight chips.

    python experiments/benchmarks/compile/compile.py  # extra `aot`; makes the reports that are missing, then the table
    python experiments/benchmarks/compile/compile.py --table    # the table of those that are there

One JSON file a configuration and program beside this file, each with its command. A rollout is one round of it, of 8
tokens a row; those of the first three are whole ones, made when it was one program. The 70B update takes the compiler
five to twenty minutes, the others a few. Prompts of 255 tokens, completions of 768 or, of the paper, 512: no number of
tokens is the width of a weight.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PROGRAMS = ("update", "rollout", "two_pass")


class Run(NamedTuple):
    """What is compiled under one name."""

    config: str
    topology: str
    programs: tuple[str, ...] = PROGRAMS
    overrides: tuple[str, ...] = ()
    two_pass: tuple[str, ...] = ()  # more of them for this program


_8B, _70B, _MISTRAL = "paper/llama3-8b-gsm8k", "paper/llama3-70b-gsm8k", "paper/mistral-7b-gsm8k"
_LOW_RANK = "r=16,alpha=32"
_MIXTRAL, _QWEN = (f"model=configs/models/{name}" for name in ("mixtral-8x7b-v0.1", "qwen3-30b-a3b"))


def _mixture(model: str, topology: str, fsdp: int, moe: int, rows: int = 64) -> Run:
    """A mixture with z on its modules; completions and two passes of so many rows at a time."""
    mesh = (f"mesh.fsdp={fsdp}", f"mesh.moe={moe}")
    settings = (
        "targets=moe",
        *mesh,
        "rollout.form=factored",
        f"rollout.rows={rows}",
        f"train.micro_batch={fsdp * moe}",
    )
    return Run(_MISTRAL, topology, overrides=(model, *settings), two_pass=(f"rollout.prompts={rows // 2}",))


RUNS = {
    "llama3-8b-v5e-16": Run("llama3-8b-v5e-16", "v5e:4x4"),
    "llama3-70b-v5e-16": Run("llama3-70b-v5e-16", "v5e:4x4"),
    "llama3-70b-v5p-16": Run("llama3-70b-v5p-16", "v5p:2x2x4"),
    "paper-llama3-8b-gsm8k": Run(_8B, "v5e:4x4", ("update", "rollout")),
    "paper-llama3-70b-gsm8k-v5e-16": Run(_70B, "v5e:4x4", ("update", "rollout")),
    "paper-llama3-70b-gsm8k-v5p-16": Run(_70B, "v5p:2x2x4", ("update", "rollout")),
    "paper-llama3-8b-lora": Run(
        _8B, "v5e:4x4", ("update",), (f"parametrisation=lora:{_LOW_RANK}", "targets=attention")
    ),
    "paper-llama3-8b-dora": Run(
        _8B, "v5e:4x4", ("update",), (f"parametrisation=dora:{_LOW_RANK}", "targets=attention")
    ),
    "paper-llama3-8b-ia3": Run(_8B, "v5e:4x4", ("update",), ("parametrisation=ia3",)),
    "paper-llama3-8b-gsm8k-public": Run(f"{_8B}-public", "v5e:4x4", ("update", "rollout")),
    "paper-mistral-7b-gsm8k": Run(_MISTRAL, "v5e:4x4", ("update", "rollout")),
    "mixtral-8x7b-v5e-16": _mixture(_MIXTRAL, "v5e:4x4", fsdp=2, moe=8),
    "mixtral-8x7b-v5p-8": _mixture(_MIXTRAL, "v5p:2x2x1", fsdp=1, moe=4),
    "qwen3-30b-a3b-v5e-8": _mixture(_QWEN, "v5e:2x4", fsdp=1, moe=8, rows=16),
    "qwen3-30b-a3b-v5p-8": _mixture(_QWEN, "v5p:2x2x1", fsdp=1, moe=4),
}
GIB = 2**30


def make(run: Run, program: str, output: Path) -> None:
    """One report, by the command that a user would give."""
    root = HERE.parents[2]
    call = [sys.executable, "-m", "sva.cli.main", "compile", f"configs/{run.config}.yaml", *run.overrides]
    call += [*(run.two_pass if program == "two_pass" else ()), "--topology", run.topology]
    subprocess.run([*call, "--program", program, "--output", str(output.relative_to(root))], check=True, cwd=root)


def row(name: str, report: dict) -> str:
    """One line of the table; GiB and TFLOP of one chip."""
    ((_, program),) = report["programs"].items()
    memory = {**report["run"]["resident"], **program["memory"]}
    cells = [memory.get(kind, 0) for kind in ("weights", "spectra", "merged weights", "rows", "temporaries")]
    cells.append(report["run"].get("at_most") or sum(memory.values()) - memory.get("cache", 0))
    text = " | ".join(f"{cell / GIB:.2f}" for cell in cells)
    if "refused" in program:
        return f"| {name} | {text} | does not fit | | | |"
    sent = sum(size for _, size in program["collectives"].values())
    ratio = program["flops_all"] / program["flops_closed_form"]
    shaped = len(program["weight_shaped_products"])
    return f"| {name} | {text} | {program['flops'] / 1e12:.0f} | {ratio:.3f} | {sent / 1e9:.0f} | {shaped} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--table", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    names = ("program", "weights", "spectra", "merged", "keys and values", "temporaries", "together")
    names += ("TFLOP", "of closed form", "GB sent", "W-shaped")
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for title, run in RUNS.items():
        for program in run.programs:
            output = HERE / f"{title}-{program}.json"
            if not output.exists() and not arguments.table:
                make(run, program, output)
            name = f"{title} {program}"
            print(row(name, json.loads(output.read_text())) if output.exists() else f"| {name} | not run |", flush=True)


if __name__ == "__main__":
    main()
