"""Mixture-of-experts settings of a `config.json`: Mixtral, Qwen3-MoE and OLMoE.

The parts that a router chooses between are called modules here (X of them), an "expert" alone being a set of z.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sva.utils.errors import UserError

# What an absent key means, as in `sva.models.config.DEFAULTS`.
MOE_DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "decoder_sparse_step": 1,
        "mlp_only_layers": None,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
    },
    "olmoe": {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False, "clip_qkv": None},
}
# Fields that change no logit, each with the reason.
WITHOUT_EFFECT = {
    "router_jitter_noise": "noise on the router's inputs while transformers trains",
    "router_aux_loss_coef": "weight of a loss that transformers adds while it trains",
    "output_router_logits": "whether transformers also returns what the router computed",
}
_COUNTS = ("num_local_experts", "num_experts")  # transformers 5 writes the first where 4 wrote the second


@dataclass(frozen=True)
class Moe:
    """The sparse layers of a model: of X modules a router picks `top_k` for each token."""

    modules: int  # X
    top_k: int
    width: int  # of one module's hidden layer
    renormalise: bool  # the chosen modules' weights add to 1; else they are their shares among all X
    layers: tuple[bool, ...]  # which layers are sparse


def moe_from_hf(kind: str, config: Mapping[str, Any], read: Any, num_layers: int) -> Moe | None:
    """The sparse layers that a config describes; None for an architecture without any.

    Args:
      read: the typed look-ups of `sva.models.config`.
    Raises:
      UserError: more modules a token than there are, no or impossible sizes, a field that is not implemented.
    """
    if kind not in MOE_DEFAULTS:
        return None
    found = {name: config[name] for name in _COUNTS if config.get(name) is not None}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{name} {value}" for name, value in found.items())
        raise UserError(f"{read.where}: {said} contradict each other; keep the one that the checkpoint has")
    own = next(name for name in _COUNTS if name in MOE_DEFAULTS[kind])
    modules, top_k = read.size(next(iter(found), own)), read.size("num_experts_per_tok")
    if top_k > modules:
        raise UserError(f"{read.where}: num_experts_per_tok {top_k} is more than the {modules} modules of {own}")
    if kind == "olmoe" and read.get("clip_qkv") is not None:
        raise UserError(f"{read.where}: clip_qkv {read.get('clip_qkv')!r} is not implemented, only null")
    return Moe(
        modules=modules,
        top_k=top_k,
        width=read.size("moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"),
        renormalise=kind == "mixtral" or read.flag("norm_topk_prob"),
        layers=_sparse_layers(kind, num_layers, read),
    )


def moe_to_hf(kind: str, moe: Moe) -> dict[str, Any]:
    """The entries of a `config.json` from which `moe_from_hf` and transformers 4 and 5 make these layers again."""
    own = next(name for name in _COUNTS if name in MOE_DEFAULTS[kind])
    raw: dict[str, Any] = {own: moe.modules, "num_experts_per_tok": moe.top_k}
    if kind != "mixtral":
        raw["norm_topk_prob"] = moe.renormalise
    if kind == "qwen3_moe":
        dense = [layer for layer, is_sparse in enumerate(moe.layers) if not is_sparse]
        raw |= {"moe_intermediate_size": moe.width, "decoder_sparse_step": 1, "mlp_only_layers": dense}
    return raw


def sparse_cuts(moe: Moe | None) -> tuple[int, ...]:
    """The layers at which a scan must be cut: those of another kind than the layer before."""
    if moe is None:
        return ()
    return tuple(i for i in range(1, len(moe.layers)) if moe.layers[i] != moe.layers[i - 1])


def _sparse_layers(kind: str, num_layers: int, read: Any) -> tuple[bool, ...]:
    """Every n-th layer is sparse, but for those listed as dense."""
    if kind != "qwen3_moe":
        return (True,) * num_layers
    step, dense = read.size("decoder_sparse_step"), read.get("mlp_only_layers") or []
    if not isinstance(dense, list | tuple) or any(isinstance(i, bool) or not isinstance(i, int) for i in dense):
        raise UserError(f"{read.where}: mlp_only_layers must be a list of layers, not {dense!r}")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))
