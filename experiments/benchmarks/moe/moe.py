"""Decoding a random mixture of experts in float32 beside transformers' generate: medians and ratios.

    python experiments/benchmarks/moe/moe.py [--rounds 7]    # extra `bench`; writes result.json beside this file

The shape is OLMoE's at a hundred million weights: 64 modules of which 8 serve a token, in 8 layers of width 512. Both
sides have the same weights and prompts and decode greedily, 64 tokens with no end token, in one process and in turn.
Compilation and one warm-up are outside the times; prefill is inside. transformers has several ways to run modules
(`experts_implementation`); the fastest of them at each batch is what the ratio is of. As a check of what is compared,
rows are counted whose tokens are the same on both sides (rounding may part two that are nearly as likely).

`parts` says where a step's time goes: the same network with as many weights in a dense mlp as a token meets in its
modules, so that what the routing costs is the rest; and the bytes that a step reads at least.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

from sva.cli.throughput import random_lm, read_rate
from sva.generation.lm import LM
from sva.models.config import ModelConfig, from_hf
from sva.parallel import compile_cache
from sva.utils.files import write_json
from sva.utils.provenance import command, versions

SHAPE = {
    "model_type": "olmoe",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 1024,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PROMPT, NEW = 32, 64
WAYS = ("eager", "batched_mm", "grouped_mm")
_ALONE = ("batched_mm",)  # copies the weights of every token's modules: only at batch 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    args = parser.parse_args()
    compile_cache.start()
    cfg = from_hf(SHAPE)
    lm, dense = random_lm(cfg, "float32"), random_lm(_dense(cfg), "float32")
    peers = transformers_models(lm)
    result: dict[str, Any] = {
        "shape": SHAPE,
        "weights": sum(x.size for x in jax.tree.leaves(lm.params)),
        "weights_of_a_token": _weights_of_a_token(cfg),
        "prompt": PROMPT,
        "new_tokens": NEW,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "read_gigabytes_per_second": read_rate(args.rounds) / 1e9,
    }
    for batch in (1, 8):
        result[f"batch_{batch}"] = compare(lm, dense, peers, batch, args.rounds)
    result |= {"versions": versions() | {"torch": torch.__version__}, "command": command()}
    write_json(args.output, result)
    print(json.dumps(result, indent=2))


def compare(lm: LM, dense: LM, peers: dict[str, Any], batch: int, rounds: int) -> dict[str, Any]:
    """Medians of both sides at one batch, in turn."""
    ids = np.random.default_rng(0).integers(3, SHAPE["vocab_size"], (batch, PROMPT))
    mask = np.ones_like(ids)

    def theirs(peer: Any) -> np.ndarray:
        with torch.inference_mode():
            out = peer.generate(
                torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=NEW, do_sample=False
            )
        return out[:, PROMPT:].numpy()

    runs = {"sva": partial(_ours, lm, ids, mask), "dense": partial(_ours, dense, ids, mask)}
    ways = [way for way in peers if batch == 1 or way not in _ALONE]
    runs |= {f"transformers, {way}": partial(theirs, peers[way]) for way in ways}
    first = {name: run() for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(found) for name, found in times.items()}
    best = min((name for name in runs if name.startswith("transformers")), key=lambda name: medians[name])
    same = int((first["sva"] == first[best]).all(axis=1).sum())
    return {
        "seconds": times,
        "tokens_per_second": {name: batch * NEW / seconds for name, seconds in medians.items()},
        "fastest_of_transformers": best,
        "ratio": medians[best] / medians["sva"],
        "ratios": {name: seconds / medians["sva"] for name, seconds in medians.items() if name != "sva"},
        "rows_equal_to_transformers": f"{same} of {batch}",
        "parts": {"share_of_a_dense_model_of_as_many_weights_a_token": medians["dense"] / medians["sva"]},
    }


def transformers_models(lm: LM) -> dict[str, Any]:
    """{way to run modules: the same weights as transformers loads them for it}."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        lm.save(Path(directory) / "model")
        for way in WAYS:
            peer = transformers.AutoModelForCausalLM.from_pretrained(
                Path(directory) / "model", dtype=torch.float32, experts_implementation=way
            )
            found[way] = peer.eval()
    return found


def _ours(lm: LM, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(lm.generate(ids, mask, NEW).tokens)


def _dense(cfg: ModelConfig) -> ModelConfig:
    """The network with a dense mlp of as many weights as a token meets in its modules."""
    assert cfg.moe is not None
    return dataclasses.replace(cfg, moe=None, intermediate_size=cfg.moe.top_k * cfg.moe.width)


def _weights_of_a_token(cfg: ModelConfig) -> int:
    """Weights of layers and head that one token meets."""
    assert cfg.moe is not None
    attention = 4 * cfg.hidden_size**2
    modules = cfg.moe.top_k * 3 * cfg.moe.width * cfg.hidden_size + cfg.moe.modules * cfg.hidden_size
    return cfg.num_layers * (attention + modules) + cfg.vocab_size * cfg.hidden_size


if __name__ == "__main__":
    main()
