"""Trains the cells of the paper's tables, most telling first; see plan.py for the list.

    python -m experiments.paper.run_cells --scale smol --dry-run           # what there is to do
    python -m experiments.paper.run_cells --scale smol --minutes 30        # records go to experiments/paper/cells
    python -m experiments.paper.run_cells --scale smol --out DIR --shards 6 --minutes 8 --pack cells.tar
    python -m experiments.paper.run_cells --adopt cells.tar                # files its records here
    python -m experiments.paper.run_cells --regrade                        # after GRADING was raised, trains nothing
    python -m experiments.paper.run_cells --scale paper --dry-run          # the commands of the paper's own tables
    python -m experiments.paper.run_cells --scale paper --file RUN_DIR     # files what one of them has trained

Stopped at any moment, the same command resumes. Needs no network where the model is in the cache (`sva fetch`).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

from experiments.paper import costs, plan
from experiments.paper.cells import Cell, digest_of_flat
from experiments.paper.filed import file_run
from experiments.paper.queue import Queue, lost_experts, state
from experiments.paper.records import HERE, Failure, Store, read, write_record
from experiments.paper.regraded import regrade
from experiments.paper.scales import NAMES, PAPER, Scale, scale
from experiments.paper.studies import Study
from experiments.paper.training import Trainer, device
from sva.parallel import compile_cache
from sva.utils.errors import UserError
from sva.utils.files import write_atomically

_PACK_SECONDS = 20.0
_POLL_SECONDS = 0.5


def main(words: list[str] | None = None) -> None:
    """Runs the command."""
    arguments = _parser().parse_args(words)
    if arguments.adopt:
        adopt(arguments.adopt, arguments.out)
        return
    if arguments.regrade:
        done, left = regrade(Store(arguments.out))
        print(f"{done} cells graded anew; {left} records are of an older grading still (of studies, which --recompute")
        print("measures again, or of runs of scale paper, which are to be evaluated and filed again)")
        return
    if arguments.file:
        store = Store(arguments.out)
        for run_dir in arguments.file:
            cell = file_run(run_dir, PAPER if arguments.scale == "paper" else [scale(arguments.scale)], store)
            print(f"{store.path(cell)}: {cell.name}")
        return
    if arguments.scale == "paper" and arguments.dry_run:
        print("\n\n".join(paper_listing(each, Store(arguments.out), arguments.only) for each in PAPER))
        return
    of = scale(arguments.scale)
    store = Store(arguments.out)
    if arguments.recompute and not arguments.dry_run:
        forget(of, store)
    if arguments.dry_run:
        print(listing(wanted(of, store, arguments.only), store, arguments.on or device()))
        return
    if arguments.recompute:
        forget_lost(wanted(of, store, arguments.only), store)
    deadline = time.time() + 60 * arguments.minutes if arguments.minutes else None
    if arguments.shards > 1:
        _in_shards(arguments, deadline)
        return
    compile_cache.start()
    queue = Queue(lambda: wanted(of, store, arguments.only), store)
    done = queue.work(Trainer(of, arguments.out), deadline)
    print(f"sva: {done} cells trained; {_counts(wanted(of, store, arguments.only), store)}", file=sys.stderr)
    if arguments.pack:
        pack(arguments.out, arguments.pack)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("run_cells", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scale", default="smol", choices=NAMES)
    parser.add_argument("--out", type=Path, default=HERE, help="where records are (default: this folder)")
    parser.add_argument("--only", nargs="+", choices=plan.STAGES, help="stages to run (default: all)")
    parser.add_argument("--minutes", type=float, help="start no cell that would not end within them")
    parser.add_argument("--shards", type=int, default=1, help="start so many processes that share the cells")
    parser.add_argument("--pack", type=Path, help="an archive of the records, renewed while shards work")
    parser.add_argument("--adopt", type=Path, help="file the records of an archive, and do nothing else")
    parser.add_argument("--file", type=Path, nargs="+", help="file finished runs of sva train, of these revisions")
    parser.add_argument("--dry-run", action="store_true", help="list the cells, train none")
    parser.add_argument("--on", choices=("cpu", "gpu"), help="with --dry-run: where it would run (default: here)")
    parser.add_argument("--regrade", action="store_true", help="grade cells of other gradings anew, train none")
    parser.add_argument("--recompute", action="store_true", help="train anew: other revisions, failed, experts lost")
    return parser


def wanted(of: Scale, store: Store, only: list[str] | None) -> list[Cell | Study]:
    """The cells of these stages that can be named yet."""
    return plan.every(of, store.get, only)


def listing(cells: list[Cell | Study], store: Store, where: str) -> str:
    """A line a cell: state, predicted tokens, minutes and memory; and their sums."""
    measured = costs.measured([x for x in map(store.get, cells) if x and not isinstance(x, Failure)], where)
    lines, left = [], []
    for cell in cells:
        cost, now = costs.predicted(cell, where, measured), state(cell, store)
        left += [cost] if now == "not run" else []
        lines.append(f"{cell.key}  {cell.name:<58} {cost.tokens:>8,} tokens {_times(cost)}  {now}")
    todo = costs.total(left)
    lines.append(f"{len(cells)} cells; to run: {len(left)}, {todo.tokens:,} tokens, {_times(todo)} on {where}")
    undecided = [name for name in ("main", "variants", "kinds") if not any(cell.stage == name for cell in cells)]
    if undecided:
        lines.append(f"{', '.join(undecided)}: named when the cells of scout and rates have decided tasks and rates")
    return "\n".join(lines)


def paper_listing(of: Scale, store: Store, only: list[str] | None) -> str:
    """Two lines a cell of one of the paper's models: key, name and tokens, and the command that trains it."""
    cells = plan.presumed(of, store.get, only)
    lines = [f"{of.model}: settings of configs/paper/{of.files}-TASK.yaml; sva train FILE --dry-run tells its memory"]
    for each in cells:
        lines.append(f"{each.key}  {each.name:<58} {sum(costs.tokens(each)):>14,} tokens")
        lines += [f"    {each.command}"] if isinstance(each, Cell) else []
    total = sum(sum(costs.tokens(each)) for each in cells)
    lines.append(f"{len(cells)} cells, {total:,} tokens; rates that no filed runs have decided are the middle ones")
    return "\n".join(lines)


def _times(cost: costs.Cost) -> str:
    return f"{cost.seconds / 60:7.2f} min {cost.gib:5.1f} GiB"


def _counts(cells: list[Cell | Study], store: Store) -> str:
    states = Counter(state(cell, store).partition(":")[0] for cell in cells)
    return ", ".join(f"{number} {name}" for name, number in states.items())


def forget(of: Scale, store: Store) -> None:
    """Removes failures, and records of other revisions or settings, of the scale's cells."""
    for path in (store.directory / "cells").glob("*.json.gz"):
        if not store.is_current(path) and read(path)["scale"] == of.name:
            path.unlink()
    store.look()
    for cell in plan.every(of, store.get):
        store.failure_path(cell).unlink(missing_ok=True)


def forget_lost(cells: list[Cell | Study], store: Store) -> None:
    """Removes the records of cells whose experts are not on disk, where a study that is left to do reads them.

    Raises:
      UserError: cells of stages that are not among these, which would not be trained again.
    """
    lost = lost_experts([each for each in cells if store.get(each) is None], store)
    if stages := dict.fromkeys(each.stage for each in lost if each not in cells):
        raise UserError(f"studies read experts of other stages that are lost; add to --only: {' '.join(stages)}")
    for cell in lost:
        store.remove(cell)


def _in_shards(arguments: argparse.Namespace, deadline: float | None) -> None:
    """Starts the processes, packs what they have filed every few seconds, and waits for them."""
    count = arguments.shards
    words = ["--scale", arguments.scale, "--out", str(arguments.out)]
    words += ["--only", *arguments.only] if arguments.only else []
    words += ["--minutes", f"{(deadline - time.time()) / 60:.3f}"] if deadline else []
    # Each takes memory as it needs it, instead of three quarters of the card at once.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    module = [sys.executable, "-m", "experiments.paper.run_cells", *words]
    started = [subprocess.Popen(module, env=environment) for _ in range(count)]
    packed = time.time()
    while any(process.poll() is None for process in started):
        time.sleep(_POLL_SECONDS)
        if arguments.pack and time.time() - packed > _PACK_SECONDS:
            pack(arguments.out, arguments.pack)
            packed = time.time()
    if arguments.pack:
        pack(arguments.out, arguments.pack)
    failed = [process.returncode for process in started if process.returncode]
    if failed:
        raise UserError(f"{len(failed)} of {count} processes ended with exit codes {failed}; their output says why")


def pack(directory: Path, archive: Path) -> None:
    """Writes records, errors and small experts into one archive, at once and whole."""

    def write(path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            for folder in ("cells", "failed", "experts"):
                for file in sorted((directory / folder).glob("*")):
                    if not file.name.startswith("."):  # one that is being written
                        tar.add(file, f"{folder}/{file.name}")

    write_atomically(archive, write)


def adopt(archive: Path, directory: Path) -> None:
    """Files what an archive holds under `directory`, each record and expert under the key that this version gives it.

    Raises:
      UserError: no such archive, or a damaged record in it.
    """
    if not archive.is_file():
        raise UserError(f"no archive at {archive}; run_cells --pack {archive} makes it")
    with tempfile.TemporaryDirectory() as name, tarfile.open(archive) as tar:
        there = Path(name)
        tar.extractall(there, filter="data")
        for path in sorted((there / "cells").glob("*.json.gz")):
            record = read(path)
            old = path.name.removesuffix(".json.gz")
            _, training, grading = old.split("-")
            key = f"{digest_of_flat(record['config'])}-{training}-{grading}"
            write_record(directory / "cells" / f"{key}.json.gz", {**record, "key": key})
            expert = there / "experts" / f"{old}.safetensors"
            if expert.exists():
                (directory / "experts").mkdir(parents=True, exist_ok=True)
                shutil.copyfile(expert, directory / "experts" / f"{key}.safetensors")
        for path in (there / "failed").glob("*.json"):
            (directory / "failed").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, directory / "failed" / path.name)
    found = [read(path) for path in sorted((directory / "cells").glob("*.json.gz"))]
    print(f"{len(found)} records in {directory / 'cells'}, of {dict(Counter(record['stage'] for record in found))}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"sva: {error}")
