"""One view of one seed, from its files to its answers, in a process of its own (`three_views.measure`).

The clock of the first answer starts when Python and JAX are imported, with no program compiled; the view is loaded, its
router fitted, and one question answered. Memory is taken then. All held-out questions are answered twice, and the
second time counts, so that nothing is compiled in it.
"""

import argparse
import gc
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import safetensors

from experiments.paper.records import answers, write_record
from experiments.paper.three_views import views
from experiments.paper.three_views.sizes import SIZES
from experiments.paper.three_views.trained import Shop
from experiments.paper.training import made_with
from sva.evaluation import evaluate as evaluation
from sva.evaluation.evaluate import Record
from sva.utils.errors import UserError

ROOT = Path(__file__).parents[3]


def path_of(shop: Shop, view: str, seed: int) -> Path:
    """Where what was measured of a view is, or would be; the base is the same for every seed."""
    return shop.results / (f"{view}.json.gz" if view == "base" else f"{view}-seed{seed}.json.gz")


def measure(shop: Shop, view: str, seed: int) -> None:
    """Measures a view, and files what was found."""
    begun, started = time.time(), time.perf_counter()
    todo = views.held_out(shop)
    system = views.opened(shop, view, seed)
    system.answer(todo[:1])
    first_seconds = time.perf_counter() - started
    gc.collect()
    held, peak = views.bytes_live(), peak_bytes()
    found = _answered(system, todo)
    started = time.perf_counter()
    _answered(system, todo)
    seconds = time.perf_counter() - started
    budget = views.budget(shop)
    alone = {
        label: answers(evaluation.evaluate(lm, todo, batch_size=views.ROWS, max_new_tokens=budget, progress=False))
        for label, lm in system.parts().items()
    }
    record = {
        "view": view,
        "seed": seed,
        "size": shop.size.name,
        "tasks": [item.task.name for item in todo],
        "right": [item.task.label for item in todo],
        "chosen": [each.label for each in found],
        **system.read(todo),
        "answers": answers(found),
        "alone": alone,
        "first_answer_seconds": round(first_seconds, 2),
        "evaluation_seconds": round(seconds, 2),
        "bytes_held": held,
        "peak_bytes": peak,
        **_stored(shop, view, seed),
        **made_with(begun),
        "command": f"three_views.measure --size {shop.size.name} --seed {seed} --view {view}",  # without its folders
    }
    write_record(path_of(shop, view, seed), record)


def peak_bytes() -> int:
    """The most memory that this program has held, in bytes, as Linux counts it.

    Not `ru_maxrss`, which begins with what the process that started this one has held.
    """
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


def _answered(system: views.System, todo: list[evaluation.Item]) -> list[Record]:
    rows = system.batch or len(todo)
    return [record for start in range(0, len(todo), rows) for record in system.answer(todo[start : start + rows])]


def _stored(shop: Shop, view: str, seed: int) -> dict[str, int]:
    """Numbers, and bytes of the weights as float32 files, that the view needs on disk; the base where it needs it."""
    trained = views.cells(shop, view, seed)
    files = [file for cell in trained for file in _files(shop.place(cell)) if view != "micro" or cell.method != "full"]
    if view == "micro":
        files += _files(shop.mixture(seed))
    stored = {"stored_parameters": 0, "stored_bytes": 0}
    if view in ("base", "self-adaptive"):
        weights = shop.base.named_params().values()
        stored = {
            "stored_parameters": sum(x.size for x in weights),
            "stored_bytes": sum(x.nbytes for x in weights),
        }
    return {
        "stored_parameters": stored["stored_parameters"] + sum(map(_numbers, files)),
        "stored_bytes": stored["stored_bytes"] + sum(file.stat().st_size for file in files),
    }


def _numbers(file: Path) -> int:
    with safetensors.safe_open(file, framework="numpy") as tensors:
        return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def _files(place: Path) -> list[Path]:
    return sorted(place.glob("*.safetensors")) if place.is_dir() else [place]


def in_a_process(shop: Shop, view: str, seed: int) -> None:
    """`measure` in a process that nothing else has run in.

    Raises:
      UserError: it failed; its own output says why.
    """
    where = ["--size", shop.size.name, "--seed", str(seed), "--view", view]
    where += ["--results", str(shop.results.parent), "--weights", str(shop.weights)]
    command = [sys.executable, "-m", "experiments.paper.three_views.measure", *where]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    if subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode:
        raise UserError(f"measuring {view} of seed {seed} failed; what it says is above")


def main(words: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser("three_views.measure", description=__doc__)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--view", choices=views.VIEWS, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    given: Any = parser.parse_args(words)
    measure(Shop(SIZES[given.size], given.results, given.weights), given.view, given.seed)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"sva: {error}")
