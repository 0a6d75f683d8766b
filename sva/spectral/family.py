"""Parametrisations: what an expert stores, and what it stands for in each matrix W = U diag(s) V^T.

| spelt                | weight                                         | numbers trained a matrix | source           |
|----------------------|------------------------------------------------|--------------------------|------------------|
| `linear`             | U diag(s z) V^T                                | R                        | arXiv 2501.06252 |
| `sigmoid_nuclear`    | U diag(s z) V^T, z = c sigmoid(p)              | R                        | its public code  |
| `top_k:k=64`         | U diag(s z) V^T, z = 1 but for the k largest s | k                        |                  |
| `tail_only:k=64`     | U diag(s z) V^T, z = 1 but for the k smallest  | k                        |                  |
| `banded:width=2`     | U (diag(s) + M) V^T, M of 2 w + 1 diagonals    | (2 w + 1) R - w (w + 1)  | arXiv 2405.19597 |
| `core:r=16`          | W + U_r diag(s_r) C V_r^T                      | r^2                      | arXiv 2405.17604 |
| `projected:n=13,r=2` | W + U_r diag(s_r) (sum_i v_i P_i) V_r^T        | n for all together       | arXiv 2602.04118 |

R = min(D_out, D_in) singular values, c = sum(s) / sum(s sigmoid(p)), w the width. Every member starts at the base: the
first four at z = 1, up to the rounding of U diag(s) V^T (about 1e-6 relative in float32); SVFT's bands, LoRA-XS's core
and TinyLoRA's v at 0, bit for bit. The first four yield an effective z, which is what inference mixes and gives to
single rows; the others are merged.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from sva.spectral.members import Banded, Cored, Family, Linear, Projected, SigmoidNuclear, TailOnly, TopK
from sva.utils.errors import UserError

LINEAR = Linear()
SIGMOID_NUCLEAR = SigmoidNuclear()

EXAMPLES: tuple[Family, ...] = (LINEAR, SIGMOID_NUCLEAR, TopK(64), TailOnly(64), Banded(2), Cored(16), Projected(13, 2))
_BY_NAME = {example.name: example for example in EXAMPLES}


def family(spelling: str) -> Family:
    """The parametrisation spelt so: a name, and after a colon its settings, e.g. `core:r=16`.

    Raises:
      UserError: no such parametrisation (all are listed), a setting that it lacks, misses or cannot take.
    """
    name, _, text = spelling.partition(":")
    if name not in _BY_NAME:
        raise UserError(f"unknown parametrisation {name!r}: it is one of {', '.join(map(str, EXAMPLES))}")
    example = _BY_NAME[name]
    known = [field.name for field in dataclasses.fields(example)]
    settings: dict[str, int] = {}
    for part in text.split(",") if text else []:
        setting, _, value = part.partition("=")
        if setting not in known or setting in settings:
            raise UserError(
                f"parametrisation {spelling!r}: {setting!r} is unknown or given twice; write e.g. {example}"
            )
        if not value.isdecimal():
            raise UserError(f"parametrisation {spelling!r}: {setting}={value} is no whole number; write e.g. {example}")
        settings[setting] = int(value)
    if settings.keys() != set(known):
        missing = ", ".join(setting for setting in known if setting not in settings)
        raise UserError(f"parametrisation {spelling!r} does not say {missing}; write e.g. {example}")
    return type(example)(**settings)


def count(member: Family, sites: Any) -> int:
    """How many numbers are trained. Only shapes are looked at: s may be a jax.ShapeDtypeStruct."""
    return sum(int(np.prod(shape)) for shape in _shapes(jax.eval_shape(member.start, sites)).values())


def check_raw(member: Family, raw: Any, sites: Any) -> None:
    """Raises UserError unless raw is the tree that `member` trains on these sites: the same keys, the same shapes."""
    wanted, found = _shapes(jax.eval_shape(member.start, sites)), _shapes(raw)
    for path, shape in wanted.items():
        if path not in found:
            raise UserError(f"raw has no {path}, which {member} trains here; give all {len(wanted)} of its entries")
        if found[path] != shape:
            raise UserError(f"{path}: raw has shape {list(found[path])}, {member} needs {list(shape)}")
    for path in found:
        if path not in wanted:
            raise UserError(f"raw holds {path}, which is none of the {len(wanted)} entries that {member} trains here")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf) for path, leaf in leaves}
