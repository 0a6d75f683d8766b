"""Mixture-of-experts keys of a `config.json`: Mixtral's, Qwen3-MoE's and OLMoE's.

The parts that a router chooses between are called modules here (X of them), an "expert" alone being a set of z.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sva.models.fields import Field, Only, Reader, Sets, Unused
from sva.utils.errors import UserError

_COUNTS = ("num_local_experts", "num_experts")  # transformers 5 writes the first where 4 wrote the second


@dataclass(frozen=True)
class Moe:
    """The sparse layers of a model: of X modules a router picks `top_k` for each token."""

    modules: int  # X
    top_k: int
    width: int  # of one module's hidden layer
    renormalise: bool  # the chosen modules' weights add to 1; else they are their shares among all X
    layers: tuple[bool, ...]  # which layers are sparse


def sparse_cuts(moe: Moe | None) -> tuple[int, ...]:
    """The layers at which a scan must be cut: those of another kind than the layer before."""
    if moe is None:
        return ()
    return tuple(i for i in range(1, len(moe.layers)) if moe.layers[i] != moe.layers[i - 1])


def _moe(read: Reader, key: str) -> Moe:
    """What all keys of an architecture's mixture describe; `key` counts the modules."""
    found = {name: read.size(name) for name in _COUNTS if read.config.get(name) is not None}
    if len(set(found.values())) > 1:
        said = " and ".join(f"{name} {value}" for name, value in found.items())
        raise UserError(f"{read.where}: {said} contradict each other; keep the one that the checkpoint has")
    modules, top_k = read.size(next(iter(found), key)), read.size("num_experts_per_tok")
    if top_k > modules:
        raise UserError(f"{read.where}: num_experts_per_tok {top_k} is more than the {modules} modules of {key}")
    return Moe(
        modules=modules,
        top_k=top_k,
        width=read.size("moe_intermediate_size" if "moe_intermediate_size" in read.fields else "intermediate_size"),
        renormalise=read.flag("norm_topk_prob") if "norm_topk_prob" in read.fields else True,
        layers=_sparse_layers(read),
    )


def _sparse_layers(read: Reader) -> tuple[bool, ...]:
    """Every n-th layer is sparse, but for those listed as dense; all are where there are no such keys."""
    num_layers = read.size("num_hidden_layers")
    if "decoder_sparse_step" not in read.fields:
        return (True,) * num_layers
    step, dense = read.size("decoder_sparse_step"), read.get("mlp_only_layers") or []
    if not isinstance(dense, list | tuple) or any(isinstance(i, bool) or not isinstance(i, int) for i in dense):
        raise UserError(f"{read.where}: mlp_only_layers must be a list of layers, not {dense!r}")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers))


def _keys(count: str, modules: int, top_k: int) -> dict[str, Field]:
    """The keys that every mixture has; `count` is its own name of the number of modules."""
    other = next(name for name in _COUNTS if name != count)
    return {
        count: Sets(("moe",), modules, _moe),
        other: Sets(("moe",), None, None),
        "num_experts_per_tok": Sets(("moe",), top_k, None),
        "router_aux_loss_coef": Unused("the weight of a loss that transformers adds while it trains"),
        "output_router_logits": Unused("what transformers' forward returns beside the logits"),
    }


_SHARES: dict[str, Field] = {"norm_topk_prob": Sets(("moe",), False, None)}
MIXTRAL: dict[str, Field] = _keys("num_local_experts", 8, 2) | {
    "router_jitter_noise": Unused("noise on the router's inputs while transformers trains")
}
QWEN3_MOE: dict[str, Field] = (
    _keys("num_experts", 128, 8)
    | _SHARES
    | {
        "moe_intermediate_size": Sets(("moe",), 768, None),
        "decoder_sparse_step": Sets(("moe",), 1, None),
        "mlp_only_layers": Sets(("moe",), None, None),
    }
)
OLMOE: dict[str, Field] = (
    _keys("num_experts", 64, 8) | _SHARES | {"clip_qkv": Only((None,), "queries, keys and values are not clipped")}
)


def _written(get: Callable[[Moe], Any]) -> Callable[[Any], Any]:
    return lambda cfg: get(cfg.moe)


# What each key says of a model, as in `sva.models.config`.
WRITERS: dict[str, Callable[[Any], Any]] = {
    "num_local_experts": _written(lambda moe: moe.modules),
    "num_experts": _written(lambda moe: moe.modules),
    "num_experts_per_tok": _written(lambda moe: moe.top_k),
    "norm_topk_prob": _written(lambda moe: moe.renormalise),
    "moe_intermediate_size": _written(lambda moe: moe.width),
    "decoder_sparse_step": lambda _: 1,
    "mlp_only_layers": _written(lambda moe: [i for i, is_sparse in enumerate(moe.layers) if not is_sparse]),
}
