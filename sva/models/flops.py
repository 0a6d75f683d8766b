"""Floating-point operations of a forward pass, two for each multiply-add, counted from a model's sizes."""

from collections.abc import Collection

from sva.models.config import ModelConfig
from sva.models.weights import expected


def linear_flops(cfg: ModelConfig, factored: Collection[str] = ()) -> int:
    """FLOPs per token of all layer matmuls; those named in `factored` cost 2 R (D_in + D_out)."""
    total = 0
    for name, leaf in expected(cfg).items():
        if len(leaf.shape) == 2 and ".layers." in name:
            out, into = leaf.shape
            total += 2 * min(out, into) * (out + into) if name in factored else 2 * out * into
    return total


def pair_flops(cfg: ModelConfig) -> int:
    """FLOPs of one query with one key in all layers: the score and the weighted value."""
    return 4 * cfg.num_layers * cfg.num_heads * cfg.head_dim


def head_flops(cfg: ModelConfig) -> int:
    """FLOPs of the logits of one hidden state."""
    return 2 * cfg.vocab_size * cfg.hidden_size
