"""SVF with other settings: what moves the result on the small model, for those who saw smaller gains.

    python -m experiments.paper.fidelity --scale smol

z and Adam in bfloat16 or float32, greedy or sampled rollouts, a baseline or none, KL 0 to 0.3, rescaled (sigmoid) or
not (z itself), clip 1e-3 or none. A row changes one setting and keeps the learning rate chosen for SVF, but for three;
see `NOTES`.
"""

from pathlib import Path

from experiments.paper import command, comparison, plan, render
from experiments.paper.command import Context
from experiments.paper.methods import FIDELITY
from experiments.paper.methods import METHODS as ALL

NAME, STAGES = "fidelity", ("scout", "rates", "main", "more_rates", "variants", "fidelity")
METHODS = ("svf", "linear", *FIDELITY)
NOTES = (
    "A row changes one setting of SVF and keeps its learning rate, but for three.",
    f"{ALL['linear'].title}: a learning rate of its own, chosen on validation as SVF's was.",
    f"{ALL['svf_public'].title}: the public code's rate, beside bfloat16.",
    f"{ALL['svf_greedy'].title}: four settings at once. Greedy answers to a prompt are all alike, so each has one and "
    "no baseline; 64 prompts make as many answers a step as 8 with 8 each, and where the cell has fewer different "
    "ones they are asked several times.",
)


def make(context: Context, out: Path) -> str:
    """Writes fidelity.md, .tex and .json; returns the Markdown."""
    title = f"SVF with other settings, {plan.middle(context.scale) or 'all'} training prompts"
    found = comparison.sides(context, METHODS)
    tables, data = comparison.tables(title, found, {}, (), reference="svf", notes=NOTES)
    return render.write(NAME, tables, data, context.command, out)


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
