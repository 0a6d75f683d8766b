"""Scores of groups of cells that differ by their seed, and what two groups differ by."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.paper.cells import Cell
from experiments.paper.records import Failure, Store, rights
from experiments.paper.studies import Study
from sva.evaluation.significance import Comparison, holm, paired_bootstrap
from sva.evaluation.stats import accuracy


class Group(NamedTuple):
    """The cells or studies of one entry of a table, one a seed, and what there is of them."""

    cells: tuple[Cell | Study, ...]
    found: tuple[tuple[int, Mapping[str, Any]], ...]  # (seed, record)
    failures: tuple[str, ...]

    @property
    def records(self) -> tuple[Mapping[str, Any], ...]:
        """Those that there are."""
        return tuple(record for _, record in self.found)

    @property
    def by_seed(self) -> dict[int, Mapping[str, Any]]:
        """The same by seed."""
        return dict(self.found)

    @property
    def status(self) -> str:
        """ "" where every cell is there; else what is missing."""
        if self.failures:
            return f"failed: {self.failures[0]}"
        missing = len(self.cells) - len(self.records)
        return "not run" if not self.records else f"{missing} of {len(self.cells)} seeds not run" if missing else ""

    @property
    def after(self) -> np.ndarray:
        """[S, n] rights of the trained models."""
        return np.stack([rights(record) for record in self.records])

    @property
    def before(self) -> np.ndarray:
        """[n] rights of the base, which is the same for every seed."""
        return rights(self.records[0], "before")


def group(cells: Sequence[Cell | Study], store: Store) -> Group:
    """What the store has of these cells or studies."""
    states = [(cell.seed, store.get(cell)) for cell in cells]
    found = tuple((seed, each) for seed, each in states if each is not None and not isinstance(each, Failure))
    return Group(tuple(cells), found, tuple(each.error for _, each in states if isinstance(each, Failure)))


def compared(a: Group, b: Group) -> Comparison | None:
    """a's rights less b's, over the seeds that both have; None where there are none."""
    common = sorted(a.by_seed.keys() & b.by_seed.keys())
    if not common:
        return None
    first, second = (np.stack([rights(x.by_seed[seed]) for seed in common]) for x in (a, b))
    return paired_bootstrap(first, second)


def against_base(a: Group) -> Comparison | None:
    """a's rights less the base's."""
    return paired_bootstrap(a.after, a.before) if a.records else None


def score(a: Group) -> dict[str, float] | None:
    """`score_of` a group's trained models; None where there are none."""
    return score_of(a.after) if a.records else None


def score_of(rights: np.ndarray) -> dict[str, float]:
    """Mean accuracy of [S, n] rights, a 95 % interval, and the spread between seeds; fractions.

    The interval is the wider one, end by end, of the bootstrap over items and seeds and of Wilson's over the items
    alone: where every answer is right, or wrong, the bootstrap has no width.
    """
    n = rights.shape[1]
    items = accuracy(np.arange(n) < round(n * float(rights.mean())))  # as many rights of n as the seeds have on average
    found = paired_bootstrap(rights, np.zeros(rights.shape[1]))
    by_seed = rights.mean(axis=1)
    ends = {"low": min(found.low, items.low), "high": max(found.high, items.high)}
    return {"mean": found.mean, **ends, "least": by_seed.min(), "most": by_seed.max(), "seeds": len(by_seed)}


def corrected(comparisons: Sequence[Comparison | None]) -> list[float | None]:
    """Holm's p-values of the comparisons that there are, in their places."""
    there = [each for each in comparisons if each is not None]
    values = iter(holm([each.p for each in there]))
    return [None if each is None else next(values) for each in comparisons]
