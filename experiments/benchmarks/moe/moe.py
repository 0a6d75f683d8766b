"""Decoding a random mixture of experts in float32 beside transformers' generate: medians and ratios.

    python -m experiments.benchmarks.moe.moe [--rounds 7]    # extra `bench`; writes result.json beside this file

The shape is OLMoE's at a hundred million weights: 64 modules of which 8 serve a token, in 8 layers of width 512. Both
sides have the same weights and prompts and decode greedily, 64 tokens with no end token, in turn, each in a process.
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.sides import answer, started
from sva.cli.throughput import random_lm, read_rate
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
    with tempfile.TemporaryDirectory() as directory:
        sva = started(serve_sva, directory)
        result = {"shape": SHAPE, "weights_of_a_token": _weights_of_a_token(from_hf(SHAPE)), **sva.recv()}
        peer = started(serve_transformers, directory)
        about = peer.recv()
    result |= {"prompt": PROMPT, "new_tokens": NEW, "rounds": args.rounds, "threads": about["threads"]}
    result["cores"] = os.cpu_count()
    for batch in (1, 8):
        result[f"batch_{batch}"] = compare({"sva": sva, "transformers": peer}, batch, args.rounds)
    sva.send(None), peer.send(None)
    result |= {"versions": versions() | {"torch": about["torch"]}, "command": command()}
    write_json(args.output, result)
    print(json.dumps(result, indent=2))


def serve_sva(pipe: Connection, directory: str) -> None:
    """Writes the model, says what it is, then decodes prompts with the mixture or with the dense network."""
    compile_cache.start()
    cfg = from_hf(SHAPE)
    models = {"moe": random_lm(cfg, "float32"), "dense": random_lm(_dense(cfg), "float32")}
    models["moe"].save(Path(directory) / "model")
    weights = sum(x.size for x in jax.tree.leaves(models["moe"].params))
    pipe.send({"weights": weights, "read_gigabytes_per_second": read_rate(7) / 1e9})

    def decode(asked: tuple[str, np.ndarray]) -> np.ndarray:
        name, ids = asked
        return np.asarray(models[name].generate(ids, np.ones_like(ids), NEW).tokens)

    answer(pipe, decode)


def serve_transformers(pipe: Connection, directory: str) -> None:
    """Says what torch is, then decodes prompts with the same weights, in the way to run modules that is asked for."""
    import torch
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    path = Path(directory) / "model"
    peers = {way: load(path, dtype=torch.float32, experts_implementation=way).eval() for way in WAYS}
    pipe.send({"torch": torch.__version__, "threads": torch.get_num_threads()})

    def decode(asked: tuple[str, np.ndarray]) -> np.ndarray:
        way, ids = asked
        rows = torch.tensor(ids)
        with torch.inference_mode():
            out = peers[way].generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=NEW, do_sample=False)
        return out[:, PROMPT:].numpy()

    answer(pipe, decode)


def compare(sides: dict[str, Connection], batch: int, rounds: int) -> dict[str, Any]:
    """Medians of both sides at one batch, in turn."""
    ids = np.random.default_rng(0).integers(3, SHAPE["vocab_size"], (batch, PROMPT))
    ways = [("transformers", way) for way in WAYS if batch == 1 or way not in _ALONE]
    runs = {"sva": ("sva", "moe"), "dense": ("sva", "dense")} | {f"transformers, {way}": (s, way) for s, way in ways}

    def run(name: str) -> tuple[np.ndarray, float]:
        side, model = runs[name]
        sides[side].send((model, ids))
        tokens, seconds, _ = sides[side].recv()
        return tokens, seconds

    first = {name: run(name)[0] for name in runs}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in runs:
            times[name].append(run(name)[1])
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
