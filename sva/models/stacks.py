"""How a model's layers lie in its linen tree: each by itself, or stacked, as one compiled layer scans over them.

One stack holds all layers, or a few hold a range of layers each, one after another: so a scan is cut where the layers
with an adapter begin and end. Only then do those without one need no spectrum, and no weights of their own kind.

    scan              where layer 45 of 80 lies
    False             layers_45
    True              layers          [45]
    (40,)             layers_from_40  [5], after layers_from_0 with 40 layers
"""

from collections.abc import Collection
from typing import NamedTuple

from sva.utils.trees import layer_numbers

Scan = (
    bool | tuple[int, ...]
)  # False: unrolled; True: one stack; numbers: the layers at which stacks after the first begin


class Stack(NamedTuple):
    """Consecutive layers that are scanned together."""

    key: str  # in the linen tree
    first: int  # layer
    size: int  # layers


def stacks(num_layers: int, scan: Scan) -> tuple[Stack, ...]:
    """The stacks of a model, in order; none where layers are unrolled."""
    if not scan:
        return ()
    ends = (*(() if scan is True else scan), num_layers)
    return tuple(Stack(_key(scan, first), first, end - first) for first, end in zip((0, *ends), ends, strict=False))


def place(layer: int, scan: Scan) -> tuple[str, int | None]:
    """(key in the linen tree, number within the stack or None) of a layer."""
    if not scan:
        return f"layers_{layer}", None
    first = 0 if scan is True else max((start for start in scan if start <= layer), default=0)
    return _key(scan, first), layer - first


def cut(layers: str | None, num_layers: int, kinds: Collection[int] = ()) -> Scan:
    """The scan of all layers, cut where these begin and end (see `sva.utils.trees.layer_numbers`); None: uncut.

    `kinds` are the layers at which it is cut in any case, since they are of another kind than the one before.

    Raises:
      UserError: layers that the model does not have.
    """
    chosen = frozenset() if layers is None else layer_numbers(layers, num_layers)
    return tuple(i for i in range(1, num_layers) if i in kinds or (i in chosen) != (i - 1 in chosen)) or True


def _key(scan: Scan, first: int) -> str:
    return "layers" if scan is True else f"layers_from_{first}"
