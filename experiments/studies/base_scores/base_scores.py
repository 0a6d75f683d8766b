"""What SmolLM2-135M-Instruct (Q4_1) scores on GSM8K, ARC-Easy, ARC-Challenge and MBPP+ before any expert.

    python experiments/studies/base_scores/base_scores.py [--rows N] [--scan] [RUN[=EXAMPLES] ...]  # writes result.json

Greedy, sva's own prompts, zero-shot, test split (MBPP+: the public code's). Runs that are named, as
gsm8k-generation=512, are made, of the first EXAMPLES examples or of all; the others' scores in result.json stay. One
set of completions is graded twice, by the strict grader and by the public code's verdicts. ARC is also answered by
option likelihood, per character and whole, in the leaderboards' format without a chat template. Records go to
runs/base_scores; a stopped run resumes, and with more examples too. --rows answers are decoded at once; --scan
compiles one layer for all, which a GPU wants. Completions are kept in completions/, one in the order of the split, and
--regrade grades those again instead of making them, which is what a change of a grader needs.
"""

import argparse
import gzip
import json
from collections import Counter
from pathlib import Path

import jax
import numpy as np

from sva.cli.evaluate import scores as likelihood_scores
from sva.evaluation import evaluate
from sva.evaluation.stats import accuracy
from sva.generation.lm import LM
from sva.generation.load import load
from sva.parallel import compile_cache
from sva.tasks import task
from sva.tasks.base import Grade, reason
from sva.utils.files import write_atomically, write_json
from sva.utils.jsonl import resumed
from sva.utils.provenance import command, versions

MODEL = "smollm2-135m-instruct-q4_1"
RUNS = (
    ("arc_easy", "generation"),
    ("arc_challenge", "generation"),
    ("mbpp", "generation"),
    ("arc_challenge", "likelihood"),
    ("arc_easy", "likelihood"),
    ("gsm8k", "generation"),
)
# What others report of the unquantised SmolLM2-135M-Instruct, in percent.
REPORTED = {
    "lm-eval, 0-shot (model card of lldois/SmolLM2-135M-Reasoning-SLERP-Champion, baseline column)": {
        "arc_challenge, likelihood per character": 27.73,
        "arc_easy, likelihood whole": 54.12,
        "gsm8k, flexible extraction": 0.38,
    },
    "0-shot (model card of facebook/MobileLLM-R1-140M)": {"gsm8k": 2.4, "math500": 3.0},
}


def score(lm: LM, name: str, by: str, examples: int, rows: int) -> dict:
    """Both graders' accuracies of one task."""
    todo = evaluate.items(task(name), "test", examples)
    budget = todo[0].task.max_new_tokens
    settings = {"task": name, "by": by, "fingerprint": lm.fingerprint, "max_new_tokens": budget}
    path = Path("runs/base_scores") / f"{name}-{by}.jsonl"
    if by == "likelihood":
        answer, batch = evaluate.by_likelihood(lm), 8
    else:
        answer, batch = evaluate.by_refilling(lm, budget, rows), 16 * rows
    with resumed(path, settings, {"command": command(), "versions": versions()}) as file:
        made = evaluate.recorded(file, todo, answer, batch, f"{name} by {by}")
    if by == "likelihood":
        return {"task": name, "by": by, "n": len(made), "of": len(task(name).source("test"))} | likelihood_scores(made)
    kept = [{"completion": row["completion"], "tokens": row["tokens"]} for row in made]
    write_atomically(_kept(name), lambda file: file.write_bytes(gzip.compress(json.dumps(kept).encode(), mtime=0)))
    return graded(name)


def _kept(name: str) -> Path:
    """Where the completions of a task are kept."""
    return Path(__file__).parent / "completions" / f"{name}.json.gz"


def graded(name: str) -> dict:
    """Both graders' accuracies of the completions that are kept of a task."""
    made = json.loads(gzip.decompress(_kept(name).read_bytes()))
    todo = evaluate.items(task(name), "test", len(made))
    budget = todo[0].task.max_new_tokens
    result = {"task": name, "by": "generation", "n": len(made), "of": len(task(name).source("test"))}
    for grader in ("strict", "reference"):  # of the same completions, by the graders of today
        completions, examples = [row["completion"] for row in made], [item.example for item in todo]
        verdicts = task(name, grader).grade_many(completions, examples)
        right = np.array([verdict.correct for verdict in verdicts])
        result[grader] = {"accuracy": accuracy(right)._asdict(), "reasons": dict(Counter(map(kind, verdicts)))}
    return result | {
        "tokens": sum(row["tokens"] for row in made),
        "cut_off_at_the_budget": sum(row["tokens"] == budget for row in made),
    }


def kind(verdict: Grade) -> str:
    """A verdict's reason without what it says of this one program or answer."""
    return reason(verdict).partition(":")[0].partition(" that defines")[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--regrade", action="store_true")
    parser.add_argument("runs", nargs="*", metavar="RUN[=EXAMPLES]")
    arguments = parser.parse_args()
    wanted = dict(run.partition("=")[::2] for run in arguments.runs or ["-".join(run) for run in RUNS])
    if unknown := wanted.keys() - {"-".join(run) for run in RUNS}:
        parser.error(f"no run {', '.join(unknown)}; there are {', '.join('-'.join(run) for run in RUNS)}")
    place = Path(__file__).parent / "result.json"
    result = json.loads(place.read_text())
    scores = {(row["task"], row["by"]): row for row in result["scores"]}
    lm = None if arguments.regrade else _model(arguments.scan)
    for name, by in RUNS:
        if (examples := wanted.get(f"{name}-{by}")) is None or (lm is None and by != "generation"):
            continue
        if lm is None:
            made_by = {
                "graded_by": command(),
                **{key: scores[name, by][key] for key in ("device", "command", "versions")},
            }
            scores[name, by] = graded(name) | made_by
        else:
            made_by = {"device": jax.devices()[0].device_kind, "command": command(), "versions": versions()}
            scores[name, by] = score(lm, name, by, int(examples or 10**6), arguments.rows) | made_by
        write_json(place, result | {"scores": list(scores.values()), "reported": REPORTED})


def _model(scan: bool) -> LM:
    compile_cache.start()
    return load(MODEL, scan_layers=scan)


if __name__ == "__main__":
    main()
