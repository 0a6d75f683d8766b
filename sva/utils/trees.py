"""Trees keyed by weight name: choosing weights by a setting, comparing names."""

import difflib
import re
from collections.abc import Iterable

from sva.utils.errors import UserError

_MODULES = r"mlp\.experts\.\d+\.(gate|up|down)_proj"
TARGETS = {
    "mlp": r"mlp\.(gate|up|gate_up|down)_proj",
    "attention": r"self_attn\.(q|v|qkv)_proj",
    "attention_full": r"self_attn\.(q|k|v|qkv|o)_proj",
    "ia3": r"(self_attn\.(k|v|qkv)_proj|mlp\.down_proj)",
    "moe": _MODULES,
    "router": r"mlp\.gate",
    "all": rf"({_MODULES}|mlp\.gate|mlp\.(gate|up|gate_up|down)_proj|self_attn\.(q|k|v|qkv|o)_proj)",
}
"""Weights by their names; matrices that a checkpoint holds as one (Phi-3's qkv and gate_up) are taken whole."""
_LINEAR = re.compile(r"\.layers\.\d+\.(.*_proj|mlp\.gate)\.weight$")


def adaptable(names: Iterable[str]) -> list[str]:
    """The weights of layers that are matrices of linear layers."""
    return [name for name in names if _LINEAR.search(name)]


def select(names: Iterable[str], targets: str, layers: str | None = None) -> list[str]:
    """The two-dimensional layer weights that `targets` names, of these layers, in the order given.

    Args:
      names: checkpoint weight names.
      targets: `mlp` (gate, up, down), `attention` (q and v, as the parameter counts of arXiv 2501.06252, table 4,
        imply), `attention_full`, `ia3` (k, v and down, those of arXiv 2205.05638), `moe` (gate, up and down of
        every module of a mixture of experts) and `router` beside its `attention`, `all`, or a regular expression
        searched for in the names.
      layers: see `layer_numbers`; None for all.
    Raises:
      UserError: the expression is broken or matches no weight, or the model has no such layers.
    """
    pattern = rf"layers\.\d+\.{TARGETS[targets]}\.weight$" if targets in TARGETS else targets
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"targets={targets!r} is not a regular expression: {error}") from error
    names = list(names)
    chosen = [name for name in adaptable(names) if expression.search(name)]
    if not chosen:
        others = [name for name in names if expression.search(name)]
        if others:
            raise UserError(
                f"targets={targets!r} matches {others[0]}, which is not the matrix of a linear layer; only such "
                "weights, of two dimensions, can be adapted"
            )
        example = next((name for name in names if _LINEAR.search(name)), "none")
        raise UserError(
            f"targets={targets!r} matches no weight; use one of {', '.join(TARGETS)} or a regular expression "
            f"over names such as {example}"
        )
    if layers is None:
        return chosen
    numbers = layer_numbers(layers, 1 + max(_layer(name) for name in adaptable(names)))
    if kept := [name for name in chosen if _layer(name) in numbers]:
        return kept
    raise UserError(f"layers={layers} and targets={targets!r} have no weight in common; change one")


def layer_numbers(layers: str, num_layers: int | None = None) -> frozenset[int]:
    """The layers of a text such as `0-39` or `0-3,8,12-15`: numbers from 0, both ends of a range included.

    Args:
      num_layers: of the model; None where no model is known yet.
    Raises:
      UserError: the text is none, or names a layer that the model does not have.
    """
    found: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part, re.ASCII)
        if match is None:
            raise UserError(f"layers={layers!r} names no layers; write e.g. 0-39, or 0-3,8 (the first layer is 0)")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"layers={layers!r}: {first}-{last} ends before it begins; write {last}-{first}")
        if num_layers is not None and last >= num_layers:
            raise UserError(f"layers={layers}: the model has {num_layers} layers, 0 to {num_layers - 1}")
        found.update(range(first, last + 1))
    return frozenset(found)


def _layer(name: str) -> int:
    """The number of a layer's weight."""
    return int(name.partition(".layers.")[2].partition(".")[0])


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: ' (did you mean a, b?)', or all known names where none is near."""
    known = sorted(set(known) - {name})  # which may be refused for another reason than its name
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" (did you mean {', '.join(close)}?)" if close else f" (known: {', '.join(known)})"
