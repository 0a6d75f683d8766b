"""The whole GSM8K test set answered by SmolLM2-135M-Instruct through the engine, timed.

    python experiments/benchmarks/gpu/gsm8k.py [--model FILE] [--rows N] [--dtype D] [--scan] [--out NAME]
    # writes gsm8k.json

1,319 questions, greedy, 256 new tokens at most, end tokens where the model writes them. The first 2 * rows questions
are answered beforehand, which compiles what the rest needs but for a few shapes; all of them are in the time. Unrolled,
an H100's host had not compiled it after 150 s; --scan has one compiled layer for all.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

from sva.evaluation import evaluate
from sva.evaluation.stats import accuracy
from sva.generation.load import load
from sva.parallel import compile_cache
from sva.tasks import task
from sva.utils.files import write_json
from sva.utils.provenance import command, versions

BUDGET = 256


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m-instruct-q4_1")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--out", default="gsm8k.json")
    arguments = parser.parse_args()
    compile_cache.start()
    started = time.perf_counter()
    lm = load(arguments.model, arguments.dtype, scan_layers=arguments.scan)
    todo = evaluate.items(task("gsm8k"), "test", 10_000)
    answer = evaluate.by_refilling(lm, BUDGET, arguments.rows, progress=False)
    answer(todo[: 2 * arguments.rows])
    warm = time.perf_counter()
    records = answer(todo)
    taken = time.perf_counter() - warm
    tokens = sum(record.tokens for record in records)
    result = {
        "model": "smollm2-135m-instruct-q4_1",
        "dtype": arguments.dtype,
        "device": jax.devices()[0].device_kind,
        "questions": len(records),
        "rows": arguments.rows,
        "scan_layers": arguments.scan,
        "budget": BUDGET,
        "seconds": taken,
        "seconds_to_load_and_compile": warm - started,
        "tokens": tokens,
        "tokens_per_second": tokens / taken,
        "cut_off_at_the_budget": sum(record.tokens == BUDGET for record in records),
        "accuracy": accuracy(np.array([record.correct for record in records]))._asdict(),
        "versions": versions(),
        "command": command(),
    }
    write_json(Path(__file__).with_name(arguments.out), result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
