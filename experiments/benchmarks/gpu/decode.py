"""Decoding at Llama-3-8B's shape, random bfloat16 weights, beside transformers' generate on the same device.

    python experiments/benchmarks/gpu/decode.py [--layers N] [--scan]      # writes decode.json beside this file

`sva bench` of batches 1, 8 and 32 (steps, bytes, share of the rate at which memory is read), then 64 new tokens after
32, greedy and without an end token, by both sides in turn on the same memory. The first token's log-prob and the rows'
common beginnings are compared; with random weights bfloat16 decides many tokens by rounding.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from llama import peer_of, shaped, wait

from sva.cli.throughput import bench, table
from sva.parallel import compile_cache
from sva.utils.files import write_json
from sva.utils.provenance import command, versions

PROMPT, NEW, ROUNDS = 32, 64, 3


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


def beside(lm: Any, peer: Any, batch: int) -> dict[str, Any]:
    """Times of both sides, and how alike their answers are."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, lm.model.cfg.vocab_size, (batch, PROMPT))
    mask = np.ones_like(ids)
    torch_ids = torch.tensor(ids, device=peer.device)
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def ours() -> Any:
        return lm.generate(ids, mask, NEW)

    @torch.inference_mode()
    def theirs() -> np.ndarray:
        out = peer.generate(torch_ids, attention_mask=torch.ones_like(torch_ids), **settings)
        return out[:, PROMPT:].cpu().numpy()

    mine, other = ours(), theirs()
    with torch.inference_mode():
        scores = torch.log_softmax(peer(torch_ids).logits[:, -1].float(), dim=-1).cpu().numpy()
    differ = [np.flatnonzero(a != b) for a, b in zip(mine.tokens, other, strict=True)]
    first = mine.tokens[:, 0]
    times: dict[str, list[float]] = {"sva": [], "transformers": []}
    for _ in range(ROUNDS):
        times["sva"].append(seconds(ours))
        times["transformers"].append(seconds(theirs))
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "seconds": times,
        "tokens_per_second": {name: batch * NEW / median for name, median in medians.items()},
        "ratio": medians["transformers"] / medians["sva"],
        "first_tokens_equal": int((first == other[:, 0]).sum()),
        "first_logprob_apart": float(np.abs(mine.logprobs[:, 0] - scores[np.arange(batch), first]).max()),
        "tokens_before_the_first_difference": [int(at[0]) if at.size else NEW for at in differ],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--scan", action="store_true", help="one compiled layer for all")
    arguments = parser.parse_args()
    compile_cache.start()
    started = time.perf_counter()
    lm = shaped(arguments.layers, "bfloat16", scan_layers=arguments.scan)
    result: dict[str, Any] = {"layers": arguments.layers, "scan_layers": arguments.scan}
    found = bench(lm, [1, 8, 32], prompt=PROMPT, new_tokens=NEW)
    print(table(found), file=sys.stderr, flush=True)
    result |= {"bench": found, "seconds_to_make_compile_and_bench": time.perf_counter() - started}
    place = Path(__file__).with_name("decode.json")
    write_json(place, result)
    peer = peer_of(lm)
    for batch in (1, 8, 32):
        result[f"batch_{batch}"] = beside(lm, peer, batch)
        print(json.dumps({batch: result[f"batch_{batch}"]["ratio"]}), file=sys.stderr, flush=True)
    result |= {"versions": versions() | {"torch": torch.__version__, "transformers": transformers.__version__}}
    write_json(place, result | {"command": command()})
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
