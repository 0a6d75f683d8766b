"""Table 1: the base, LoRA, SVF and IA3 on the training tasks.

python -m experiments.paper.table1 --scale smol
"""

from pathlib import Path

from experiments.paper import command, comparison, paper_numbers, render
from experiments.paper.command import Context

NAME, STAGES = "table1", ("scout", "rates", "main")
METHODS = ("lora", "svf", "ia3")
PAPER = {name: row for name, row in paper_numbers.TABLE1.items() if name != "dora"}


def make(context: Context, out: Path) -> str:
    """Writes table1.md, .tex and .json; returns the Markdown."""
    examples = max(context.scale.examples)
    title = f"Table 1: {examples or 'all'} training prompts, by policy gradient"
    found = comparison.sides(context, METHODS, examples)
    tables, data = comparison.tables(
        title, found, PAPER, paper_numbers.TABLE1_TASKS, notes=(paper_numbers.LORA, "Ours like it is in table 7.")
    )
    data |= {"examples": examples, "rates": {name: context.known.rates.get(name) for name in METHODS}}
    return render.write(NAME, tables, data, context.command, out)


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
