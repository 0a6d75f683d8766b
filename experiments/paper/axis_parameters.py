"""Score against trained parameters, which nobody has drawn: SVF and its family, IA3, LoRA of ranks 1 to 16, full.

    python -m experiments.paper.axis_parameters --scale smol

Filled points by policy gradient, hollow ones by next-token prediction.
"""

from pathlib import Path

from experiments.paper import command, figures, plan, render, scores
from experiments.paper.command import Context
from experiments.paper.comparison import Side, sides
from experiments.paper.methods import FIDELITY, METHODS

NAME, STAGES = "axis_parameters", ("scout", "rates", "main", "more_rates", "variants")
SHOWN = tuple(name for name in METHODS if name not in FIDELITY)
PAIRS = (("svf", "ia3"), ("svf", "lora_r1_attention"), ("projected", "svf"), ("svf", "lora"), ("svf", "full"))


def make(context: Context, out: Path) -> str:
    """Writes axis_parameters.png and .json; returns the paired differences at the nearest equal counts."""
    figure, axes = figures.panels(len(context.known.tasks))
    found = sides(context, SHOWN)
    data = {}
    for place, task in zip(axes, context.known.tasks, strict=True):
        place.set(title=task, xscale="log", xlabel="trained parameters", ylabel="held-out accuracy, %")
        drawn = [side for side in found if side.groups[task].records]
        for side in drawn:
            _draw(place, side, task)
        data[task] = {side.method: (side.parameters, scores.score(side.groups[task])) for side in drawn}
        if drawn:
            figures.base_line(place, drawn[0].groups[task])
        else:
            figures.nothing(place)
    if axes[-1].get_legend_handles_labels()[0]:
        axes[-1].legend(fontsize=5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    text, pairs = _pairs({side.method: side for side in found}, context)
    examples = plan.middle(context.scale)
    about = {"scores": data, "pairs": pairs, "examples": examples}
    render.write_figure(figure, NAME, about, context.command, out)
    return "\n".join([f"{NAME}.png: {examples} training prompts; differences with (seeds x n)", *text])


def _draw(place: figures.Axes, side: Side, task: str) -> None:
    score = scores.score(side.groups[task])
    if score is None or side.parameters is None:
        return
    place_in_list = SHOWN.index(side.method)
    colour = figures.COLOURS.get(side.method, f"C{place_in_list % 10}")
    figures.errorbar(place, side.parameters, score, color=colour, label=METHODS[side.method].title)
    if side.method.endswith("_next"):
        place.containers[-1][0].set_markerfacecolor("white")


def _pairs(found: dict[str, Side], context: Context) -> tuple[list[str], list[dict]]:
    """The paired differences of `PAIRS` on every task, corrected for their number."""
    entries = [
        (one, other, task, scores.compared(found[one].groups[task], found[other].groups[task]))
        for one, other in PAIRS
        for task in context.known.tasks
    ]
    corrected = scores.corrected([difference for *_, difference in entries])
    lines, data = [], []
    for (one, other, task, difference), p in zip(entries, corrected, strict=True):
        what = f"{METHODS[one].title} less {METHODS[other].title} on {task}"
        if difference is None:
            lines.append(f"{what}: not run")
        else:
            basis = render.basis(difference)
            lines.append(f"{what}: {render.points(difference)} ({basis}), p {render.p_value(p)}")
            data.append({"method": one, "less": other, "task": task, **difference._asdict(), "p_holm": p})
    return lines, data


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
