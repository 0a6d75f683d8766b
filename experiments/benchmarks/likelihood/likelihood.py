"""Options scored by likelihood beside lm-eval's `hf` model: 200 ARC-Easy questions, seconds and choices.

    python -m experiments.benchmarks.likelihood.likelihood    # extra `bench`; writes result.json beside this file

SmolLM2-135M-Instruct in float32, the same weights in both (`lm.save`), the same text, and the same token ids, which is
checked. The sides are asked in turn, each in a process of its own (in one, torch slows XLA by a third), after
all programs are compiled and lm-eval has scored 32 questions. Tokenizing is inside the times of both. The result is
written after every round (an argument says how many), with the processor seconds of each run and the machine's load:
beside other work torch's threads wait for each other, and only runs at a load near the number of cores compare well.
"""

import json
import os
import statistics
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from experiments.benchmarks.sides import answer, started
from sva.evaluation import evaluate
from sva.evaluation.likelihood import followed, option_logprobs
from sva.generation.load import load
from sva.parallel import compile_cache
from sva.tasks import task
from sva.utils.files import write_json
from sva.utils.provenance import command, versions

MODEL = "smollm2-135m-instruct-q4_1"
SIZE, BATCH, ROUNDS = 200, 16, 3


def questions() -> list:
    """The prompts and options of ARC-Easy's first test questions."""
    return [item.task.options(item.example) for item in evaluate.items(task("arc_easy"), "test", SIZE)]


def serve_sva(pipe: Connection, directory: str) -> None:
    """Writes the model, then scores once a request: token ids first, then (log-probabilities, seconds, CPU seconds)."""
    compile_cache.start()
    lm, asked = load(MODEL), questions()
    lm.save(Path(directory))
    prompts, texts = [ask.prompt for ask in asked], [ask.texts for ask in asked]
    option_logprobs(lm, prompts, texts)
    pipe.send(
        [(head, tail) for ask in asked for head, tails in [followed(lm, ask.prompt, ask.texts)] for tail in tails]
    )
    answer(pipe, lambda _: option_logprobs(lm, prompts, texts))


def serve_lm_eval(pipe: Connection, directory: str) -> None:
    """As `serve_sva`, by lm-eval's `hf` model on the same weights; of its first message the last part is versions."""
    import lm_eval
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = questions()
    peer = HFLM(pretrained=directory, dtype="float32", device="cpu", batch_size=BATCH)
    pairs = [(ask.prompt, text) for ask in asked for text in ask.texts]
    requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(pairs)]

    def score(requests: list[Instance]) -> list[float]:
        return [nats for nats, _ in peer.loglikelihood(requests, disable_tqdm=True)]

    score(requests[:128])
    about = {"torch": torch.__version__, "lm_eval": lm_eval.__version__, "threads": torch.get_num_threads()}
    pipe.send(([peer._encode_pair(*pair) for pair in pairs], about))
    answer(pipe, lambda _: split(score(requests), asked))


def split(values, asked) -> list[list[float]]:
    """The values of each question's options."""
    each = iter(values)
    return [[next(each) for _ in ask.texts] for ask in asked]


def choices(scores, asked) -> dict[str, list[int]]:
    """The option of every question, per character and as a whole."""
    lengths = [[len(text) for text in ask.texts] for ask in asked]
    return {
        "per character": [evaluate.likeliest(*pair) for pair in zip(scores, lengths, strict=True)],
        "whole": [evaluate.likeliest(each) for each in scores],
    }


def main() -> None:
    asked = questions()
    with tempfile.TemporaryDirectory() as directory:
        sva = started(serve_sva, directory)
        ids = sva.recv()
        peer = started(serve_lm_eval, directory)
        peer_ids, about = peer.recv()
    result = {
        "model": MODEL,
        "questions": SIZE,
        "batch_size": BATCH,
        "cores": os.cpu_count(),
        "same_token_ids": ids == peer_ids,
        "versions": versions() | about,
        "command": command(),
    }
    times, others = ({"sva": [], "lm-eval": []} for _ in range(2))
    for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS):
        scores = {}
        for name, pipe in (("sva", sva), ("lm-eval", peer)):
            pipe.send(True)
            scores[name], seconds, worked = pipe.recv()
            times[name].append(seconds)
            others[name].append({"cpu_seconds": worked, "load": os.getloadavg()[0]})
            print(f"{name}: {seconds:.1f} s, {others[name][-1]}", flush=True)
        result |= measured(times, scores, asked) | {"runs": others}
        write_json(Path(__file__).with_name("result.json"), result)
    print(json.dumps(result, indent=2))


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
