"""Every table and figure from the records that there are, and the page docs/results.md.

    python -m experiments.paper.every --scale smol

Cells that are missing are "not run"; nothing is trained. `figure_z` and `figure10`, which writes figure 11 too, read
the base model: without one they are not made, and the output says so.
"""

import argparse
import importlib
import sys
from pathlib import Path

from experiments.paper import command, page, plan
from experiments.paper.command import Context
from experiments.paper.records import HERE, Store
from experiments.paper.scales import NAMES, scale
from sva.utils.errors import UserError
from sva.utils.files import write_atomically

TABLES = (
    "table1",
    "axis_parameters",
    "axis_prompts",
    "figure4",
    "figure9",
    "table4",
    "table7",
    "fidelity",
    "table2",
    "figure6",
    "figure7",
    "table3",
    "table5",
    "table9",
    "table6",
    "table8",
    "table10",
    "many",
    "sampled",
    "figure_z",
    "figure10",
)
OF_THE_MODEL = ("figure_z", "figure10")
DOCS = HERE.parents[1] / "docs" / "results.md"


def made(name: str, directory: Path, scale_name: str, out: Path) -> str:
    """What a table or figure prints; its files are written."""
    of, store = scale(scale_name), Store(directory)
    module = importlib.import_module(f"experiments.paper.{name}")
    line = f"python -m experiments.paper.{name} --scale {scale_name}"
    try:
        return module.make(Context(of, store, plan.decided(of, store.get), line), out)
    except UserError as error:
        if name not in OF_THE_MODEL:
            raise
        return f"{name}: not made: {error}"


def main(words: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser("experiments.paper.every", description=__doc__)
    parser.add_argument("--scale", default="smol", choices=NAMES)
    parser.add_argument("--records", type=Path, default=HERE, help="where cells/ is (default: the committed ones)")
    parser.add_argument("--out", type=Path, help=command.OUT)
    parser.add_argument("--page", type=Path, help="the page (default at smol: docs/results.md, else in --out)")
    parser.add_argument("--dry-run", action="store_true", help="list all cells, make nothing")
    arguments = parser.parse_args(words)
    if arguments.dry_run:
        command.dry_run(arguments.scale, arguments.records)
        return
    of, store = scale(arguments.scale), Store(arguments.records)
    out = command.written_to(of.name, arguments.out)
    place = arguments.page or (DOCS if of.name == "smol" else out / DOCS.name)
    if not plan.decided(of, store.get).rates:
        raise UserError(f"no cells at scale {of.name}: python -m experiments.paper.run_cells --scale {of.name}")
    texts = {name: made(name, arguments.records, of.name, out) for name in TABLES}
    print("\n\n".join(texts.values()))
    text = page.text(of, store, out, place.parent)
    write_atomically(place, lambda path: path.write_text(text))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"sva: {error}")
