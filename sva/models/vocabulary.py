"""Tokens that the tokenizer has and the model has no embedding for: said when it is loaded, refused by name in use."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sva.utils.errors import UserError

_SHOWN = 3  # tokens named in the line said at load


def excess(tokenizer: Any, size: int) -> str | None:
    """One line on the tokens of a tokenizer whose ids are `size` or more; None where there are none.

    It is no error: some families ship a spare token or two that no text of theirs holds.
    """
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= size)
    if not beyond:
        return None
    named = ", ".join(f"{token!r} (id {i})" for i, token in beyond[:_SHOWN])
    count = "1 token" if len(beyond) == 1 else f"{len(beyond)} tokens"
    more = ", ..." if len(beyond) > _SHOWN else ""
    return (
        f"the tokenizer has {count} beyond the model's {size} embeddings, {named}{more}: text that holds one is refused"
    )


def check_ids(ids: Sequence[int] | np.ndarray, size: int, tokenizer: Any = None, what: str = "input_ids") -> None:
    """Raises UserError for an id outside 0 to size - 1, which looks up no embedding but NaN.

    Args:
      ids: whole numbers, of any shape.
      size: the model's embeddings.
      tokenizer: gives the token's text to the message, where there is one.
      what: holds the ids, for the message.
    """
    found = np.asarray(ids)
    if not found.size or (found.min() >= 0 and found.max() < size):
        return
    bad = int(found[(found < 0) | (found >= size)][0])
    token = None
    if tokenizer is not None and 0 <= bad < len(tokenizer):  # it cannot be asked for larger numbers
        token = tokenizer.convert_ids_to_tokens(bad)
    named = f"the id {bad}" if token is None else f"the token {token!r} (id {bad})"
    raise UserError(
        f"{what}: {named} has no embedding, for the vocabulary has {size} tokens (ids 0 to {size - 1}); leave it out, "
        "or resize the checkpoint's embeddings to its tokenizer"
    )
