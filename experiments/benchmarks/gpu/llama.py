"""A model of Llama-3-8B's shape with random weights, and transformers' own with the same; imported by the others."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import torch
import transformers

from sva.cli.throughput import random_lm
from sva.generation.lm import LM
from sva.models.config import to_hf
from sva.models.shape import model_config

SHAPE = Path(__file__).parents[3] / "configs" / "models" / "llama-3-8b"


def shaped(layers: int, dtype: str, *, scan_layers: bool = False) -> LM:
    """The first so many layers, the embeddings and the head."""
    cfg = model_config(str(SHAPE))
    cfg = dataclasses.replace(cfg, num_layers=layers, windows=cfg.windows[:layers])
    return random_lm(cfg, dtype, scan_layers=scan_layers)


def peer_of(lm: LM) -> Any:
    """transformers' model on the device that JAX has, whose parameters are the memory of `lm`'s own."""
    config = transformers.AutoConfig.for_model(**to_hf(lm.model.cfg))
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    with torch.device("meta"):
        peer = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, lm.model.dtype.__name__))
    for name, weight in lm.named_params().items():
        module, _, leaf = name.rpartition(".")
        shared = torch.nn.Parameter(torch.from_dlpack(weight), requires_grad=False)
        setattr(peer.get_submodule(module), leaf, shared)
    with torch.device(device):
        peer.model.rotary_emb = type(peer.model.rotary_emb)(config)  # its buffers would stay on `meta`
    return peer.eval()


def wait() -> None:
    """Until the device has done what torch asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
