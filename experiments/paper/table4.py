"""Table 4: which matrices and which learning: SVF and LoRA, policy gradient and next-token prediction.

python -m experiments.paper.table4 --scale smol
"""

import dataclasses
from pathlib import Path

from experiments.paper import command, comparison, paper_numbers, plan, render
from experiments.paper.command import Context

NAME, STAGES = "table4", ("scout", "rates", "main", "more_rates", "variants")
METHODS = (
    "svf",
    "svf_attention",
    "svf_all",
    "svf_next",
    "svf_attention_next",
    "lora",
    "lora_attention",
    "lora_all",
    "lora_next",
    "lora_attention_next",
)


def make(context: Context, out: Path) -> str:
    """Writes table4.md, .tex and .json; returns the Markdown."""
    title = f"Table 4: {plan.middle(context.scale)} training prompts, what is trained and how"
    paper = {name: row[1:] for name, row in paper_numbers.TABLE4.items()}
    paper["base"] = (paper_numbers.TABLE1["base"][0], paper_numbers.TABLE2["base"][0])
    found = comparison.sides(context, METHODS)
    tables, data = comparison.tables(title, found, paper, ("GSM8K", "MATH"))
    note = 'The paper\'s "both" is q, v and the mlp (its counts imply that); ours is all seven matrices of a layer.'
    tables[0] = dataclasses.replace(tables[0], notes=(*tables[0].notes, note))
    return render.write(NAME, tables, data, context.command, out)


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
