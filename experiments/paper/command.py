"""What every table and figure shares: its options, its cells, and what is said where they are missing."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.paper import plan, scores
from experiments.paper.cells import Cell
from experiments.paper.plan import Decided
from experiments.paper.records import HERE, Store
from experiments.paper.render import RESULTS
from experiments.paper.scales import NAMES, PAPER, Scale, scale
from experiments.paper.scores import Group
from experiments.paper.studies import Study
from sva.utils.errors import UserError

OUT = "where files are written (default at smol: the committed results)"


class Context(NamedTuple):
    """What a table is made from."""

    scale: Scale
    store: Store
    known: Decided
    command: str  # that makes the table

    def cells(self, method: str, task: str, examples: int | None = None) -> list[Cell]:
        """The cells of a method on a task, one a seed; by default at the middle number of prompts.

        None where the method's learning rate is not decided yet.
        """
        if method not in self.known.rates:
            return []
        number = plan.middle(self.scale) if examples is None else examples
        at = {"examples": number, "lr": self.known.rates[method]}
        return [plan.cell(self.scale, "main", method, task, seed=seed, **at) for seed in self.scale.seeds]

    def studies(self, method: str, stage: str = "studies", **settings: Any) -> Group:
        """The studies of a kind and a stage whose settings are these, and what there is of them."""
        planned = [*plan.studies(self.scale, self.known), *plan.of_kinds(self.scale, self.known)]
        wanted = [x for x in planned if isinstance(x, Study) and (x.method, x.stage) == (method, stage)]
        matching = [each for each in wanted if all(each[name] == value for name, value in settings.items())]
        return scores.group(matching, self.store)


def run(name: str, about: str, make: Callable[[Context, Path], str], stages: Sequence[str], words: Any = None) -> None:
    """The command of one table or figure: makes its files and prints it.

    Args:
      make: writes the files into a directory, and returns the text to print.
      stages: those of `plan` that its cells are in.
    """
    parser = argparse.ArgumentParser(f"experiments.paper.{name}", description=about)
    parser.add_argument("--scale", default="smol", choices=NAMES)
    parser.add_argument("--records", type=Path, default=HERE, help="where cells/ is (default: the committed ones)")
    parser.add_argument("--out", type=Path, help=OUT)
    parser.add_argument("--train", action="store_true", help="train the cells that are missing first")
    parser.add_argument("--dry-run", action="store_true", help="list its cells, make nothing")
    parser.add_argument("--minutes", type=float, help="with --train: start no cell that would not end within them")
    arguments = parser.parse_args(words)
    try:
        if arguments.dry_run:
            dry_run(arguments.scale, arguments.records, stages)
            return
        print(_made(name, make, stages, arguments))
    except UserError as error:
        sys.exit(f"sva: {error}")


def written_to(scale_name: str, out: Path | None) -> Path:
    """The folder that files are written into: the committed one for smol, else `out`.

    Raises:
      UserError: no `out` is given, and the scale is another: its files would overwrite smol's.
    """
    if out is None and scale_name != "smol":
        raise UserError(f"--scale {scale_name} needs --out FOLDER: {RESULTS} holds the files of smol")
    return out or RESULTS


def dry_run(scale_name: str, records: Path, stages: Sequence[str] = ()) -> None:
    """Prints the cells of these stages, or of all, and trains none."""
    from experiments.paper import run_cells  # which imports JAX

    only = ["--only", *stages] if stages else []
    run_cells.main(["--scale", scale_name, "--out", str(records), "--dry-run", *only])


def _made(name: str, make: Callable[[Context, Path], str], stages: Sequence[str], arguments: Any) -> str:
    if arguments.scale == "paper" and not arguments.train:
        return _of_the_paper(name, make, arguments)
    of, store = scale(arguments.scale), Store(arguments.records)
    out = written_to(of.name, arguments.out)
    trainer = f"python -m experiments.paper.run_cells --scale {of.name} --only {' '.join(stages)}"
    if arguments.train:
        from experiments.paper import run_cells  # which imports JAX

        words = ["--scale", of.name, "--out", str(arguments.records), "--only", *stages]
        run_cells.main([*words, *(["--minutes", str(arguments.minutes)] if arguments.minutes else [])])
        store = Store(arguments.records)
    known = plan.decided(of, store.get)
    if not known.rates:
        raise UserError(f"{name} has no trained cells at scale {of.name}; make them with `{trainer}`, or add --train")
    text = make(Context(of, store, known, f"python -m experiments.paper.{name} --scale {of.name}"), out)
    return f"{text}\nCells that are not run: `{trainer}`" if "not run" in text else text


def _of_the_paper(name: str, make: Callable[[Context, Path], str], arguments: Any) -> str:
    """What the table prints for each of the paper's models of which runs are filed, into a folder a model."""
    store = Store(arguments.records)
    decided = {of.files: (of, plan.decided(of, store.get)) for of in PAPER}
    line, texts = f"python -m experiments.paper.{name} --scale paper", []
    for files, (of, known) in decided.items():
        if known.rates:
            text = make(Context(of, store, known, line), written_to(of.name, arguments.out) / files)
            texts.append(f"## {of.model}\n\n{text}")
    if not texts:
        raise UserError(
            f"{name} has no filed runs at scale paper; `{line} --dry-run` lists their commands, and "
            "`python -m experiments.paper.run_cells --scale paper --file RUN_DIR` files what they trained"
        )
    return "\n\n".join(texts)
