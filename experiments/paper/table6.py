"""Table 6: the settings of every method, and the learning rate that validation chose.

python -m experiments.paper.table6 --scale smol
"""

from pathlib import Path

from experiments.paper import command, paper_numbers, plan, render, scores
from experiments.paper.command import Context
from experiments.paper.methods import METHODS

NAME, STAGES = "table6", ("scout", "rates", "more_rates")


def make(context: Context, out: Path) -> str:
    """Writes table6.md, .tex and .json; returns the Markdown."""
    tried = {cell: scores.group([cell], context.store) for cell in plan.rates(context.scale, context.known.tasks[0])}
    rows, data = [], {}
    for name, method in METHODS.items():
        ends = {
            cell.lr: group.records[0]["after"]["mean"] if group.records else None
            for cell, group in tried.items()
            if cell.method == name
        }
        chosen = context.known.rates.get(name)
        shown = ", ".join(f"{lr:g}: {'not run' if x is None else f'{100 * x:.1f} %'}" for lr, x in ends.items())
        more = ", ".join(f"{setting}={value}" for setting, value in method.more)
        rate = (
            "not decided" if chosen is None else f"{chosen:g}" + (f" (as {method.rate_of})" if method.rate_of else "")
        )
        rows.append((method.title, method.parametrisation, method.targets, more, shown, rate))
        data[name] = {"tried": ends, "chosen": chosen}
    about = dict(context.scale.settings)
    notes = (
        f"Learning rates: accuracy on validation of {context.known.tasks[0]}, {context.scale.tuning_examples} training "
        f"prompts, seed {context.scale.tuning_seed}; the best of the same number of tries, of equals the lowest.",
        f"All: {', '.join(f'{name}={value}' for name, value in about.items())}; Adam, joint gradient clipped to 1e-3.",
        *(f"The paper's {name}: {text}." for name, text in paper_numbers.TABLE6.items()),
    )
    header = ("method", "parametrisation", "targets", "other settings", "tried", "chosen")
    table = render.Table("Table 6: settings", header, tuple(rows), notes)
    return render.write(NAME, [table], {"methods": data, "settings": about}, context.command, out)


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
