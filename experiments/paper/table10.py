"""Table 10: few-shot search by its budget: shots, and generations of 32 members.

python -m experiments.paper.table10 --scale smol
"""

from pathlib import Path

from experiments.paper import command, paper_numbers, plan, searched
from experiments.paper.command import Context

NAME, STAGES = "table10", ("scout", "rates", "main", "more_rates", "studies")
BUDGETS = {"full": plan.SEARCHES[0], "3-shot": plan.SEARCHES[1], "light": plan.SEARCHES[-1]}


def make(context: Context, out: Path) -> str:
    """Writes table10.md, .tex and .json; returns the Markdown."""
    budgets = {f"{name} ({shots} shots, {n} generations)": (shots, n) for name, (shots, n) in BUDGETS.items()}
    paper = dict(zip(budgets, paper_numbers.TABLE10.values(), strict=True))
    return searched.write(NAME, searched.make("Table 10: budgets", budgets, paper, context), context, out)


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
