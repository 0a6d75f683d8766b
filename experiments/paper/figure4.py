"""Figure 4: learning curves, the mean reward of each step's samples on training prompts (+1 right, -1 wrong).

python -m experiments.paper.figure4 --scale smol
"""

from pathlib import Path

from experiments.paper import command, figures, render, scores
from experiments.paper.command import Context
from experiments.paper.methods import METHODS

NAME, STAGES = "figure4", ("scout", "rates", "main")
SHOWN = ("svf", "lora", "ia3")


def make(context: Context, out: Path) -> str:
    """Writes figure4.png and .json; returns what there is in one line a curve."""
    examples = max(context.scale.examples)
    figure, axes = figures.panels(len(context.known.tasks))
    data, lines = {}, []
    for place, task in zip(axes, context.known.tasks, strict=True):
        place.set(title=task, xlabel="step", ylabel="mean reward of samples", ylim=(-1.05, 1.05))
        for method in SHOWN:
            group = scores.group(context.cells(method, task, examples), context.store)
            look = {"color": figures.COLOURS[method], "label": METHODS[method].title}
            drawn = figures.curves(place, group.records, "reward", **look)
            data[f"{task}/{method}"] = drawn
            ends = ", ".join(f"{line[-1]:+.2f}" for line in drawn) or group.status
            lines.append(f"{task}, {METHODS[method].title}: last rewards {ends}")
        if place.get_legend_handles_labels()[0]:
            place.legend(fontsize=7, frameon=False)
        else:
            figures.nothing(place)
    render.write_figure(figure, NAME, {"rewards": data, "examples": examples}, context.command, out)
    return "\n".join([f"{NAME}.png: {examples} training prompts", *lines])


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
