"""One setting of SVF at a time: what moves the result on the small model, for those who saw smaller gains.

    python -m experiments.paper.fidelity --scale smol

z and Adam in bfloat16 or float32, greedy or sampled rollouts, a baseline or none, KL 0 to 0.3, rescaled (sigmoid) or
not (z itself), clip 1e-3 or none. All but the public code's own rate keep the learning rate chosen for SVF.
"""

from pathlib import Path

from experiments.paper import command, comparison, plan, render
from experiments.paper.command import Context
from experiments.paper.methods import FIDELITY

NAME, STAGES = "fidelity", ("scout", "rates", "main", "more_rates", "variants", "fidelity")
METHODS = ("svf", "linear", *FIDELITY)


def make(context: Context, out: Path) -> str:
    """Writes fidelity.md, .tex and .json; returns the Markdown."""
    title = f"One setting of SVF at a time, {plan.middle(context.scale)} training prompts"
    found = comparison.sides(context, METHODS)
    tables, data = comparison.tables(title, found, {}, (), reference="svf")
    return render.write(NAME, tables, data, context.command, out)


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
