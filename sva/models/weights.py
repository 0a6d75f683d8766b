"""The one declaration of every weight of the decoder: checkpoint name, shape and logical axes.

Loading, export, sharding and the linen tree all read it; nothing else lists weights. A weight's place in the linen
tree is its Hugging Face name, read as a path:

    model.layers.3.mlp.up_proj.weight  ->  params / layers_3 / mlp / up_proj / weight     (unrolled)
                                           params / layers / mlp / up_proj / weight [3]   (scanned, stacked on axis 0)

Where a scan is cut there are a few stacks: see `sva.models.stacks`.

Adapters live in a collection of their own under the same paths, so one pair of functions, `nest` and `unnest`,
converts every tree keyed by weight name (params, z, adapters).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sva.models.config import ModelConfig
from sva.models.stacks import Scan, place, stacks
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
    parts: dict[str | None, int] = {"heads": cfg.num_heads, "kv_heads": cfg.num_kv_heads}  # a head is never cut
    q = (heads, width, "heads", "embed", cfg.attention_bias)
    kv = (kv_heads, width, "kv_heads", "embed", cfg.attention_bias)
    up = (mlp, width, "mlp", "embed", cfg.mlp_bias)
    if cfg.fused:  # no axis divides the rows: a part would hold queries without their keys
        linears: dict[str, tuple[int, int, str | None, str, bool]] = {
            "self_attn.qkv_proj": (heads + 2 * kv_heads, width, None, "embed", cfg.attention_bias),
            "mlp.gate_up_proj": (2 * mlp, width, None, "embed", cfg.mlp_bias),
        }
    else:
        linears = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
        linears |= {"mlp.gate_proj": up, "mlp.up_proj": up}
    linears |= {
        "self_attn.o_proj": (width, heads, "embed", "heads", cfg.attention_output_bias),
        "mlp.down_proj": (width, mlp, "embed", "mlp", cfg.mlp_bias),
    }
    norms = {name: width for name in cfg.norms if name}
    if cfg.qk_norm:
        whole = cfg.qk_norm == "full"
        norms |= {"self_attn.q_norm": heads if whole else head, "self_attn.k_norm": kv_heads if whole else head}
    weights = {"model.embed_tokens.weight": Leaf((cfg.vocab_size, width), ("vocab", "embed"))}
    for layer in range(cfg.num_layers):
        prefix = f"model.layers.{layer}."
        for name, (out, into, out_axis, in_axis, has_bias) in linears.items():
            units = (parts.get(out_axis, out), parts.get(in_axis, into))
            weights[f"{prefix}{name}.weight"] = Leaf((out, into), (out_axis, in_axis), units)
            if has_bias:
                weights[f"{prefix}{name}.bias"] = Leaf((out,), (None,))
        for name, size in norms.items():
            weights[f"{prefix}{name}.weight"] = Leaf((size,), (None,))
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


def nest(named: Mapping[str, Any], *, num_layers: int, scan: Scan) -> dict[str, Any]:
    """The linen tree of a tree keyed by weight name; values may be arrays or pytrees of arrays.

    With `scan`, the layers of one kind are stacked on a new axis 0 by their parsed number.

    Raises:
      UserError: with `scan`, a kind that is given for some layers of a stack only.
    """
    tree: dict[str, Any] = {}
    kinds: dict[tuple[str, ...], dict[int, Any]] = {}
    for name, value in named.items():
        path, number = path_of(name, scan)
        if number is None:
            _put(tree, path, value)
        else:
            kinds.setdefault(path, {})[number] = value
    sizes = {stack.key: stack for stack in stacks(num_layers, scan)}
    for path, layers in kinds.items():
        _, first, size = sizes[path[0]]
        missing = [number for number in range(size) if number not in layers]
        if missing:
            raise UserError(
                f"{'.'.join(path[1:])} is given for {len(layers)} of {size} layers that are scanned together (layer "
                f"{first + missing[0]} has none); load the model with `layers`, which cuts the scan, e.g. layers=0-3, "
                "or with scan_layers=False"
            )
        _put(tree, path, _stack([layers[number] for number in range(size)]))
    return tree


def path_of(name: str, scan: Scan) -> tuple[tuple[str, ...], int | None]:
    """(path in the linen tree, number within the stack or None) of a checkpoint name."""
    layer, path = split_name(name)
    if layer is None:
        return path, None
    key, number = place(layer, scan)
    return (key, *path), number


def unnest(tree: Mapping[str, Any], names: Mapping[str, Any], *, scan: Scan) -> dict[str, Any]:
    """The values of `names` (checkpoint names) out of a linen tree; the inverse of `nest`."""
    named = {}
    for name in names:
        path, number = path_of(name, scan)
        value = _get(tree, path)
        named[name] = value if number is None else jax.tree.map(lambda x, number=number: x[number], value)
    return named


def by_name(tree: Mapping[str, Any], names: Iterable[str], *, scan: Scan) -> ByName:
    """These weights' values out of a linen tree of stacked layers, without a copy of it."""
    places = {}
    for name in names:
        path, number = path_of(name, scan)
        assert number is not None, name
        places[name] = path, number
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
