"""What the figures share: colours of methods, curves over seeds, points with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.paper.scores import Group

COLOURS = {
    "svf": "C0",
    "lora": "C1",
    "ia3": "C2",
    "lora_r1": "C8",
    "lora_attention": "C6",
    "full": "C3",
    "dora": "C4",
    "projected": "C5",
}
SIZE = (3.6, 3.2)  # inches an axes
MOST_COLUMNS = 4


def panels(number: int) -> tuple[Figure, list[Axes]]:
    """A figure of so many axes, four in a row at most."""
    columns = min(number, MOST_COLUMNS)
    rows = -(-number // columns)
    figure = Figure(figsize=(SIZE[0] * columns, SIZE[1] * rows), layout="constrained")
    made = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in made[:number]:
        axes.spines[["top", "right"]].set_visible(False)
    for axes in made[number:]:
        axes.set_visible(False)
    return figure, list(made[:number])


def curves(
    axes: Axes, records: Sequence[Mapping[str, Any]], metric: str, *, color: str, label: str
) -> list[list[float]]:
    """Draws a metric over the steps: a thin line a seed and a thick one through their mean; returns the lines."""
    lines = [[row[metric] for row in record["curve"] if metric in row] for record in records]
    lines = [line for line in lines if line]
    for line in lines:
        axes.plot(line, color=color, lw=0.7, alpha=0.4)
    if lines:
        shortest = min(map(len, lines))
        axes.plot(np.mean([line[:shortest] for line in lines], axis=0), color=color, lw=2, label=label)
    return lines


def errorbar(axes: Axes, x: float, score: Mapping[str, float], *, color: str, label: str | None = None) -> None:
    """A point with its 95 % interval, in percent."""
    mean, low, high = (100 * score[name] for name in ("mean", "low", "high"))
    axes.errorbar(x, mean, [[mean - low], [high - mean]], fmt="o", color=color, capsize=3, ms=5, label=label)


def nothing(axes: Axes) -> None:
    """Says that there is nothing to show."""
    axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", color="0.5")


def base_line(axes: Axes, group: Group) -> None:
    """A dashed line at the base's accuracy."""
    axes.axhline(100 * group.before.mean(), color="0.6", lw=1, ls="--", label="base")
