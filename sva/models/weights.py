"""The one declaration of every weight of the decoder: checkpoint name, shape and logical axes.

Loading, export, sharding and the linen tree all read it; nothing else lists weights. A weight's place in the linen
tree is its Hugging Face name, read as a path:

    model.layers.3.mlp.up_proj.weight  ->  params / layers_3 / mlp / up_proj / weight     (unrolled)
                                           params / layers / mlp / up_proj / weight [3]   (scanned, stacked on axis 0)

Adapters live in a collection of their own under the same paths, so one pair of functions, `nest` and `unnest`,
converts every tree keyed by weight name (params, z, adapters).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sva.models.config import ModelConfig
from sva.parallel.sharding import Leaf
from sva.utils.by_name import ByName
from sva.utils.errors import UserError

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def expected(cfg: ModelConfig) -> dict[str, Leaf]:
    """Every weight of a model of this configuration, by Hugging Face name, in checkpoint order.

    Two-dimensional weights are (out, in). Vectors have no axis that is divided: see `sva.parallel.sharding`.
    """
    width, mlp, head = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
    heads, kv_heads = cfg.num_heads * head, cfg.num_kv_heads * head
    parts = {"heads": cfg.num_heads, "kv_heads": cfg.num_kv_heads}  # a head is never cut
    linears = {
        "self_attn.q_proj": (heads, width, "heads", "embed", cfg.attention_bias),
        "self_attn.k_proj": (kv_heads, width, "kv_heads", "embed", cfg.attention_bias),
        "self_attn.v_proj": (kv_heads, width, "kv_heads", "embed", cfg.attention_bias),
        "self_attn.o_proj": (width, heads, "embed", "heads", cfg.attention_output_bias),
        "mlp.gate_proj": (mlp, width, "mlp", "embed", cfg.mlp_bias),
        "mlp.up_proj": (mlp, width, "mlp", "embed", cfg.mlp_bias),
        "mlp.down_proj": (width, mlp, "embed", "mlp", cfg.mlp_bias),
    }
    weights = {"model.embed_tokens.weight": Leaf((cfg.vocab_size, width), ("vocab", "embed"))}
    for layer in range(cfg.num_layers):
        prefix = f"model.layers.{layer}."
        for name, (out, into, out_axis, in_axis, has_bias) in linears.items():
            units = (parts.get(out_axis, out), parts.get(in_axis, into))
            weights[f"{prefix}{name}.weight"] = Leaf((out, into), (out_axis, in_axis), units)
            if has_bias:
                weights[f"{prefix}{name}.bias"] = Leaf((out,), (None,))
        if cfg.qk_norm:
            for name in ("q_norm", "k_norm"):
                weights[f"{prefix}self_attn.{name}.weight"] = Leaf((head,), (None,))
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = Leaf((width,), (None,))
    weights["model.norm.weight"] = Leaf((width,), (None,))
    if not cfg.tie_word_embeddings:
        weights["lm_head.weight"] = Leaf((cfg.vocab_size, width), ("vocab", "embed"))
    return weights


def split_name(name: str) -> tuple[int | None, tuple[str, ...]]:
    """(layer number or None, path below the layer or the root) of a checkpoint name."""
    match = _LAYER.fullmatch(name)
    if match:
        return int(match[1]), tuple(match[2].split("."))
    return None, tuple(name.removeprefix("model.").split("."))


def nest(named: Mapping[str, Any], *, num_layers: int, scan: bool) -> dict[str, Any]:
    """The linen tree of a tree keyed by weight name; values may be arrays or pytrees of arrays.

    With `scan`, the layers of one kind are stacked on a new axis 0 by their parsed number.

    Raises:
      UserError: with `scan`, a kind that is given for some layers only.
    """
    tree: dict[str, Any] = {}
    kinds: dict[tuple[str, ...], dict[int, Any]] = {}
    for name, value in named.items():
        layer, path = split_name(name)
        if layer is None:
            _put(tree, path, value)
        elif scan:
            kinds.setdefault(path, {})[layer] = value
        else:
            _put(tree, (f"layers_{layer}", *path), value)
    for path, layers in kinds.items():
        missing = [layer for layer in range(num_layers) if layer not in layers]
        if missing:
            raise UserError(
                f"{'.'.join(path)} is given for {len(layers)} of {num_layers} scanned layers (layer {missing[0]} "
                "has none); target every layer of a kind, or load the model with scan_layers=False"
            )
        _put(tree, ("layers", *path), _stack([layers[layer] for layer in range(num_layers)]))
    return tree


def unnest(tree: Mapping[str, Any], names: Mapping[str, Any], *, scan: bool) -> dict[str, Any]:
    """The values of `names` (checkpoint names) out of a linen tree; the inverse of `nest`."""
    named = {}
    for name in names:
        layer, path = split_name(name)
        if layer is None:
            named[name] = _get(tree, path)
        elif scan:
            named[name] = jax.tree.map(lambda x, layer=layer: x[layer], _get(tree, ("layers", *path)))
        else:
            named[name] = _get(tree, (f"layers_{layer}", *path))
    return named


def by_name(tree: Mapping[str, Any], names: Iterable[str]) -> ByName:
    """These weights' values out of a linen tree of stacked layers, without a copy of it."""
    places = {}
    for name in names:
        layer, path = split_name(name)
        assert layer is not None, name
        places[name] = ("layers", *path), layer
    return ByName(tree, places)


def _stack(values: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *values)


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
