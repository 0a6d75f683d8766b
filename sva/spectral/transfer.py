"""Moving an expert to another model by index: the i-th largest singular value there takes the i-th z from here.

Transformer-Squared (arXiv 2501.06252), section 4.3 and tables 5 and 9, with its control: each vector shuffled.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from sva.spectral.forms import require_vector
from sva.utils.errors import UserError


def transfer(z: Mapping[str, Any], ranks: Mapping[str, int], shuffle: int | None = None) -> dict[str, np.ndarray]:
    """Effective z {name: [R'] float32} for a model whose weights of the same names have R' singular values.

    z_i goes to index i, for the singular values of both are descending. Where the other matrix has fewer, the tail of
    z is left out; where it has more, the rest is 1, the base. (In the paper all lengths are equal.) Deviation: the
    public code moves p of its rescaled sigmoid, and so rescales by the new singular values; here the effective z
    moves, as in the paper, which differs by one factor a matrix.

    Args:
      z: effective z of the expert, {name: [R]}.
      ranks: number of singular values of each weight of the other model that can be adapted.
      shuffle: the control: each vector is permuted before it is moved, by this seed and the weight's name.
    Raises:
      UserError: the other model lacks some of the weights; the message lists them.
    """
    missing = [name for name in z if name not in ranks]
    if missing:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UserError(
            f"the other model lacks {len(missing)} of the expert's {len(z)} weights: {listed}; "
            "an expert moves only to a model with the same kinds of weights and at least as many layers"
        )
    moved = {}
    for name, vector in z.items():
        require_vector(name, vector)
        values = np.asarray(vector, np.float32)
        if shuffle is not None:
            digest = hashlib.sha256(name.encode()).digest()
            values = np.random.default_rng([shuffle, int.from_bytes(digest[:8], "little")]).permutation(values)
        moved[name] = np.ones(ranks[name], np.float32)
        shared = min(len(values), ranks[name])
        moved[name][:shared] = values[:shared]
    return moved
