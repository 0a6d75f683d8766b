"""Weight-only int8, bfloat16, and a cache in either, beside float32, and beside llama.cpp on the same Q4_1 file.

    python experiments/studies/int8/int8.py [speed] [accuracy | PRECISION ...]
    # extra `bench`; both by default; result.json

- `speed`: batch 1, greedy, 64 new tokens after the same prompt, three programs in turn in one process: int8, float32,
  llama.cpp on as many threads as there are forms. The prompt is read outside the times: a time is that of 64 new
  tokens less that of one, each the median of eleven. Bytes are of the matrices that a step reads.
- `accuracy`: of each precision, or of the one named, against float32 (which holds the file's own 4-bit values, so that
  int8's is the cost of rounding once more): ARC-Easy and ARC-Challenge by option likelihood, paired; the share of next
  tokens of GSM8K's solutions that stay the likeliest; nats a token; and the log-probs of tokens that it sampled,
  against float32's.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sva.cli.throughput import step_matrices
from sva.evaluation import evaluate
from sva.evaluation.stats import accuracy as interval
from sva.evaluation.stats import paired_difference
from sva.generation import chat
from sva.generation.load import load
from sva.generation.sampling import Temperature
from sva.models.hub import resolve
from sva.parallel import compile_cache
from sva.tasks import task
from sva.utils.files import write_json
from sva.utils.provenance import command, versions

MODEL, NEW, ROUNDS = "smollm2-135m-instruct-q4_1", 64, 11
OPTIONS, TEXTS, SAMPLED = 200, 32, 16
PRECISIONS = {
    "int8": {"dtype": "int8"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16 cache": {"kv_dtype": "bfloat16"},
    "int8 cache": {"kv_dtype": "int8"},
}


def speed() -> dict:
    """Tokens a second of the three, in turn."""
    from llama_cpp import Llama, llama_cpp

    exact, small = load(MODEL), load(MODEL, dtype="int8")
    peer = Llama(
        str(resolve(MODEL)), n_ctx=256, n_threads=os.cpu_count(), n_threads_batch=os.cpu_count(), verbose=False
    )
    question = chat.render(exact, evaluate.items(task("other"), "test", 1)[0].question)
    ids, mask = chat.encode(exact, [question])
    prompt = ids[0].tolist()

    def theirs(count: int) -> list[int]:
        peer.reset()
        drawn = []
        for token in peer.generate(prompt, temp=0.0, top_k=1):
            drawn.append(token)
            if len(drawn) == count:
                return drawn
        return drawn

    runs = {
        "int8": lambda count: small.generate(ids, mask, count).tokens[0],
        "float32": lambda count: exact.generate(ids, mask, count).tokens[0],
        "llama.cpp Q4_1": theirs,
    }
    times = {name: {1: [], NEW: []} for name in runs}
    first = {name: np.asarray(run(NEW)).tolist() for name, run in runs.items()}
    for run in runs.values():
        run(1)
    for _ in range(ROUNDS):
        for name, run in runs.items():
            for count in (1, NEW):
                started = time.perf_counter()
                jax.block_until_ready(run(count))
                times[name][count].append(time.perf_counter() - started)
    steps = {
        name: (statistics.median(found[NEW]) - statistics.median(found[1])) / (NEW - 1) for name, found in times.items()
    }
    held = {
        name: sum(x.nbytes for x in jax.tree.leaves(step_matrices(lm)))
        for name, lm in (("int8", small), ("float32", exact))
    }
    held["llama.cpp Q4_1"] = Path(resolve(MODEL)).stat().st_size
    return {
        "prompt_tokens": len(prompt),
        "new_tokens": NEW,
        "threads": os.cpu_count(),
        "seconds": times,
        "tokens_per_second": {name: 1 / step for name, step in steps.items()},
        "megabytes_a_step": {name: size / 1e6 for name, size in held.items()},
        "gigabytes_per_second": {name: held[name] / step / 1e9 for name, step in steps.items()},
        "int8_of_llama_cpp": steps["llama.cpp Q4_1"] / steps["int8"],
        "tokens_equal_to_float32": {
            name: int(np.argmin([*(a == b for a, b in zip(drawn, first["float32"], strict=False)), False]))
            for name, drawn in first.items()
        },
        "llama_cpp": llama_cpp.llama_print_system_info().decode(),
    }


def accuracy(names) -> dict:
    """What each of these precisions changes."""
    exact = load(MODEL)
    models = {name: load(MODEL, **PRECISIONS[name]) for name in names}
    items = {name: evaluate.items(task(name), "test", OPTIONS) for name in ("arc_easy", "arc_challenge")}
    gsm = task("gsm8k")
    solved = [(item.question, gsm.answer(item.example)) for item in evaluate.items(gsm, "test", TEXTS)]
    asked = chat.encode(exact, [chat.render(exact, question) for question, _ in solved[:SAMPLED]])
    texts = [chat.render(exact, question) + answer for question, answer in solved]
    options = {name: by_options(exact, todo, name) for name, todo in items.items()}
    result = {"float32": {name: interval(right)._asdict() for name, right in options.items()}}
    for name, lm in models.items():
        found = {of: by_options(lm, todo, f"{of}, {name}") for of, todo in items.items()}
        result[name] = {
            of: {
                "n": len(right),
                "accuracy": interval(right)._asdict(),
                "minus_float32": paired_difference(right, options[of])._asdict(),
                "answers_that_changed": int((right != options[of]).sum()),
            }
            for of, right in found.items()
        }
        result[name]["gsm8k_texts"] = next_tokens(exact, lm, texts)
        result[name]["sampled_logprobs"] = sampled(exact, lm, *asked)
        print(json.dumps({name: result[name]}), flush=True)
    return result


def by_options(lm, todo, title: str) -> np.ndarray:
    """[n] bool: which questions are answered rightly by the options' likelihood."""
    answer, size = evaluate.choosing(lm, 32)
    return np.array([r.correct for batch in evaluate.batches(todo, size, title) for r in answer(batch)])


def next_tokens(exact, lm, texts) -> dict:
    """What is predicted after every token of some texts, beside float32."""
    nats, agree, count = {"float32": 0.0, "this": 0.0}, 0, 0
    for start in range(0, len(texts), 4):
        ids, mask = chat.encode(exact, texts[start : start + 4])
        logits = {"float32": exact.logits(ids, mask)[:, :-1], "this": lm.logits(ids, mask)[:, :-1]}
        scored = (mask[:, :-1] * mask[:, 1:]).astype(bool)
        count += int(scored.sum())
        agree += int(((logits["float32"].argmax(-1) == logits["this"].argmax(-1)) & scored).sum())
        for kind, found in logits.items():
            picked = jnp.take_along_axis(jax.nn.log_softmax(found), ids[:, 1:, None], axis=-1)[..., 0]
            nats[kind] -= float(jnp.where(scored, picked, 0).sum())
    each = {kind: total / count for kind, total in nats.items()}
    return {"tokens": count, "nats_a_token": each, "same_likeliest_token": agree / count}


def sampled(exact, lm, ids, mask) -> dict:
    """Log-probs of 64 tokens a prompt that `lm` drew, as it told them, beside float32's."""
    out = lm.generate(ids, mask, 64, sampling=Temperature(1.0), key=jax.random.key(0))
    tokens, told = np.asarray(out.tokens), np.asarray(out.logprobs)
    drawn = np.arange(tokens.shape[1])[None] < np.asarray(out.lengths)[:, None]
    seen = exact.logits(np.concatenate([ids, tokens], axis=1), np.concatenate([mask, drawn.astype(np.int32)], axis=1))
    seen = jax.nn.log_softmax(seen[:, ids.shape[1] - 1 : -1])
    apart = (np.asarray(jnp.take_along_axis(seen, tokens[..., None], axis=-1)[..., 0]) - told)[drawn]
    return {
        "tokens": int(apart.size),
        "mean_nats_apart": float(np.abs(apart).mean()),
        "largest": float(np.abs(apart).max()),
        "mean_log_ratio": float(apart.mean()),
    }


def main() -> None:
    compile_cache.start()
    path = Path(__file__).with_name("result.json")
    result = json.loads(path.read_text()) if path.exists() else {}
    about = {"versions": versions(), "command": command(), "model": MODEL}
    asked = sys.argv[1:] or ["speed", "accuracy"]
    if unknown := set(asked) - {"speed", "accuracy", *PRECISIONS}:
        raise SystemExit(f"{', '.join(sorted(unknown))}: not one of speed, accuracy, {', '.join(PRECISIONS)}")
    if "speed" in asked:
        result["speed"] = speed() | about
        write_json(path, result)
    if names := [name for name in PRECISIONS if name in asked or "accuracy" in asked]:
        found = {name: part | about for name, part in accuracy(names).items()}
        result["accuracy"] = result.get("accuracy", {}) | found
        write_json(path, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
