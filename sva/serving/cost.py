"""What a pass over one prompt cost: seconds, tokens and floating-point operations."""

from typing import Any, NamedTuple

from sva.adaptation.dispatchers import mixed_flops
from sva.models.flops import head_flops, pair_flops
from sva.models.transformer import Transformer


class Cost(NamedTuple):
    """Time, tokens and FLOPs; see `sva.adaptation.dispatchers.work` for what is counted."""

    seconds: float  # on the machine, shared with what ran beside it
    read: int  # tokens given
    drawn: int  # tokens generated
    flops: float


class Prices:
    """FLOPs of the second pass, from the sizes of a model and its bank."""

    def __init__(self, model: Transformer, bank: Any) -> None:
        self._token = mixed_flops(model, bank)
        self._pair, self._head = float(pair_flops(model.cfg)), float(head_flops(model.cfg))

    def flops(self, read: int, drawn: int) -> float:
        """Of a row that reads and draws so many tokens; the last one drawn is not read again."""
        tokens = read + max(drawn - 1, 0)
        return tokens * self._token + tokens * (tokens + 1) / 2 * self._pair + drawn * self._head
