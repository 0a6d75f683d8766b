"""Greedy evaluation of SmolLM2-135M-Instruct on GSM8K: rows that are refilled beside rows that wait for the longest.

    python experiments/engine/evaluation.py      # writes evaluation.json beside this file

The first 128 test questions, 256 new tokens at most, 32 rows, float32, end tokens where the model writes them. Each
way runs once to compile, then twice in turn.
"""

import json
import statistics
import time
from pathlib import Path

from sva import evaluate, runtime
from sva.files import write_json
from sva.lm import load
from sva.runs import command, versions
from sva.tasks import task

QUESTIONS, BUDGET, ROWS, ROUNDS = 128, 256, 32, 2


def main() -> None:
    runtime.start()
    lm = load("smollm2-135m-instruct-q4_1")
    todo = evaluate.items(task("gsm8k"), "test", QUESTIONS)
    wait = evaluate.by_generation(lm, BUDGET)
    runs = {
        "waiting": lambda: [
            record for start in range(0, len(todo), ROWS) for record in wait(todo[start : start + ROWS])
        ],
        "refilled": lambda: evaluate.by_refilling(lm, BUDGET, ROWS, progress=False)(todo),
    }
    records = {name: run() for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
            print(f"{name}: {times[name][-1]:.1f} s", flush=True)
    result = {
        "questions": QUESTIONS,
        "budget": BUDGET,
        "rows": ROWS,
        "tokens": sum(record.tokens for record in records["waiting"]),
        "cut_off_at_the_budget": sum(record.tokens == BUDGET for record in records["waiting"]),
        "same_text": sum(a.completion == b.completion for a, b in zip(*records.values(), strict=True)),
        "seconds": times,
        "ratio": statistics.median(times["waiting"]) / statistics.median(times["refilled"]),
        "command": command(),
        "versions": versions(),
    }
    write_json(Path(__file__).with_name("evaluation.json"), result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
