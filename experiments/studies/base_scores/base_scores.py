"""What SmolLM2-135M-Instruct (Q4_1) scores on GSM8K, ARC-Easy, ARC-Challenge and MBPP+ before any expert.

    python experiments/studies/base_scores/base_scores.py [--rows N] [--scan] [RUN[=EXAMPLES] ...]  # writes result.json

Greedy, sva's own prompts, zero-shot, test split (MBPP+: the public code's). Runs that are named, as
gsm8k-generation=512, are made, of the first EXAMPLES examples or of all; the others' scores in result.json stay. One
set of completions is graded twice, by the strict grader and by the public code's verdicts. ARC is also answered by
option likelihood, per character and whole, in the leaderboards' format without a chat template. Records go to
runs/base_scores; a stopped run resumes, and with more examples too. --rows answers are decoded at once; --scan
compiles one layer for all, which a GPU wants.
"""

import argparse
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
from sva.utils.files import write_json
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
        answer, batch = evaluate.choosing(lm, 32)
    else:
        answer, batch = evaluate.by_refilling(lm, budget, rows), 16 * rows
    with resumed(path, settings, {"command": command(), "versions": versions()}) as file:
        made = evaluate.recorded(file, todo, answer, batch, f"{name} by {by}")
    result = {"task": name, "by": by, "n": len(made), "of": len(task(name).source("test"))}
    if by == "likelihood":
        return result | likelihood_scores(made)
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
    parser.add_argument("runs", nargs="*", metavar="RUN[=EXAMPLES]")
    arguments = parser.parse_args()
    wanted = dict(run.partition("=")[::2] for run in arguments.runs or ["-".join(run) for run in RUNS])
    if unknown := wanted.keys() - {"-".join(run) for run in RUNS}:
        parser.error(f"no run {', '.join(unknown)}; there are {', '.join('-'.join(run) for run in RUNS)}")
    compile_cache.start()
    lm = load(MODEL, scan_layers=arguments.scan)
    place = Path(__file__).parent / "result.json"
    scores = {(row["task"], row["by"]): row for row in json.loads(place.read_text())["scores"]}
    header = {"model": lm.name, "quantisation": lm.quantisation, "dtype": str(lm.model.dtype.__name__)}
    for name, by in RUNS:
        if (examples := wanted.get(f"{name}-{by}")) is not None:
            made_by = {"device": jax.devices()[0].device_kind, "command": command(), "versions": versions()}
            scores[name, by] = score(lm, name, by, int(examples or 10**6), arguments.rows) | made_by
            write_json(place, header | {"scores": list(scores.values()), "reported": REPORTED})


if __name__ == "__main__":
    main()
