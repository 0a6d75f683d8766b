"""What the first pass costs beside a plain prefill and beside a second pass, on 256 GSM8K prompts.

    python experiments/studies/dispatch/first_pass.py [--batches N]     # writes first_pass.json beside this file
    python experiments/studies/dispatch/first_pass.py --dtype bfloat16 --alike --leave whole products \
        --out first_pass-gpu.json

SmolLM2-135M-Instruct, by default in float32, the labels of the shipped classification expert, 32 prompts a batch, the
shortest first (as `AdaptiveLM.choose` has them); where the first pass follows the shared instruction, its padding is
left out (`sva.models.packing`). For every batch, in turn, each after a call that is not timed (of `second` one of few
tokens):

    prompt       the labels scored by the base model, after the shared instruction
    classifier   the same by the classification expert
    generated    the question answered freely, at most 8 tokens, after the shared instruction
    whole        the same as the paper has it: every prompt reads the instruction again
    prefill      what the second pass reads, by the base model: keys, values and the next token's logits
    products     the limit: the layers' bare matrix products, on as many tokens as `prompt` packs, nothing between them
    second       256 new tokens, no end token, every row on the expert that a first pass chose; its prompts padded to a
                 multiple of 64, to compile fewer programs

A batch is written when it is finished, and a run that was stopped goes on; --batches ends it after so many, --leave
spares parts of the work. --alike pads every batch to the shapes of the largest, at its cost: few programs to compile.
The paper's table 3 has a first pass at 13, 19 and 47 % of the second.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sva.adaptation import dispatchers, label_scoring, two_pass
from sva.adaptation.adaptive_lm import AdaptiveLM, adaptive
from sva.cli import demonstration as demo
from sva.evaluation import evaluate
from sva.generation import chat
from sva.generation.decode import Generation, PromptBatch, generate, read
from sva.generation.load import load
from sva.generation.sampling import Greedy
from sva.models.transformer import variables
from sva.parallel import compile_cache
from sva.spectral.expert import Expert
from sva.tasks import task
from sva.tasks.labels import OTHER
from sva.utils.files import write_json
from sva.utils.matmul import dot
from sva.utils.padding import left_pad, length_bucket, round_up
from sva.utils.provenance import command, versions
from sva.utils.timing import Stopwatch

PROMPTS, BATCH, NEW, LABEL_TOKENS = 256, 32, 256, 8
FIRST = ("prompt", "classifier", "generated")
OTHERS = ("whole", "products")


def model(name: str, dtype: str, *, with_classifier: bool = True) -> AdaptiveLM:
    """The shipped experts; the one that the demo trains is stood in for by another, which costs the same."""
    lm = load(name, dtype)
    shipped, classifier = demo.load_shipped(lm)
    known = {str(expert.metadata["label"]): expert for expert in shipped.values()}
    one = next(iter(shipped.values()))
    experts = [
        known.get(label, Expert(one.raw, one.parametrisation, {"label": label, "description": text}))
        for label, text in classifier.metadata["labels"].items()
        if label != OTHER
    ]
    return adaptive(lm, experts, classifier=classifier if with_classifier else None)


@jax.jit
def prefill(serving: two_pass.ServingState, prompts: two_pass.TokenBatch) -> Any:
    """Keys, values and the next token's logits."""
    return read(serving.model, variables(serving.model, serving.params, None), *prompts)


def continued(serving: two_pass.ServingState, prompts: two_pass.TokenBatch, eos: jax.Array, new: int) -> Generation:
    """The base model's greedy answers."""
    keys = jnp.broadcast_to(jax.random.key(0), (len(prompts.ids),))
    settings = {"max_new_tokens": new, "sampling": Greedy()}
    batch = PromptBatch(prompts.ids, prompts.mask, keys, jnp.asarray(new, jnp.int32))
    return generate(serving.model, serving.params, batch, eos, **settings)


@jax.jit
def whole(serving: two_pass.ServingState, prompts: two_pass.TokenBatch, eos: jax.Array) -> Generation:
    """The classification question answered, all of it read for every prompt."""
    return continued(serving, prompts, eos, LABEL_TOKENS)


@jax.jit
def products(params: Any, tokens: jax.Array) -> list[jax.Array]:
    """Sums of x w^T of every layer's matrices, x having as many rows as there are `tokens`."""
    by_width: dict[int, jax.Array] = {}
    found = []
    for path, w in jax.tree_util.tree_leaves_with_path(params):
        if "_proj" in jax.tree_util.keystr(path) and w.ndim == 2:
            x = by_width.setdefault(w.shape[1], jnp.ones((1, len(tokens), w.shape[1]), w.dtype))
            found.append(jnp.sum(jax.lax.optimization_barrier(dot(x, w))))
    return found


def largest(batches: list[dispatchers.Rows]) -> dispatchers.Rows:
    """Arrays of the largest shapes, for `padded`: what each holds is of no use."""
    return jax.tree.map(lambda *leaves: max(leaves, key=lambda leaf: leaf.size), *batches)


def padded(rows: dispatchers.Rows, like: dispatchers.Rows) -> dispatchers.Rows:
    """The rows with so many places a row, and so many packed, as `like` has."""

    def left(ids: jax.Array, mask: jax.Array, length: int) -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(x) for x in left_pad(np.asarray(ids), np.asarray(mask), length))

    ids, mask = left(rows.questions.ids, rows.questions.mask, like.questions.ids.shape[1])
    places = np.flatnonzero(np.asarray(mask)).astype(np.int32)
    places = jnp.asarray(np.resize(places, len(like.questions.token_indices)).astype(np.int32))
    prompts = two_pass.TokenBatch(*left(rows.prompts.ids, rows.prompts.mask, like.prompts.ids.shape[1]))
    return rows._replace(questions=label_scoring.TokenBatch(ids, mask, places), prompts=prompts)


def warm(stopwatch: Stopwatch, function: Any, *arguments: Any) -> tuple[Any, float]:
    """What a second call gives: a program's first takes up to one and a half times as long."""
    stopwatch(function, *arguments)
    return stopwatch(function, *arguments)


def measure(
    by: dict[str, AdaptiveLM],
    questions: list[str],
    rows: dispatchers.Rows,
    stopwatch: Stopwatch,
    left_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Seconds of everything for one batch, and its sizes."""
    base = by["prompt"]
    lm, form = base.lm, base.template
    eos = jnp.asarray(chat.end_tokens(lm), jnp.int32)
    seconds, alphas = {}, {}
    for name, model in by.items():
        decision, seconds[name] = warm(stopwatch, two_pass.first_pass, model.serving, model.dispatcher, rows)
        alphas[name] = decision.alphas
    widths = {"asked": rows.questions, "prefill": rows.prompts}
    if "whole" not in left_out:
        texts = [form.before + form.space + question + form.after for question in questions]
        ids, mask = chat.encode(lm, texts)
        widths["whole"] = all_of_it = two_pass.TokenBatch(*left_pad(ids, mask, length_bucket(ids.shape[1])))
        _, seconds["whole"] = warm(stopwatch, whole, base.serving, all_of_it, eos)
    _, seconds["prefill"] = warm(stopwatch, prefill, base.serving, rows.prompts)
    asked, labels = rows.questions, base.dispatcher.scoring.label_ids  # pyright: ignore
    tokens = np.zeros(
        (asked.mask.size if asked.token_indices is None else len(asked.token_indices)) + len(questions) * len(labels)
    )
    if "products" not in left_out:
        _, seconds["products"] = warm(stopwatch, products, base.serving.params, tokens)
    keys = jnp.broadcast_to(jax.random.key(0), (len(questions),))
    limit, never = jnp.asarray(NEW, jnp.int32), jnp.full(4, -1, jnp.int32)
    ids, mask = (np.asarray(x) for x in rows.prompts)
    prompts = two_pass.TokenBatch(*map(jnp.asarray, left_pad(ids, mask, round_up(ids.shape[1], 64))))
    request = two_pass.Request(prompts, limit, never, keys, max_new_tokens=NEW, sampling=Greedy())
    chosen = list(alphas.values())[-1]
    stopwatch(two_pass.second_pass, base.serving, chosen, dataclasses.replace(request, limit=limit // 32))
    _, seconds["second"] = stopwatch(two_pass.second_pass, base.serving, chosen, request)
    widths["second"] = prompts
    widths = {name: int(x.ids.shape[1]) for name, x in widths.items()}
    return {"seconds": seconds, "widths": widths, "packed": len(tokens)}


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over all batches, and what part of a prefill and of the second pass each is: of the sums, and by batch."""
    names = list(found[0]["seconds"])
    total = {name: sum(batch["seconds"][name] for batch in found) for name in names}
    parts = {
        whole: {
            name: {
                "of_the_sums": total[name] / total[whole],
                "median_of_batches": statistics.median(x["seconds"][name] / x["seconds"][whole] for x in found),
            }
            for name in names
            if name not in ("prefill", "second")
        }
        for whole in ("prefill", "second")
    }
    return {"seconds": total, "of_a_prefill": parts["prefill"], "of_the_second_pass": parts["second"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=demo.MODEL)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", type=int, default=PROMPTS // BATCH)
    parser.add_argument("--alike", action="store_true")
    parser.add_argument("--leave", nargs="+", choices=[*FIRST[1:], *OTHERS], default=[])
    parser.add_argument("--out", default="first_pass.json")
    arguments = parser.parse_args()
    compile_cache.start()
    place = Path(__file__).with_name(arguments.out)
    names = [name for name in FIRST if name not in arguments.leave]
    serving = model(arguments.model, arguments.dtype, with_classifier="classifier" in names)
    by, stopwatch = {name: serving.by(name) for name in names}, Stopwatch()
    questions = [item.question for item in evaluate.items(task("gsm8k"), "test", PROMPTS)]
    questions = [questions[number] for number in serving.shortest_first(questions)]
    found = json.loads(place.read_text())["batches"] if place.exists() else []
    batches = [questions[start : start + BATCH] for start in range(0, PROMPTS, BATCH)]
    all_rows = [by["prompt"].rows(batch) for batch in batches]
    if arguments.alike:
        all_rows = [padded(rows, largest(all_rows)) for rows in all_rows]
    for number in range(len(found), min(len(found) + arguments.batches, len(batches))):
        found.append(measure(by, batches[number], all_rows[number], stopwatch, arguments.leave))
        result = {
            "model": serving.lm.name,
            "dtype": str(serving.lm.model.dtype.__name__),
            "device": jax.devices()[0].device_kind,
            "prompts": len(found) * BATCH,
            "labels": [label.name for label in serving.labels],
            "instruction_tokens": int(by["prompt"].dispatcher.scoring.prefix.valid.sum()),  # pyright: ignore
            "label_tokens": int(by["prompt"].dispatcher.scoring.label_mask.any(axis=1).sum()),  # pyright: ignore
            **summary(found),
            "batches": found,
        }
        write_json(place, result | {"versions": versions(), "command": command()})
        print(json.dumps(found[-1]), flush=True)
    print(json.dumps(summary(found), indent=2))


if __name__ == "__main__":
    main()
