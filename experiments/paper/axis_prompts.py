"""Score against the number of different training prompts, which nobody has drawn: SVF, LoRA, IA3 and full.

python -m experiments.paper.axis_prompts --scale smol
"""

from pathlib import Path

from experiments.paper import command, figures, render, scores
from experiments.paper.command import Context
from experiments.paper.methods import METHODS
from experiments.paper.scores import Group

NAME, STAGES = "axis_prompts", ("scout", "rates", "main", "more_rates", "prompts")
SHOWN = ("svf", "lora", "ia3", "full")


def make(context: Context, out: Path) -> str:
    """Writes axis_prompts.png and .json; returns SVF less LoRA at every number of prompts."""
    numbers = sorted({*context.scale.examples, *context.scale.more_examples})
    figure, axes = figures.panels(len(context.known.tasks))
    data, entries = {}, []
    for place, task in zip(axes, context.known.tasks, strict=True):
        found = {(method, n): _group(context, method, task, n) for method in SHOWN for n in numbers}
        place.set(title=task, xscale="log", xlabel="different training prompts", ylabel="held-out accuracy, %")
        for method in SHOWN:
            data[f"{task}/{method}"] = _draw(place, method, {n: found[method, n] for n in numbers})
        some = next((group for group in found.values() if group.records), None)
        if some is None:
            figures.nothing(place)
        else:
            figures.base_line(place, some)
            place.set_xticks(numbers, list(map(str, numbers)))
            place.minorticks_off()
            place.legend(fontsize=7, frameon=False)
        for n in numbers:
            entries.append((task, n, scores.compared(found["svf", n], found["lora", n])))
    corrected = scores.corrected([difference for *_, difference in entries])
    lines, pairs = [], []
    for (task, n, difference), p in zip(entries, corrected, strict=True):
        text = f"{render.points(difference)} ({render.basis(difference)}), p {render.p_value(p)}" if difference else ""
        lines.append(f"SVF less LoRA on {task} with {n} prompts: {text or 'not run'}")
        pairs += [{"task": task, "examples": n, **difference._asdict(), "p_holm": p}] if difference else []
    render.write_figure(figure, NAME, {"scores": data, "svf_less_lora": pairs}, context.command, out)
    return "\n".join([f"{NAME}.png; differences with (seeds x n)", *lines])


def _group(context: Context, method: str, task: str, examples: int) -> Group:
    return scores.group(context.cells(method, task, examples), context.store)


def _draw(place: figures.Axes, method: str, groups: dict[int, Group]) -> dict[int, dict[str, float]]:
    """The scores by number of prompts, drawn as a line with intervals."""
    found = {n: score for n, group in groups.items() if (score := scores.score(group)) is not None}
    shift = 1.06 ** (SHOWN.index(method) - 1.5)  # side by side, so that intervals do not hide each other
    for n, score in found.items():
        label = METHODS[method].title if n == next(iter(found)) else None
        figures.errorbar(place, n * shift, score, color=figures.COLOURS[method], label=label)
    place.plot([n * shift for n in found], [100 * s["mean"] for s in found.values()], color=figures.COLOURS[method])
    return found


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
