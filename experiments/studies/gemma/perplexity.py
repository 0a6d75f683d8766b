"""Is gemma-3-270m here the model that llama.cpp runs: token ids, and perplexity on GSM8K, of the same GGUF file.

    python -m experiments.studies.gemma.perplexity LIBRARY [--size 100] [--out result.json]

LIBRARY exports llama.cpp's C functions: libllama.so, or xllamacpp.abi3.so of the Python package xllamacpp. Texts are
the first GSM8K test questions with their answers, one by one, a <bos> in front; the perplexity is exp of the mean
negative log-probability (nats) of all tokens after the first. llama.cpp computes with the packed weights and
activations in 8 bits, sva with the weights unpacked to float32, so the two are close and not equal. Ids are compared
of all 1,319 bare questions. Fetch the model first: SVA_ACCEPT_LICENCES=gemma sva fetch gemma-3-270m-q4_k_m.
"""

import argparse
import gzip
import json
import math
import sys
from pathlib import Path

import jax
import numpy as np

import sva
from experiments.studies.gemma.llama_cpp import LlamaCpp
from experiments.studies.tokenizer_parity import digest, questions
from sva.evaluation.likelihood import continuation_logprobs
from sva.models.hub import resolve
from sva.utils.paths import data_dir

MODEL = "gemma-3-270m-q4_k_m"


def texts(size: int) -> list[str]:
    """The first questions with their answers."""
    folder = data_dir()
    if folder is None:
        sys.exit("no data: set SVA_DATA to the folder that holds gsm8k_test.jsonl.gz")
    with gzip.open(folder / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [f"{row['question']}\n{row['answer']}" for row in rows[:size]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    lm = sva.load(MODEL, progress=False)
    assert lm.tokenizer is not None
    theirs = LlamaCpp(arguments.library, resolve(MODEL))
    bare = questions()
    expected = [theirs.tokenize(text, bos=False) for text in bare]
    found = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in bare]

    sums = {"llama.cpp": 0.0, "sva": 0.0}
    tokens = 0
    for text in texts(arguments.size):
        ids = np.asarray(lm.tokenizer(text)["input_ids"])
        logits = theirs.logits(ids)[:-1]
        logits -= logits.max(axis=1, keepdims=True)
        logps = logits[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(logits).sum(axis=1, dtype=np.float64))
        sums["llama.cpp"] -= float(logps.sum())
        row = np.zeros((3, 1, -(-len(ids) // 128) * 128), np.int32)
        row[:2, 0, : len(ids)] = ids, np.ones_like(ids)
        row[2, 0, 1 : len(ids)] = 1
        sums["sva"] -= float(continuation_logprobs(lm.model, lm.params, *row)[0])
        tokens += len(ids) - 1
    perplexity = {name: math.exp(total / tokens) for name, total in sums.items()}
    result = {
        "model": MODEL,
        "questions_with_equal_ids": sum(a == b for a, b in zip(expected, found, strict=True)),
        "questions": len(bare),
        "sha256_of_llama_cpp_ids": digest(expected),
        "texts": arguments.size,
        "tokens": tokens,
        "perplexity": perplexity,
        "relative_difference": perplexity["sva"] / perplexity["llama.cpp"] - 1,
        "jax": jax.__version__,
        "library": arguments.library.name,
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
