"""What training does to SmolLM2-135M-Instruct's accuracy on held-out prompts: runs of configs/sweeps, and their curves.

    sva sweep configs/sweeps/smollm2-procedural.yaml     # nine runs of four minutes; stopped, it goes on
    sva sweep configs/sweeps/smollm2-algorithms.yaml     # nine more
    python experiments/learning/learning.py              # writes result.json, table.md and curves.png beside this file

A run that is not there is said to be "not run". The curves are the mean reward of each step's samples (+1 right, -1
wrong), on training prompts; the table's accuracies are greedy, on test prompts.
"""

import statistics
from pathlib import Path

from matplotlib.figure import Figure

from sva import metrics, sweep_command
from sva.files import write_json
from sva.runs import command, versions

HERE = Path(__file__).parent
SWEEPS = ("smollm2-procedural", "smollm2-algorithms")


def main() -> None:
    result, text = {}, []
    figure = Figure(figsize=(5 * len(SWEEPS), 3.6), layout="constrained")
    for place, name in enumerate(SWEEPS, 1):
        cells = sweep_command.read(Path("configs/sweeps") / f"{name}.yaml")
        found = sweep_command.table(cells)
        axes = figure.add_subplot(1, len(SWEEPS), place)
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
        axes.set(title=name, xlabel="step", ylabel="mean reward of samples", ylim=(-1.05, 1.05))
        if curves:
            axes.legend(fontsize=7, frameon=False)
        else:
            axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")
        result[name] = found
        text += [f"## {name}", "", sweep_command.as_text(found), ""]
    figure.savefig(HERE / "curves.png", dpi=130)
    (HERE / "table.md").write_text("\n".join(text))
    write_json(HERE / "result.json", result | {"versions": versions(), "command": command()})
    print("\n".join(text))


if __name__ == "__main__":
    main()
