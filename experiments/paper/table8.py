"""Table 8: few-shot search by the number of shots.

python -m experiments.paper.table8 --scale smol
"""

from pathlib import Path

from experiments.paper import command, paper_numbers, plan, searched
from experiments.paper.command import Context

NAME, STAGES = "table8", ("scout", "rates", "main", "more_rates", "studies")
GENERATIONS = plan.SEARCHES[0][1]


def make(context: Context, out: Path) -> str:
    """Writes table8.md, .tex and .json; returns the Markdown."""
    shots = sorted(number for number, generations in plan.SEARCHES if generations == GENERATIONS)
    budgets = {f"{number} shots": (number, GENERATIONS) for number in shots}
    paper = {f"{number} shots": score for number, score in paper_numbers.TABLE8.items()}
    return searched.write(NAME, searched.make("Table 8: shots", budgets, paper, context), context, out)


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
