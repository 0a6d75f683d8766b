"""Figure 9: does LoRA collapse under policy gradient? Rewards, gradients and answers' lengths at each of its rates.

    python -m experiments.paper.figure9 --scale smol

The curves are those of the cells that chose the learning rate, so that every rate tried is there, the bad ones too.
A run never learnt where the mean reward of each eighth of its steps is below -0.9 (fewer than one answer in twenty is
right); it collapsed where that of the last eighth is, and of an earlier one was not.
"""

from pathlib import Path

import numpy as np

from experiments.paper import command, figures, plan, render, scores
from experiments.paper.command import Context
from experiments.paper.methods import METHODS

NAME, STAGES = "figure9", ("scout", "rates", "more_rates")
ALL_WRONG = -0.9
SHOWN = ("lora", "lora_r1", "lora_attention", "svf")
METRICS = (
    ("reward", "mean reward"),
    ("grad_norm", "gradient norm before the clip"),
    ("mean_length", "tokens an answer"),
)


def make(context: Context, out: Path) -> str:
    """Writes figure9.png and .json; returns a line a method and rate."""
    figure, axes = figures.panels(len(METRICS))
    cells = [cell for cell in plan.rates(context.scale, context.known.tasks[0]) if cell.method in SHOWN]
    data, lines = {}, []
    for cell in cells:
        group = scores.group([cell], context.store)
        look = {
            "color": figures.COLOURS.get(cell.method, "C6"),
            "label": f"{METHODS[cell.method].title}, lr {cell.lr:g}",
        }
        strength = METHODS[cell.method].rates.index(cell.lr) + 1
        for place, (metric, title) in zip(axes, METRICS, strict=True):
            figures.curves(place, group.records, metric, **look)
            place.set(xlabel="step", ylabel=title)
            if group.records:
                place.lines[-1].set(alpha=strength / 3, lw=1.5)
        rewards = [row["reward"] for record in group.records for row in record["curve"]]
        what = result(rewards) if rewards else group.status
        data[look["label"]] = {"rewards": rewards, "result": what}
        lines.append(f"{look['label']}: {what}" + (f", last reward {rewards[-1]:+.2f}" if rewards else ""))
    axes[0].set(ylim=(-1.05, 1.05))
    if axes[0].get_legend_handles_labels()[0]:
        axes[-1].legend(
            *axes[0].get_legend_handles_labels(), fontsize=6, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5)
        )
    render.write_figure(figure, NAME, {"task": context.known.tasks[0], "curves": data}, context.command, out)
    return "\n".join([f"{NAME}.png: {context.known.tasks[0]}", *lines])


def result(rewards: list[float]) -> str:
    """What became of a run, by the mean rewards of its eighths; see above."""
    eighths = [float(np.mean(part)) for part in np.array_split(rewards, 8) if len(part)]
    if max(eighths) < ALL_WRONG:
        return "never learnt"
    return "collapsed" if eighths[-1] < ALL_WRONG else "did not collapse"


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
