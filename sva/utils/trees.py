"""Trees keyed by weight name: choosing weights by a setting, comparing names."""

import difflib
import re
from collections.abc import Iterable

from sva.utils.errors import UserError

TARGETS = {
    "mlp": r"mlp\.(gate|up|down)_proj",
    "attention": r"self_attn\.(q|v)_proj",
    "attention_full": r"self_attn\.(q|k|v|o)_proj",
    "ia3": r"(self_attn\.(k|v)_proj|mlp\.down_proj)",
    "all": r"(mlp\.(gate|up|down)_proj|self_attn\.(q|k|v|o)_proj)",
}


def select(names: Iterable[str], targets: str) -> list[str]:
    """The two-dimensional layer weights that `targets` names, in the order given.

    Args:
      names: checkpoint weight names.
      targets: `mlp` (gate, up, down), `attention` (q and v, as the parameter counts of arXiv 2501.06252, table 4,
        imply), `attention_full`, `ia3` (k, v and down, those of arXiv 2205.05638), `all`, or a regular expression
        searched for in the names.
    Raises:
      UserError: the expression is broken, or matches no weight.
    """
    pattern = rf"layers\.\d+\.{TARGETS[targets]}\.weight$" if targets in TARGETS else targets
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"targets={targets!r} is not a regular expression: {error}") from error
    names = list(names)
    linear = re.compile(r"\.layers\.\d+\..*_proj\.weight$")
    chosen = [name for name in names if linear.search(name) and expression.search(name)]
    if not chosen:
        others = [name for name in names if expression.search(name)]
        if others:
            raise UserError(
                f"targets={targets!r} matches {others[0]}, which is not the matrix of a linear layer; only such "
                "weights, of two dimensions, can be adapted"
            )
        example = next((name for name in names if linear.search(name)), "none")
        raise UserError(
            f"targets={targets!r} matches no weight; use one of {', '.join(TARGETS)} or a regular expression "
            f"over names such as {example}"
        )
    return chosen


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: ' (did you mean a, b?)', or all known names where none is near."""
    known = sorted(set(known) - {name})  # which may be refused for another reason than its name
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" (did you mean {', '.join(close)}?)" if close else f" (known: {', '.join(known)})"
