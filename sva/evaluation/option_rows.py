"""Questions with their options laid side by side in rows, each token once.

What may follow a question is a tree: its options, which may share their first tokens. A row holds the trees of several
questions one after another, each depth first; the last token of an option is predicted and never read.

    row:    [ q q q q | a b | c | q q q | d | e f | . . ]       . is padding
    depth:    0 1 2 3   4 5   4   0 1 2   3   3 4   0 0
    end:      7 7 7 7   6 6   7   6 6 6 ...                     of the subtree, as columns of the row

A token sees itself and the earlier tokens in whose subtree it lies.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import struct

from sva.parallel.sharding import rows_bucket
from sva.utils.padding import length_bucket, round_up

LENGTH = 128  # tokens of a row, unless a question needs more


class Tree(NamedTuple):
    """A question and its options: N tokens to read, and Q to predict, those of the first option first."""

    ids: list[int]  # [N]
    depths: list[int]  # [N], a token's position
    ends: list[int]  # [N], the place after its subtree
    sources: list[int]  # [Q], the place of the token that predicts each
    targets: list[int]  # [Q], token ids
    counts: list[int]  # tokens of each option, Q in all


def tree(head: Sequence[int], tails: Sequence[Sequence[int]]) -> Tree:
    """The tree of a question's tokens and the tokens of each option behind it; neither is empty."""
    ids, depths, ends = list(head), list(range(len(head))), [0] * len(head)
    places: dict[tuple[int, ...], int] = {(): len(head) - 1}  # of the last token of each start of an option
    for tail in sorted(map(tuple, tails)):  # so that a start's continuations follow one another
        starts = [tail[:count] for count in range(1, len(tail))]
        for start in starts:
            if start not in places:
                places[start] = len(ids)
                ids.append(start[-1])
                depths.append(len(head) + len(start) - 1)
                ends.append(0)
        for start in starts:
            ends[places[start]] = len(ids)
    ends[: len(head)] = [len(ids)] * len(head)
    sources = [places[tuple(tail[:count])] for tail in tails for count in range(len(tail))]
    targets = [token for tail in tails for token in tail]
    return Tree(ids, depths, ends, sources, targets, [len(tail) for tail in tails])


class Batch(NamedTuple):
    """Rows that are read together: how many tokens each holds, and the numbers of the trees in it."""

    length: int
    rows: list[list[int]]


def batches(sizes: Sequence[int], batch_tokens: int, *, alone: bool) -> list[Batch]:
    """Trees of these sizes in batches of at most `batch_tokens`, or of one row; `alone`: each in a row of its own.

    Otherwise rows are 128 tokens long, or the first power of two times that which holds a tree, and filled as far as
    they can be: few shapes, whatever the trees.
    """
    found = []
    if alone:
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        while order:
            length = length_bucket(sizes[order[0]])
            count = _rows(batch_tokens, length)
            found.append(Batch(length, [[number] for number in order[:count]]))
            order = order[count:]
        return found
    for length, rows in fill(sizes).items():
        count = _rows(batch_tokens, length)
        found += [Batch(length, rows[start : start + count]) for start in range(0, len(rows), count)]
    return found


def _rows(batch_tokens: int, length: int) -> int:
    """Rows of this length in a batch: a power of two."""
    return 1 << max(batch_tokens // length, 1).bit_length() - 1


def fill(sizes: Sequence[int]) -> dict[int, list[list[int]]]:
    """{row length: rows, each the numbers of the trees in it}: a tree goes into the fullest row with room for it.

    The largest trees come first, so that smaller ones fill the rows that those need.
    """
    rows: dict[int, list[list[int]]] = {}
    room: list[list[int]] = []  # [tokens left, row length, place in `rows`] of every row
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[number]
        best = min((row for row in room if row[0] >= size), default=None)
        if best is None:
            length = LENGTH << max(-(-size // LENGTH) - 1, 0).bit_length()
            best = [length, length, len(rows.setdefault(length, []))]
            rows[length].append([])
            room.append(best)
        best[0] -= size
        rows[best[1]][best[2]].append(number)
    return rows


@struct.dataclass
class OptionRows:
    """B rows of T tokens, as `target_logprobs` reads them; the shapes are B * T and Q, a power of two times that."""

    ids: Any  # [B, T] int32
    depths: Any  # [B, T] int32
    ends: Any  # [B, T] int32; of padding the next column
    valid: Any  # [B, T] bool
    states: Any  # [B * T] int32, row * T + column of the tokens that predict some, each once; then spare
    count: Any  # [] int32, how many those are
    sources: Any  # [Q] int32, which of `states` predicts each target
    targets: Any  # [Q] int32, token ids; then spare


def option_rows(batch: Batch, trees: Sequence[Tree]) -> OptionRows:
    """The trees of a batch as arrays, targets in the order in which rows name trees.

    Their rows are a power of two, or more until a mesh divides them.
    """
    length, size = batch.length, rows_bucket(len(batch.rows))
    ids, depths = (np.zeros((size, length), np.int32) for _ in range(2))
    ends = np.tile(np.arange(1, length + 1, dtype=np.int32), (size, 1))
    valid = np.zeros((size, length), bool)
    predicting, targets = [], []
    for row, numbers in enumerate(batch.rows):
        used = 0
        for each in (trees[number] for number in numbers):
            here = row, slice(used, used + len(each.ids))
            ids[here], depths[here], valid[here] = each.ids, each.depths, True
            ends[here] = np.asarray(each.ends) + used
            predicting.append(np.asarray(each.sources) + row * length + used)
            targets += each.targets
            used += len(each.ids)
    states, sources = np.unique(np.concatenate(predicting), return_inverse=True)
    times = round_up(len(targets), ids.size) // ids.size
    places = ids.size << (times - 1).bit_length()

    def padded(x: Any, to: int) -> np.ndarray:
        return np.pad(np.asarray(x, np.int32), (0, to - len(x)))

    return OptionRows(
        ids,
        depths,
        ends,
        valid,
        states=padded(states, ids.size),
        count=np.asarray(len(states), np.int32),
        sources=padded(sources, places),
        targets=padded(targets, places),
    )
