"""Decoding SmolLM2-135M-Instruct in float32, 64 new tokens, beside transformers' generate: medians and ratios.

    python experiments/benchmarks/decode/decode.py          # extra `bench`; writes result.json beside this file

Same weights, same prompts, greedy, no end token, both sides in one process and in turn. Compilation and one warm-up
are outside the times; prefill is inside. The limits are measured in the same run: a step's own matrix products with
nothing between them, in turn with both sides (`ratio_of_bare_products`: what they alone would be); the rate at which
memory is read; and the rate of the head's product, both ways round, x W^T and W x^T, of which `sva.utils.matmul.dot`
takes the second for few rows. Its choice for many is measured too, on 32 rows of 32 tokens, with the result turned to
[rows, tokens, out].
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import torch
import transformers

from sva.cli.throughput import products, read_rate, step_matrices
from sva.evaluation import evaluate
from sva.generation import chat
from sva.generation.load import load
from sva.parallel import compile_cache
from sva.tasks import task
from sva.utils.files import write_json
from sva.utils.provenance import command, versions

NEW, ROUNDS = 64, 7


def seconds(run) -> float:
    """Of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def product_rates(lead: tuple[int, ...], out: int) -> dict[str, float]:
    """Operations a second, two a multiply-add, of x [*lead, 576] with w [out, 576] to [*lead, out], either order."""
    x, w = jnp.ones((*lead, 576)), jnp.ones((out, 576))
    orders = {
        "x first": jax.jit(lambda x, w: jnp.einsum("...i,oi->...o", x, w)),
        "weight first": jax.jit(
            lambda x, w: jnp.moveaxis(jax.lax.dot_general(w, x, (((1,), (x.ndim - 1,)), ((), ()))), 0, -1)
        ),
    }
    rates = {}
    for name, product in orders.items():
        product(x, w).block_until_ready()
        taken = [seconds(lambda product=product: product(x, w).block_until_ready()) for _ in range(15)]
        rates[name] = 2 * x.size * out / statistics.median(taken)
    return rates


def transformers_model(lm):
    """The same weights as transformers loads them."""
    with tempfile.TemporaryDirectory() as directory:
        lm.save(Path(directory) / "model")
        return transformers.AutoModelForCausalLM.from_pretrained(Path(directory) / "model", dtype=torch.float32).eval()


def main() -> None:
    compile_cache.start()
    lm = load("smollm2-135m-instruct-q4_1")
    peer = transformers_model(lm)
    weights = sum(x.size for x in jax.tree.leaves(lm.params))
    questions = [chat.render(lm, item.question) for item in evaluate.items(task("other"), "test", 32)]
    result = {"model": lm.name, "new_tokens": NEW, "rounds": ROUNDS, "weights": weights}
    result |= {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    result["read_gigabytes_per_second"] = read_rate(ROUNDS) / 1e9
    for batch in (1, 32):
        ids, mask = chat.encode(lm, questions[:batch])
        torch_ids, torch_mask = torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)

        def ours(ids=ids, mask=mask):
            return lm.generate(ids, mask, NEW).tokens

        def theirs(ids=torch_ids, mask=torch_mask):
            with torch.inference_mode():
                out = peer.generate(
                    ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
                )
            return out[:, ids.shape[1] :].numpy()

        # min_new_tokens bans the end token on one side only, so rows are compared up to an end token.
        end = chat.end_tokens(lm)
        pairs = [(list(a), list(b)) for a, b in zip(ours(), theirs(), strict=True)]
        cut = [next((i for i, token in enumerate(a) if token in end), NEW) for a, _ in pairs]
        same = sum(a[:n] == b[:n] for (a, b), n in zip(pairs, cut, strict=True))
        bare = products(step_matrices(lm), batch, lm.model.dtype)
        runs = {
            "sva": ours,
            "transformers": theirs,
            "bare products of a step": lambda bare=bare: jax.block_until_ready(bare()),
        }
        runs["bare products of a step"]()
        times = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                times[name].append(seconds(run))
        medians = {name: statistics.median(found) for name, found in times.items()}
        rates = product_rates((batch, 1), 49152)
        rate = max(rates.values())
        result[f"batch_{batch}"] = {
            "seconds": times,
            "tokens_per_second": {name: batch * NEW / medians[name] for name in ("sva", "transformers")},
            "ratio": medians["transformers"] / medians["sva"],
            "ratio_of_bare_products": medians["transformers"] / (NEW * medians["bare products of a step"]),
            "rows_equal_to_transformers": f"{same} of {batch}",
            "weight_gigabytes_per_second": 4 * weights * NEW / medians["sva"] / 1e9,
            "limit_gigabytes_per_second": 4 * rate / (2 * batch) / 1e9,
            "gigaflops": 2 * weights * batch * NEW / medians["sva"] / 1e9,
            "limit_gigaflops": rate / 1e9,
            "product_gigaflops": {order: found / 1e9 for order, found in rates.items()},
        }
    many = product_rates((32, 32), 1536)
    result["product_gigaflops_of_1024_rows"] = {order: found / 1e9 for order, found in many.items()}
    result |= {"versions": versions() | {"torch": torch.__version__}, "command": command()}
    write_json(Path(__file__).with_name("result.json"), result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
