"""Floating-point operations of a forward pass, two for each multiply-add, counted from a model's sizes."""

from collections.abc import Collection

from sva.models.config import ModelConfig
from sva.models.weights import expected, path_has_modules, split_name


def linear_flops(cfg: ModelConfig, factored: Collection[str] = ()) -> int:
    """FLOPs per token of all layer matmuls; those named in `factored` cost 2 R (D_in + D_out).

    Of a mixture's X modules a token meets `top_k`, here each as often as any other.
    """
    total = 0.0
    for name, leaf in expected(cfg).items():
        if len(leaf.shape) == 2 and ".layers." in name:
            out, into = leaf.shape
            flops = 2 * min(out, into) * (out + into) if name in factored else 2 * out * into
            total += flops * met(cfg, name)
    return round(total)


def met(cfg: ModelConfig, name: str) -> float:
    """The share of tokens that meet a weight: 1, or of one of a mixture's modules top_k / X."""
    return met_at(cfg, split_name(name)[1])


def met_at(cfg: ModelConfig, path: tuple[str, ...]) -> float:
    """`met` of what lies at a path of the linen tree."""
    return cfg.moe.top_k / cfg.moe.modules if cfg.moe is not None and path_has_modules(path) else 1


def pair_flops(cfg: ModelConfig) -> int:
    """FLOPs of one query with one key in all layers: the score and the weighted value."""
    return 4 * cfg.num_layers * cfg.num_heads * cfg.head_dim


def head_flops(cfg: ModelConfig) -> int:
    """FLOPs of the logits of one hidden state."""
    return 2 * cfg.vocab_size * cfg.hidden_size
