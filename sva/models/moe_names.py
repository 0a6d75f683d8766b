"""Names of a mixture's weights: one for every matrix of every module, whatever the checkpoint's spelling.

| checkpoint                                        | here                                            |
|---------------------------------------------------|-------------------------------------------------|
| `mlp.gate.weight`                                 | the same                                        |
| `mlp.experts.5.up_proj.weight`                    | the same (Qwen3-MoE, OLMoE)                     |
| `block_sparse_moe.gate.weight`                    | `mlp.gate.weight` (Mixtral)                     |
| `block_sparse_moe.experts.5.w1.weight`, `w3`, `w2` | `mlp.experts.5.gate_proj.weight`, `up`, `down` |
| `mlp.experts.gate_up_proj` [X, 2 F, D]            | X times `gate_proj` [F, D] and `up_proj` [F, D] |
| `mlp.experts.down_proj` [X, D, F]                 | X times `down_proj` [D, F]                      |

The fused tensors are how transformers 5 holds a layer in memory; what it saves are tensors by module.
"""

import re
from collections.abc import Mapping

from sva.models.moe_config import Moe
from sva.utils.errors import UserError

_FUSED = re.compile(r"(.*\.(?:mlp|block_sparse_moe)\.experts\.)(gate_up_proj|down_proj)(?:\.weight)?")
_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_MIXTRAL_MODULE = re.compile(r"(.*\.mlp\.experts\.\d+\.)(w[123])(\.weight)")
_OWN_MODULE = re.compile(r"(.*)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj(\.weight)")


def canonical(name: str) -> str:
    """The name here of a tensor by module, or of any other weight."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    match = _MIXTRAL_MODULE.fullmatch(name)
    return f"{match[1]}{_MIXTRAL[match[2]]}{match[3]}" if match else name


def parts(name: str, shape: tuple[int, ...], moe: Moe) -> Mapping[str, tuple[int, tuple[int, int]]]:
    """{name by module: (place of its first number in the tensor, its shape)} of a fused tensor; {} of any other.

    Raises:
      UserError: the tensor is not of so many modules of that width.
    """
    match = _FUSED.fullmatch(name)
    if match is None:
        return {}
    kinds = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
    width = moe.width if len(kinds) == 1 else 2 * moe.width
    place = 2 if len(kinds) == 1 else 1
    if len(shape) != 3 or shape[0] != moe.modules or shape[place] != width:
        wanted = ["D", "D", "D"]
        wanted[0], wanted[place] = str(moe.modules), str(width)
        raise UserError(
            f"wrong shape: {name} (expected [{', '.join(wanted)}], found {list(shape)}); is config.json the "
            "checkpoint's own?"
        )
    rows, columns = shape[1] // len(kinds), shape[2]
    return {
        f"{match[1]}{module}.{kind}.weight": ((module * len(kinds) + number) * rows * columns, (rows, columns))
        for module in range(moe.modules)
        for number, kind in enumerate(kinds)
    }


def written(kind: str, name: str) -> str:
    """The name that a checkpoint of this architecture has for a weight, so that transformers 4 and 5 load it."""
    if kind != "mixtral":
        return name
    match = _OWN_MODULE.fullmatch(name)
    if match:
        theirs = {ours: w for w, ours in _MIXTRAL.items()}[f"{match[3]}_proj"]
        return f"{match[1]}.block_sparse_moe.experts.{match[2]}.{theirs}{match[4]}"
    return re.sub(r"\.mlp\.gate\.weight$", ".block_sparse_moe.gate.weight", name)
