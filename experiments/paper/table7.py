"""Table 7: IA3 and DoRA beside SVF and LoRA.

python -m experiments.paper.table7 --scale smol
"""

from pathlib import Path

from experiments.paper import command, comparison, paper_numbers, plan, render
from experiments.paper.command import Context

NAME, STAGES = "table7", ("scout", "rates", "main", "more_rates", "variants")
METHODS = ("svf", "lora", "lora_attention_next", "ia3", "dora")


def make(context: Context, out: Path) -> str:
    """Writes table7.md, .tex and .json; returns the Markdown."""
    title = f"Table 7: {plan.middle(context.scale) or 'all'} training prompts, more baselines"
    found = comparison.sides(context, METHODS)
    tables, data = comparison.tables(
        title, found, paper_numbers.TABLE1, paper_numbers.TABLE1_TASKS, notes=(paper_numbers.LORA,)
    )
    return render.write(NAME, tables, data, context.command, out)


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
