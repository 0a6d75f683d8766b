"""Figures 10 and 11: the share of the spectrum in the largest r singular values, by layer and module.

    python -m experiments.paper.figure10 --scale smol

Nothing is trained: the spectra are the base model's. Figure 10 sums singular values, figure 11 their squares.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from experiments.paper import command, figures, render
from experiments.paper.command import Context
from experiments.paper.scales import NAMES, PAPER, scale
from sva.utils.errors import UserError

RANKS = (1, 8, 32, 128, 256)
POWERS = {"figure10": (1, "sum of the singular values"), "figure11": (2, "sum of their squares")}


def shares(s: np.ndarray, power: int) -> list[float]:
    """The part of sum(s^power) in the largest r values, for each r of `RANKS`."""
    whole = np.cumsum(np.asarray(s, np.float64) ** power)
    return [float(whole[min(rank, len(s)) - 1] / whole[-1]) for rank in RANKS]


def make(context: Context, out: Path) -> str:
    """Writes both figures of the scale's model; returns the mean shares of each module."""
    return draw(context.scale.model, context.command, out)


def draw(model: str, line: str, out: Path) -> str:
    """Writes both figures of a model; returns the mean shares of each module."""
    from sva.generation.decompose import decompose
    from sva.generation.load import load
    from sva.generation.testing import toy_lm

    lm = toy_lm() if model == "toy" else load(model)
    spectra = {name: np.asarray(spectrum.s) for name, spectrum in decompose(lm, "all").items()}
    modules = list(dict.fromkeys(name.split(".")[-2] for name in spectra))
    lines = []
    for name, (power, what) in POWERS.items():
        figure, axes = figures.panels(len(modules))
        data = {}
        for place, module in zip(axes, modules, strict=True):
            found = np.array([shares(s, power) for key, s in spectra.items() if key.split(".")[-2] == module])
            data[module] = found
            for rank, column in zip(RANKS, found.T, strict=True):
                place.plot(column, label=f"r = {rank}", lw=1.2)
            place.set(title=module, xlabel="layer", ylim=(0, 1.02))
            means = ", ".join(f"r {rank}: {100 * x:.0f} %" for rank, x in zip(RANKS, found.mean(axis=0), strict=True))
            lines.append(f"{name}, {module}, mean over layers: {means}")
        axes[0].set(ylabel=f"share of the {what}")
        axes[-1].legend(fontsize=7, frameon=False)
        render.write_figure(figure, name, {"ranks": RANKS, "shares": data, "model": lm.name}, line, out)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser("experiments.paper.figure10", description=__doc__)
    parser.add_argument("--scale", default="smol", choices=NAMES)
    parser.add_argument("--out", type=Path, help=command.OUT)
    parser.add_argument("--dry-run", action="store_true", help="say what it would read, and do nothing")
    arguments = parser.parse_args()
    try:
        if arguments.dry_run:
            models = [each.model for each in (PAPER if arguments.scale == "paper" else [scale(arguments.scale)])]
            print(f"no cells: it decomposes all matrices of {', '.join(models)}, unless the cache has their spectra")
            return
        of = scale(arguments.scale)
        line = f"python -m experiments.paper.figure10 --scale {of.name}"
        print(draw(of.model, line, command.written_to(of.name, arguments.out)))
    except UserError as error:
        sys.exit(f"sva: {error}")


if __name__ == "__main__":
    main()
