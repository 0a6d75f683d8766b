"""The one declaration of every weight of the decoder: checkpoint name, shape and logical axes.

Loading, export, sharding and the linen tree all read it; nothing else lists weights. A weight's place in the linen
tree is its Hugging Face name, read as a path:

    model.layers.3.mlp.up_proj.weight  ->  params / layers_3 / mlp / up_proj / weight     (unrolled)
                                           params / layers / mlp / up_proj / weight [3]   (scanned, stacked on axis 0)

Where a scan is cut there are a few stacks: see `sva.models.stacks`. The modules of a mixture-of-experts layer are
stacked always; each has the name that checkpoints with a tensor for every module give it, whatever the architecture
and whether the checkpoint at hand spells them so (`sva.models.moe_names`):

    model.layers.3.mlp.experts.5.up_proj.weight  ->  params / layers_3 / mlp / experts / up_proj / weight [5]
                                                     params / layers / mlp / experts / up_proj / weight [3, 5]

Adapters live in a collection of their own under the same paths, so one pair of functions, `nest` and `unnest`,
converts every tree keyed by weight name (params, z, adapters). All modules of a layer may also be one entry [X, ...],
whose name has * for the module's number (`of_all_modules`); a tree has one or the other.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sva.models.config import ModelConfig
from sva.models.moe_config import Moe
from sva.models.stacks import Scan, place, stacks
from sva.parallel.sharding import Leaf
from sva.utils.by_name import ByName
from sva.utils.errors import UserError

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MODULES = "experts"  # the part of a path whose next part is a module's number
_ALL = "*"  # stands there for all modules


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
    linears: dict[str, tuple[int, int, str | None, str, bool]]
    if cfg.fused:  # no axis divides the rows: a part would hold queries without their keys
        linears = {"self_attn.qkv_proj": (heads + 2 * kv_heads, width, None, "embed", cfg.attention_bias)}
        ups = {"mlp.gate_up_proj": (2 * mlp, width, None, "embed", cfg.mlp_bias)}
    else:
        linears = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
        ups = {"mlp.gate_proj": up, "mlp.up_proj": up}
    linears["self_attn.o_proj"] = (width, heads, "embed", "heads", cfg.attention_output_bias)
    linears |= ups
    linears["mlp.down_proj"] = (width, mlp, "embed", "mlp", cfg.mlp_bias)
    sparse = _sparse_linears(linears, cfg.moe, width) if cfg.moe else {}
    norms = {name: width for name in cfg.norms if name}
    if cfg.qk_norm:
        whole = cfg.qk_norm == "full"
        norms |= {"self_attn.q_norm": heads if whole else head, "self_attn.k_norm": kv_heads if whole else head}
    weights = {"model.embed_tokens.weight": Leaf((cfg.vocab_size, width), ("vocab", "embed"))}
    for layer in range(cfg.num_layers):
        prefix = f"model.layers.{layer}."
        own = sparse if cfg.moe and cfg.moe.layers[layer] else linears
        for name, (out, into, out_axis, in_axis, has_bias) in own.items():
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


def _sparse_linears(dense: Mapping[str, Any], moe: Moe, width: int) -> dict[str, Any]:
    """The matrices of a layer with a sparse mlp: those of a dense one outside it, the router's and each module's."""
    linears = {name: about for name, about in dense.items() if not name.startswith("mlp.")}
    linears["mlp.gate"] = (moe.modules, width, None, "embed", False)
    for module in range(moe.modules):
        prefix = f"mlp.{_MODULES}.{module}."
        linears[f"{prefix}gate_proj"] = linears[f"{prefix}up_proj"] = (moe.width, width, "mlp", "embed", False)
        linears[f"{prefix}down_proj"] = (width, moe.width, "embed", "mlp", False)
    return linears


def split_name(name: str) -> tuple[int | None, tuple[str, ...]]:
    """(layer number or None, path below the layer or the root) of a checkpoint name."""
    match = _LAYER.fullmatch(name)
    if match:
        return int(match[1]), tuple(match[2].split("."))
    return None, tuple(name.removeprefix("model.").split("."))


def nest(named: Mapping[str, Any], *, num_layers: int, scan: Scan, modules: int | None = None) -> dict[str, Any]:
    """The linen tree of a tree keyed by weight name; values may be arrays or pytrees of arrays.

    With `scan`, the layers of one kind are stacked on a new axis 0 by their parsed number, and so are always the
    `modules` of each layer, after the layers.

    Raises:
      UserError: a kind that is given for some layers of a stack only, or for some modules of a layer.
    """
    tree: dict[str, Any] = {}
    kinds: dict[tuple[str, ...], dict[tuple[int, ...], Any]] = {}
    for name, value in named.items():
        path, at = path_of(name, scan)
        kinds.setdefault(path, {})[at] = value
    for path, values in kinds.items():
        (depth,) = set(map(len, values))  # a layer's modules are one entry, or each is
        shape = stack_shape(path, num_layers, scan, modules)[:depth]
        if not shape:
            _put(tree, path, values[()])
            continue
        places = list(np.ndindex(shape))
        missing = [at for at in places if at not in values]
        if missing:
            raise UserError(_incomplete(path, values, missing[0], num_layers, scan))
        _put(tree, path, _stack([values[at] for at in places], shape))
    return tree


def stack_shape(path: tuple[str, ...], num_layers: int, scan: Scan, modules: int | None) -> tuple[int, ...]:
    """(), (layers,), (modules,) or (layers, modules): what the array at a path of the linen tree stacks."""
    sizes = {stack.key: stack.size for stack in stacks(num_layers, scan)}
    layers = (sizes[path[0]],) if path[0] in sizes else ()
    return (*layers, modules or 0) if path_has_modules(path) else layers


def path_has_modules(path: tuple[str, ...]) -> bool:
    """Whether the modules of a mixture-of-experts layer are stacked at a path of the linen tree."""
    return _MODULES in path


def path_of(name: str, scan: Scan) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(path in the linen tree, index in the stack there: () where there is none) of a checkpoint name."""
    layer, path = split_name(name)
    if layer is None:
        return path, ()
    key, number = place(layer, scan)
    at = () if number is None else (number,)
    if _MODULES in path:
        here = path.index(_MODULES) + 1
        at = at if path[here] == _ALL else (*at, int(path[here]))
        path = (*path[:here], *path[here + 1 :])
    return (key, *path), at


def of_all_modules(name: str) -> str:
    """The name of a module's matrix and those of all other modules of its layer as one; another weight's is its own."""
    layer, path = split_name(name)
    if layer is None or _MODULES not in path:
        return name
    here = path.index(_MODULES) + 1
    return f"model.layers.{layer}.{'.'.join((*path[:here], _ALL, *path[here + 1 :]))}"


def by_module(named: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """{name: value} of these weights from values of which the modules of each layer are one entry [X, ...]."""
    found = {}
    for name in names:
        is_apart = name in named or not is_module(name)
        value, (_, at) = named[name if is_apart else of_all_modules(name)], path_of(name, False)
        found[name] = value if is_apart else jax.tree.map(lambda x, at=at: x[at], value)
    return found


def is_module(name: str) -> bool:
    """Whether a weight is a matrix of one module of a mixture of experts."""
    return path_has_modules(split_name(name)[1])


def unnest(tree: Mapping[str, Any], names: Iterable[str], *, scan: Scan) -> dict[str, Any]:
    """The values of `names` (checkpoint names) out of a linen tree; the inverse of `nest`."""
    named = {}
    for name in names:
        path, at = path_of(name, scan)
        value = _get(tree, path)
        named[name] = jax.tree.map(lambda x, at=at: x[at], value) if at else value
    return named


def by_name(tree: Mapping[str, Any], names: Iterable[str], *, scan: Scan) -> ByName:
    """These weights' values out of a linen tree, without a copy of its stacks."""
    return ByName(tree, {name: path_of(name, scan) for name in names})


def _stack(values: list[Any], shape: tuple[int, ...]) -> Any:
    """The values in one tree of arrays, whose first axes are `shape`."""

    def one(*xs: Any) -> Any:
        stacked = np.stack(xs) if isinstance(xs[0], np.generic) else jnp.stack(xs)  # of numbers one constant
        return stacked.reshape(*shape, *stacked.shape[1:])

    return jax.tree.map(one, *values)


def _incomplete(
    path: tuple[str, ...], values: Mapping[tuple[int, ...], Any], missing: tuple[int, ...], num_layers: int, scan: Scan
) -> str:
    """Why a stack cannot be made."""
    kind, layers = ".".join(path[1:]), {at[0] for at in values}
    found = next((stack for stack in stacks(num_layers, scan) if stack.key == path[0]), None)
    if found is None or missing[0] in layers:
        return (
            f"{kind} is given for {len(values)} modules, and not for module {missing[-1]} of {path[0]}; the modules of "
            "a layer are adapted together: widen the targets, e.g. targets=moe"
        )
    return (
        f"{kind} is given for {len(layers)} of {found.size} layers that are scanned together (layer "
        f"{found.first + missing[0]} has none); load the model with `layers`, which cuts the scan, e.g. layers=0-3, "
        "or with scan_layers=False"
    )


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _get(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
