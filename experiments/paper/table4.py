"""Table 4: which matrices and which learning: SVF and LoRA, policy gradient and next-token prediction.

python -m experiments.paper.table4 --scale smol
"""

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
    "lora_all_next",
)


def make(context: Context, out: Path) -> str:
    """Writes table4.md, .tex and .json; returns the Markdown."""
    title = f"Table 4: {plan.middle(context.scale) or 'all'} training prompts, what is trained and how"
    paper = {name: row[1:] for name, row in paper_numbers.TABLE4.items()}
    paper["base"] = (paper_numbers.TABLE1["base"][0], paper_numbers.TABLE2["base"][0])
    found = comparison.sides(context, METHODS)
    notes = (
        'SVF (all) and its LoRA stand beside the paper\'s "both", which for SVF is q, v and the mlp (its counts imply '
        "that); ours are all seven matrices of a layer.",
    )
    tables, data = comparison.tables(title, found, paper, ("GSM8K", "MATH"), notes=notes)
    return render.write(NAME, tables, data, context.command, out)


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
