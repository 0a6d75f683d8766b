"""Table 9: experts moved to another model, on the tasks that they were trained on.

python -m experiments.paper.table9 --scale smol
"""

from pathlib import Path

from experiments.paper import command, moved, paper_numbers, render, systems
from experiments.paper.command import Context

NAME, STAGES = "table9", ("scout", "rates", "main", "more_rates", "studies")


def make(context: Context, out: Path) -> str:
    """Writes table9.md, .tex and .json; returns the Markdown."""
    tasks = context.known.tasks
    title = f"Table 9: experts moved to a model fine-tuned on {context.scale.other_model}, their own tasks"
    notes = (
        "Base: that other model alone; each task is answered with its own expert.",
        f"The paper's: {' / '.join(paper_numbers.TABLE1_TASKS)} of Llama's experts on Mistral-7B-Instruct-v0.3.",
    )
    table, data = systems.table(title, moved.of(context, tasks), tasks, paper_numbers.TABLE9, notes)
    return render.write(NAME, [table], data, context.command, out)


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
