"""Three views, one table: several whole models behind a router, one mixture of experts, one model with experts of z.

    python -m experiments.paper.three_views                   # trains, measures, writes the table and the picture
    python -m experiments.paper.three_views --minutes 30      # starts nothing that would not end within them
    python -m experiments.paper.three_views --table           # only the table and the picture, from what there is

Seed by seed: three whole models and three experts by next-token prediction with the same prompts and updates; the
mixture upcycled from the whole models, its router trained with as many; then each view measured in a process of its
own. Learning rates are chosen first, on validation, by models that are trained on the three tasks in turn. Stopped at
any moment, the same command resumes after the last part that was finished. Records: results/three_views; weights: 3 GB
a seed under runs/. Seconds want a machine that does nothing else: a view whose record is deleted is measured anew.
"""

import argparse
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.paper.records import HERE, read
from experiments.paper.three_views import measure, table
from experiments.paper.three_views.sizes import SIZES
from experiments.paper.three_views.trained import ALL, Cell, Shop, chosen_rate
from experiments.paper.three_views.views import VIEWS
from sva.parallel import compile_cache
from sva.utils.errors import UserError
from sva.utils.files import read_json

RUNS = HERE.parents[1] / "runs" / "three_views"


class Part(NamedTuple):
    """What is done, or not, as a whole."""

    kind: str  # parts of one kind take about as long
    name: str
    is_done: bool
    do: Callable[[], None]


def parts(shop: Shop) -> Iterator[Part]:
    """Everything that the table needs, in order; each must be done before the next is asked for."""
    for seed in shop.size.seeds:
        if seed == shop.size.seeds[0]:
            for method in ("full", "svf"):
                for lr in shop.size.rates_of(method):
                    yield _training(shop, Cell(method, ALL, lr, seed), is_kept=False)
        if not all(measure.path_of(shop, view, seed).exists() for view in VIEWS):
            yield from _of_seed(shop, seed)


def _of_seed(shop: Shop, seed: int) -> Iterator[Part]:
    """Its specialists, its experts, its mixture and its router, and the views that are made of them."""
    rates = {method: chosen_rate(shop, method) for method in ("full", "svf")}
    full, svf = ([Cell(method, name, lr, seed) for name in shop.size.tasks] for method, lr in rates.items())
    for pair in zip(full, svf, strict=True):
        for cell in pair:
            yield _training(shop, cell)
    mixture = shop.mixture(seed)
    yield Part("upcycle", mixture.name, mixture.exists(), lambda: shop.upcycle(seed, full))
    is_first = seed == shop.size.seeds[0]
    for lr in shop.size.rates_of("router") if is_first else [chosen_rate(shop, "router")]:
        yield _training(shop, Cell("router", ALL, lr, seed))
    for view in VIEWS:
        path = measure.path_of(shop, view, seed)
        yield Part(view, path.stem, path.exists(), lambda view=view: measure.in_a_process(shop, view, seed))


def _training(shop: Shop, cell: Cell, *, is_kept: bool = True) -> Part:
    is_there = shop.record(cell) is not None and (not is_kept or shop.place(cell).exists())
    return Part(cell.method, cell.name, is_there, lambda: shop.train(cell))


def run(shop: Shop, minutes: float | None = None) -> bool:
    """Does what is not done; whether everything is. Tells on stderr what each part took."""
    deadline = time.time() + 60 * minutes if minutes else None
    for part in parts(shop):
        if part.is_done:
            continue
        if deadline and time.time() + _expected(shop, part.kind) > deadline:
            print(f"sva: {part.name} would not end within {minutes:g} minutes; run the command again", file=sys.stderr)
            return False
        started = time.time()
        part.do()
        _give_back()
        print(f"sva: {part.name}: {time.time() - started:.0f} s", file=sys.stderr, flush=True)
    return True


def _give_back() -> None:
    """Returns freed memory to the system, which glibc keeps: a few gigabytes after every whole model."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _expected(shop: Shop, kind: str) -> float:
    """Seconds of the longest part of this kind so far; 0 where there was none."""
    trained = [read_json(path)["seconds"] for path in shop.results.glob(f"cells/{kind}-*.json")]
    measured = [read(path)["seconds"] for path in shop.results.glob(f"{kind}*.json.gz")]
    return max([*trained, *measured], default=0.0)


def main(words: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser("three_views", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", default="smol", choices=SIZES)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where three_views/ is (default: here)")
    parser.add_argument("--weights", type=Path, help="where weights are kept meanwhile (default: runs/three_views)")
    parser.add_argument("--minutes", type=float, help="start no part that would not end within them")
    parser.add_argument("--table", action="store_true", help="train and measure nothing")
    given: Any = parser.parse_args(words)
    shop = Shop(SIZES[given.size], given.results, given.weights or RUNS / given.size)
    if not given.table:
        compile_cache.start()
        run(shop, given.minutes)
    print(table.make(shop, given.results) or "no seed is complete yet; run the command again")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"sva: {error}")
