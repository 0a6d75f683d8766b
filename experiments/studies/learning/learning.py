"""What training does to SmolLM2-135M-Instruct's accuracy on held-out prompts: runs of configs/sweeps, and their curves.

    sva sweep configs/sweeps/smollm2-procedural.yaml     # stopped, it goes on; see PREDICTED
    sva sweep configs/sweeps/smollm2-algorithms.yaml
    sva sweep configs/sweeps/smollm2-samples.yaml
    sva sweep configs/sweeps/smollm2-benchmarks.yaml
    python experiments/studies/learning/learning.py  # writes result.json, table.md, curves.png and samples.png here

A run that is not there is said to be "not run". The curves are the mean reward of each step's samples (+1 right, -1
wrong), on training prompts; the tables' accuracies are greedy, on test prompts. The runs of 2026-11-25 shared the two
cores with compilers and tests: of their minutes only the shortest tell what a run takes.
"""

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sva.cli import sweep as sweep_command
from sva.cli.sweep_file import read as read_sweep
from sva.training import metrics
from sva.utils.files import write_json
from sva.utils.provenance import command, versions

HERE = Path(__file__).parent
# Minutes a run on two quiet cores, as expected on 2026-11-25 before any of them but the first two had been made.
PREDICTED = {"smollm2-procedural": 3.5, "smollm2-algorithms": 5, "smollm2-samples": 4, "smollm2-benchmarks": 22}
SAMPLES = "smollm2-samples"


def main() -> None:
    result, text = {}, []
    figure = Figure(figsize=(5 * len(PREDICTED), 3.6), layout="constrained")
    for place, (name, minutes) in enumerate(PREDICTED.items(), 1):
        cells = read_sweep(Path("configs/sweeps") / f"{name}.yaml")
        found = sweep_command.table(cells)
        axes = figure.add_subplot(1, len(PREDICTED), place)
        curves = {}
        for cell, row in zip(cells, found["cells"], strict=True):
            path = cell.run_dir / "metrics.jsonl"
            if path.exists():
                steps = metrics.read(path)
                row["reward"] = [round(step["reward"], 4) for step in steps]
                for part in ("rollout", "grading", "update", "rest"):
                    shares = [step[f"{part}_seconds"] / step["step_seconds"] for step in steps]
                    row[f"{part}_share"] = round(statistics.median(shares), 4)
                curves.setdefault(cell.seedless, []).append(row["reward"])
        for color, (label, runs) in enumerate(curves.items()):
            for number, curve in enumerate(runs):
                axes.plot(curve, color=f"C{color}", lw=1.2, alpha=0.8, label=None if number else label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=name, xlabel="step", ylabel="mean reward of samples", ylim=(-1.05, 1.05))
        if curves:
            axes.legend(fontsize=7, frameon=False)
        else:
            axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")
        result[name] = found | {"predicted_minutes": minutes}
        text += [f"## {name}", "", f"Predicted: {minutes} minutes a run.", "", sweep_command.as_text(found), ""]
    figure.savefig(HERE / "curves.png", dpi=130)
    draw_samples(result[SAMPLES]["cells"], HERE / "samples.png")
    (HERE / "table.md").write_text("\n".join(text))
    write_json(HERE / "result.json", result | {"versions": versions(), "command": command()})
    print("\n".join(text))


def draw_samples(rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out accuracy by the number of different training prompts, a point a seed and a line through their means."""
    by_number: dict[int, list[float]] = {}
    bases = []
    for row in rows:
        if row["status"] == "done":
            number = int(row["cell"].partition("train.examples=")[2])
            by_number.setdefault(number, []).append(100 * row["after"]["mean"])
            bases.append(100 * row["before"]["mean"])
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title="last_letter, 20 steps of 8 prompts", xlabel="different training prompts", ylim=(0, 100))
    axes.set(ylabel="held-out accuracy, %", xscale="log")
    if by_number:
        numbers = sorted(by_number)
        axes.axhline(statistics.mean(bases), color="0.6", lw=1, ls="--", label="base model")
        axes.plot(numbers, [statistics.mean(by_number[n]) for n in numbers], color="C0", label="mean of seeds")
        for number in numbers:
            axes.plot([number] * len(by_number[number]), by_number[number], "o", color="C0", alpha=0.6)
        axes.set_xticks(numbers, list(map(str, numbers)))
        axes.minorticks_off()
        axes.legend(fontsize=8, frameon=False)
    else:
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
