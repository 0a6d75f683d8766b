"""Table 5: experts moved to another model, on tasks that they were not trained on.

    python -m experiments.paper.table5 --scale smol

The paper moves Llama's experts to Mistral; at smol they move to the same model after full fine-tuning on another task.
"""

from pathlib import Path

from experiments.paper import command, moved, paper_numbers, render, systems
from experiments.paper.command import Context

NAME, STAGES = "table5", ("scout", "rates", "main", "more_rates", "studies")


def make(context: Context, out: Path) -> str:
    """Writes table5.md, .tex and .json; returns the Markdown."""
    tasks = context.known.unseen
    title = f"Table 5: experts moved to a model fine-tuned on {context.scale.other_model}, unseen tasks"
    notes = (
        "Base: that other model alone. The better expert of each task is taken in hindsight, shuffled as ordered.",
        f"The paper's: {' / '.join(paper_numbers.TABLE2_TASKS)} of Llama's experts on Mistral-7B-Instruct-v0.3.",
    )
    table, data = systems.table(title, moved.of(context, tasks), tasks, paper_numbers.TABLE5, notes)
    return render.write(NAME, [table], data, context.command, out)


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
