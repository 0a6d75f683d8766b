"""Is gemma-3-270m here the model that llama.cpp runs: token ids, and perplexity on GSM8K, of the same GGUF file.

    python -m experiments.studies.gemma.perplexity LIBRARY [--size 100] [--out experiments/studies/gemma/result.json]

LIBRARY exports llama.cpp's C functions: libllama.so, or xllamacpp.abi3.so of the Python package xllamacpp. Texts are
the first GSM8K test questions, one by one, a <bos> in front; the perplexity is exp of the mean negative log-probability
(nats) of all tokens after it. llama.cpp computes with the packed weights and activations in 8 bits, sva with the
weights unpacked to float32, so the two are close and not equal. The result is written after every ten texts, and
the same command resumes there. Ids are compared of all 1,319 questions.
Fetch the model first: SVA_ACCEPT_LICENCES=gemma sva fetch gemma-3-270m-q4_k_m.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sva
from experiments.studies.gemma.llama_cpp import LlamaCpp
from experiments.studies.tokenizer_parity import digest, questions
from sva.evaluation.likelihood import continuation_logprobs
from sva.models.hub import resolve

MODEL = "gemma-3-270m-q4_k_m"


def llama_cpp_logprob(model: LlamaCpp, ids: Sequence[int]) -> float:
    """The summed log-probability (nats) of a text's tokens after the first."""
    logits = model.logits(ids)[:-1]
    logits -= logits.max(axis=1, keepdims=True)
    chosen = logits[np.arange(len(ids) - 1), np.asarray(ids[1:])]
    return float((chosen - np.log(np.exp(logits).sum(axis=1, dtype=np.float64))).sum())


def sva_logprob(lm: sva.LM, ids: Sequence[int]) -> float:
    """The same, in sva."""
    row = np.zeros((3, 1, -(-len(ids) // 128) * 128), np.int32)  # ids, mask, scored
    row[:2, 0, : len(ids)] = ids, np.ones(len(ids))
    row[2, 0, 1 : len(ids)] = 1
    return float(continuation_logprobs(lm.model, lm.params, *row)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("result.json"))
    arguments = parser.parse_args()

    lm = sva.load(MODEL, progress=False)
    assert lm.tokenizer is not None
    theirs = LlamaCpp(arguments.library, resolve(MODEL))
    texts = questions()
    expected = [theirs.tokenize(text, bos=True) for text in texts]
    found = [lm.tokenizer(text)["input_ids"] for text in texts]
    about = {
        "model": MODEL,
        "questions_with_equal_ids": sum(a == b for a, b in zip(expected, found, strict=True)),
        "questions": len(texts),
        "sha256_of_llama_cpp_ids_without_bos": digest(ids[1:] for ids in expected),
        "jax": jax.__version__,
        "library": arguments.library.name,
    }
    nats = {"llama.cpp": 0.0, "sva": 0.0}
    start = 0
    if arguments.out.is_file():
        begun = json.loads(arguments.out.read_text(encoding="utf-8"))
        nats, start = begun["nats"], begun["texts"]
    for number, ids in enumerate(expected[start : arguments.size], start + 1):
        nats["llama.cpp"] -= llama_cpp_logprob(theirs, ids)
        nats["sva"] -= sva_logprob(lm, ids)
        if number % 10 == 0 or number == arguments.size:
            result = about | compared(nats, number, sum(len(ids) - 1 for ids in expected[:number]))
            arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            print(f"{number} texts: {result['perplexity']}", flush=True)


def compared(nats: dict[str, float], texts: int, tokens: int) -> dict[str, Any]:
    """The perplexities of so many texts and their difference."""
    perplexity = {name: math.exp(total / tokens) for name, total in nats.items()}
    difference = perplexity["sva"] / perplexity["llama.cpp"] - 1
    return {
        "texts": texts,
        "tokens": tokens,
        "nats": nats,
        "perplexity": perplexity,
        "relative_difference": difference,
    }


if __name__ == "__main__":
    main()
