"""Few shapes for many sizes, so that a new batch meets a program that is compiled already."""

from collections.abc import Sequence

import numpy as np


def round_up(size: int, step: int) -> int:
    """The smallest multiple of `step` that holds `size`."""
    return -(-size // step) * step


def length_bucket(tokens: int) -> int:
    """The smallest bucket that holds `tokens`: 32, multiples of 16 to 128, 32 to 256, 128 to 1,024, then 512."""
    step = 16 if tokens <= 128 else 32 if tokens <= 256 else 128 if tokens <= 1024 else 512
    return max(32, round_up(tokens, step))


def prompt_bucket(tokens: int) -> int:
    """The smallest bucket that holds a prompt read by itself: multiples of 32 to 128, of 64 to 512, then of 256."""
    step = 32 if tokens <= 128 else 64 if tokens <= 512 else 256
    return round_up(tokens, step)


def budget_bucket(new_tokens: int) -> int:
    """The smallest bucket of tokens to generate: multiples of 8 to 64, of 64 to 512, then of 256."""
    step = 8 if new_tokens <= 64 else 64 if new_tokens <= 512 else 256
    return max(step, round_up(new_tokens, step))


def batch_bucket(rows: int) -> int:
    """The smallest bucket that holds `rows`: a power of two to 32, then multiples of 32."""
    if rows <= 32:
        return 1 << max(rows - 1, 0).bit_length()
    return round_up(rows, 32)


def packed_token_indices(mask: np.ndarray) -> np.ndarray | None:
    """[N] int32, row * T + column of every token of a mask [B, T], as `Transformer` takes them; None if not worth it.

    N is a half of B * T or three quarters, so that three programs serve all masks of a shape; spare indices repeat the
    first. Fewer than 1,024 places cost what reading the weights costs, packed or not.
    """
    indices = np.flatnonzero(mask).astype(np.int32)
    if mask.size < 1024 or not len(indices):
        return None
    size = round_up(max(len(indices), mask.size // 2), mask.size // 4)
    return np.concatenate([indices, np.repeat(indices[:1], size - len(indices))]) if size < mask.size else None


def pad_tokens(
    rows: Sequence[Sequence[int] | np.ndarray], length: int, *, side: str = "left"
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), each [B, length] int32, of token lists that fit; the padding, 0 in both, is on that side."""
    ids, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    for number, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[number, where], mask[number, where] = row, 1
    return ids, mask


def left_pad(ids: np.ndarray, mask: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), each [B, length] int32, padded on the left, of rows [B, T] padded on either side."""
    return pad_tokens([row[keep] for row, keep in zip(ids, mask.astype(bool), strict=True)], length)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Number of tokens at the start of every row to read once for all of them, a multiple of 8.

    No more than all rows have in common, and every row keeps a token of its own; 0 for a single row.
    """
    if len(rows) < 2:
        return 0
    shortest = min(len(row) for row in rows) - 1
    first = np.asarray(rows[0][:shortest])
    differs = [np.flatnonzero(np.asarray(row[:shortest]) != first) for row in rows]
    common = min([int(at[0]) for at in differs if at.size], default=shortest)
    return common // 8 * 8


def pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """x with its first row repeated below until it has `rows` rows."""
    return np.concatenate([x, np.repeat(x[:1], rows - x.shape[0], axis=0)]) if x.shape[0] < rows else x
