"""Weights on disk under Hugging Face names, and whether they are the ones that a model expects.

Of the four ways a weight can go astray, "set twice" is found on opening (`checkpoint_formats.open_checkpoint`);
"unmapped", "unexpected" and "wrong shape" by `match`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sva.models.config import ModelConfig
from sva.utils.errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights on disk, not yet in memory.

    `shapes` names every weight as Hugging Face does and gives its stored shape, (out, in) for matrices;
    `read` returns one of them as stored (GGUF: unpacked to float32), in memory of its own; `read_rows`, where the
    format allows it, only some of its rows. `quantisation` is the commonest packed type of a GGUF file ("Q4_1"), None
    where nothing is packed. `files` hold the weights.
    """

    path: Path
    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    quantisation: str | None = None
    read_rows: Callable[[str, slice], np.ndarray] | None = None
    files: tuple[Path, ...] = ()

    def read_finite(self, name: str) -> np.ndarray:
        """One of the weights as stored; raises UserError where it holds NaN or infinite values."""
        weight = self.read(name)
        if not np.isfinite(weight).all():
            raise UserError(f"{self.path}: {name} holds NaN or infinite values; fetch the checkpoint again")
        return weight

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """weight[index] of one weight, as stored; no more rows are read than that, where the format allows it."""
        if self.read_rows is None:
            return self.read(name)[index]
        return self.read_rows(name, index[0])[(slice(None), *index[1:])]


def match(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: Any = "",
    spelled: Callable[[str], str] = str,
) -> None:
    """Raises UserError unless both name the same weights with the same shapes.

    Args:
      expected: shape of each weight the model needs.
      found: shape of each tensor the checkpoint holds.
      where: the checkpoint's path, for the message.
      spelled: a weight's name as checkpoints of this architecture have it, for the message.

    Raises:
      UserError: one kind at a time: a weight without a tensor (unmapped), a tensor no weight takes
        (unexpected), a wrong shape. It names up to three of them and how many more there are.
    """
    lead = f"{where}: " if where else ""
    unmapped = [f"{spelled(name)} {list(shape)}" for name, shape in expected.items() if name not in found]
    unexpected = [f"{spelled(name)} {list(shape)}" for name, shape in found.items() if name not in expected]
    wrong = [
        f"{spelled(name)} (expected {list(shape)}, found {list(found[name])})"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if unmapped:
        also = f"; and it holds {some_of(unexpected)} that no weight takes" if unexpected else ""
        raise UserError(f"{lead}unmapped: the checkpoint has no tensor for {some_of(unmapped)}{also}")
    if unexpected:
        raise UserError(f"{lead}unexpected: the model has no weight for {some_of(unexpected)}; is config.json its own?")
    if wrong:
        raise UserError(f"{lead}wrong shape: {some_of(wrong)}; is config.json the checkpoint's own?")


def some_of(items: list[str]) -> str:
    """Up to three items and the number of the rest."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
