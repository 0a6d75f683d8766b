"""Figure 7: the alphas that few-shot search learns, one an expert, for each unseen task and seed.

python -m experiments.paper.figure7 --scale smol
"""

from pathlib import Path

import numpy as np

from experiments.paper import command, figures, plan, render
from experiments.paper.command import Context

NAME, STAGES = "figure7", ("scout", "rates", "main", "more_rates", "studies")


def make(context: Context, out: Path) -> str:
    """Writes figure7.png and .json; returns the mean alphas of each task."""
    shots, generations = plan.SEARCHES[0]
    tasks, experts = context.known.unseen, context.known.tasks
    figure, axes = figures.panels(max(1, len(tasks)))
    data, lines = {}, []
    for place, task in zip(axes, tasks, strict=False):
        group = context.studies("search", task=task, shots=shots, generations=generations)
        alphas = np.array([record["alphas"] for record in group.records])
        data[task] = alphas
        place.set(title=task, ylabel="alpha", ylim=(-0.05, 1.05))
        place.set_xticks(range(len(experts)), experts, rotation=20)
        if group.records:
            place.bar(range(len(experts)), alphas.mean(axis=0), color="C0", alpha=0.4)
            for row in alphas:
                place.plot(range(len(experts)), row, "o", color="C0", ms=4)
            shown = zip(experts, alphas.mean(axis=0), strict=True)
            lines.append(f"{task}: " + ", ".join(f"{name} {alpha:.2f}" for name, alpha in shown))
        else:
            figures.nothing(place)
            lines.append(f"{task}: {group.status}")
    render.write_figure(figure, NAME, {"alphas": data, "experts": experts}, context.command, out)
    return "\n".join([f"{NAME}.png: mean alphas over seeds", *lines])


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
