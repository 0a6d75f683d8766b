"""Options scored by likelihood beside lm-eval's `hf` model: 200 ARC-Easy questions, seconds and choices.

    python experiments/benchmarks/likelihood/likelihood.py          # extra `bench`; writes result.json beside this file

SmolLM2-135M-Instruct in float32, the same weights in both (`lm.save`), the same text, and the same token ids, which is
checked. Both sides in one process and in turn, after all programs are compiled and lm-eval has scored 32 questions.
Tokenizing is inside the times of both. The result is written after every round (an argument says how
many), with the processor seconds of each run and the machine's load: beside other work torch's threads wait for each
other, and only runs at a load near the number of cores compare well.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import lm_eval
import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from sva.evaluation import evaluate
from sva.evaluation.likelihood import followed, option_logprobs
from sva.generation.load import load
from sva.parallel import compile_cache
from sva.tasks import task
from sva.utils.files import write_json
from sva.utils.provenance import command, versions

SIZE, BATCH, ROUNDS = 200, 16, 3


def peer_of(lm, directory: Path) -> HFLM:
    """lm-eval's model on the same weights."""
    lm.save(directory)
    return HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=BATCH)


def requests(asked) -> list[Instance]:
    """What lm-eval's ARC-Easy task asks of a model: a pair of prompt and option each."""
    pairs = [(ask.prompt, text) for ask in asked for text in ask.texts]
    return [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]


def split(values, asked) -> list[list[float]]:
    """The values of each question's options."""
    each = iter(values)
    return [[next(each) for _ in ask.texts] for ask in asked]


def same_tokens(lm, peer: HFLM, asked) -> bool:
    """Whether both take every pair as the same ids."""
    return all(
        (head, tail) == peer._encode_pair(ask.prompt, text)
        for ask in asked
        for head, tails in [followed(lm, ask.prompt, ask.texts)]
        for tail, text in zip(tails, ask.texts, strict=True)
    )


def choices(scores, asked) -> dict[str, list[int]]:
    """The option of every question, per character and as a whole."""
    lengths = [[len(text) for text in ask.texts] for ask in asked]
    return {
        "per character": [evaluate.likeliest(*pair) for pair in zip(scores, lengths, strict=True)],
        "whole": [evaluate.likeliest(each) for each in scores],
    }


def main() -> None:
    compile_cache.start()
    lm = load("smollm2-135m-instruct-q4_1")
    asked = [item.task.options(item.example) for item in evaluate.items(task("arc_easy"), "test", SIZE)]
    with tempfile.TemporaryDirectory() as directory:
        peer = peer_of(lm, Path(directory) / "model")
    runs = {
        "sva": lambda asked: option_logprobs(lm, [ask.prompt for ask in asked], [ask.texts for ask in asked]),
        "lm-eval": lambda asked: split((x for x, _ in peer.loglikelihood(requests(asked), disable_tqdm=True)), asked),
    }
    runs["sva"](asked)
    runs["lm-eval"](asked[:32])
    result = {
        "model": lm.name,
        "questions": SIZE,
        "lm_eval": {"version": lm_eval.__version__, "batch_size": BATCH},
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "same_token_ids": same_tokens(lm, peer, asked),
        "versions": versions() | {"torch": torch.__version__},
        "command": command(),
    }
    times, others = ({name: [] for name in runs} for _ in range(2))
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS):
        scores = {}
        for name, run in runs.items():
            started, worked = time.perf_counter(), time.process_time()
            scores[name] = run(asked)
            times[name].append(time.perf_counter() - started)
            others[name].append({"cpu_seconds": time.process_time() - worked, "load": os.getloadavg()[0]})
            print(f"{name}: {times[name][-1]:.1f} s, {others[name][-1]}", flush=True)
        write_json(Path(__file__).with_name("result.json"), result | measured(times, scores, asked) | {"runs": others})
    print(json.dumps(result | measured(times, scores, asked) | {"runs": others}, indent=2))


def measured(times, scores, asked) -> dict:
    """Ratio of the medians, and how far the scores of the last round agree."""
    medians = {name: statistics.median(found) for name, found in times.items()}
    chosen = {name: choices(each, asked) for name, each in scores.items()}
    errors = np.abs(np.subtract(*(np.concatenate(each) for each in scores.values())))
    return {
        "seconds": times,
        "ratio": medians["lm-eval"] / medians["sva"],
        "ratios": [a / b for a, b in zip(times["lm-eval"], times["sva"], strict=True)],
        "equal_choices": {
            kind: sum(a == b for a, b in zip(*(each[kind] for each in chosen.values()), strict=True))
            for kind in ("per character", "whole")
        },
        "options": len(errors),
        "largest_difference_nats": float(errors.max()),
    }


if __name__ == "__main__":
    main()
