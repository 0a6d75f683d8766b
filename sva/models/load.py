"""A checkpoint's weights as the linen tree, streamed one at a time, and the fingerprint of what was read."""

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sva.errors import UserError
from sva.models.checkpoint import Checkpoint, match
from sva.models.transformer import Transformer
from sva.models.weights import expected, nest, split_name


def load_params(
    checkpoint: Checkpoint,
    model: Transformer,
    *,
    matrix: Callable[[np.ndarray], Any] = jnp.asarray,
    progress: bool = True,
) -> tuple[dict[str, Any], str]:
    """(params, fingerprint) of an open checkpoint; peak memory is one copy of the weights and one weight more.

    Weights come out in the model's dtype; layers are stacked as they are read where the model scans them. Each weight
    [D_out, D_in], or stack of them, becomes what `matrix` makes of it.

    Raises:
      UserError: a weight is missing, unexpected, given twice, of the wrong shape, or holds NaN or infinite values.
    """
    specs = expected(model.cfg)
    match({name: spec.shape for name, spec in specs.items()}, checkpoint.shapes, checkpoint.path)
    digests: dict[str, str] = {}
    tree: dict[str, Any] = {}
    stacks: dict[tuple[str, ...], np.ndarray] = {}
    # Kind by kind where layers are stacked, so that one stack at a time is on the host.
    order = sorted(specs, key=lambda name: split_name(name)[1]) if model.scan_layers else list(specs)
    for name in tqdm(order, "load", unit="weight", file=sys.stderr, disable=not progress, leave=False):
        stored = checkpoint.read(name)
        digests[name] = digest(stored)
        if not np.isfinite(stored).all():
            raise UserError(f"{checkpoint.path}: {name} holds NaN or infinite values; fetch the checkpoint again")
        layer, path = split_name(name)
        convert = matrix if len(specs[name].shape) == 2 else jnp.asarray
        if layer is None or not model.scan_layers:
            named = {name: convert(stored.astype(model.dtype, copy=False))}
            _merge(tree, nest(named, num_layers=model.cfg.num_layers, scan=False))
            continue
        stack = stacks.setdefault(path, np.empty((model.cfg.num_layers, *stored.shape), model.dtype))
        stack[layer] = stored.astype(model.dtype, copy=False)
        if layer == model.cfg.num_layers - 1:
            _merge(
                tree,
                {"layers": nest({".".join(path): convert(stacks.pop(path))}, num_layers=0, scan=False)},
            )
    return tree, fingerprint(digests.items())


def digest(weight: np.ndarray) -> str:
    """Hexadecimal sha256 of one weight's dtype, shape and bytes."""
    state = hashlib.sha256(f"{weight.dtype} {weight.shape}".encode())
    state.update(np.ascontiguousarray(weight).view(np.uint8).data)
    return state.hexdigest()


def fingerprint(digests: Iterable[tuple[str, str]]) -> str:
    """Hexadecimal sha256 over (name, digest) of every weight, whatever their order and their files."""
    return hashlib.sha256("\n".join(f"{name} {value}" for name, value in sorted(digests)).encode()).hexdigest()


def _merge(tree: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, Mapping):
            _merge(tree.setdefault(key, {}), value)
        else:
            tree[key] = value
