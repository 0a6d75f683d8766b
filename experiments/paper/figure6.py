"""Figure 6: confusion matrices of the dispatchers, right label against chosen one, over all seeds.

python -m experiments.paper.figure6 --scale smol
"""

from pathlib import Path

from experiments.paper import command, plan, render
from experiments.paper.command import Context
from sva.adaptation.dispatch_report import confusion
from sva.tasks.labels import OTHER
from sva.utils import plots
from sva.utils.files import write_json

NAME, STAGES = "figure6", ("scout", "rates", "main", "more_rates", "studies")


def make(context: Context, out: Path) -> str:
    """Writes figure6.png and .json; returns how often each dispatcher chose the right label."""
    group = context.studies("dispatch", tasks=(*context.known.tasks, OTHER))
    records = group.records
    if not records:
        return f"{NAME}: {group.status}"
    labels = records[0]["labels"]
    right = [label for record in records for label in record["right_labels"]]
    counts, lines = {}, []
    for name in plan.FIRST:
        chosen = [label for record in records for label in record["chosen"][name]]
        counts[name] = confusion(right, chosen, labels)
        share = sum(a == b for a, b in zip(right, chosen, strict=True)) / len(right)
        lines.append(f"{name}: {100 * share:.1f} % to the right expert, n = {len(right)}")
    plots.confusion(counts, labels, out / f"{NAME}.png")
    about = {"labels": labels, "counts": counts, "command": context.command}
    write_json(out / f"{NAME}.json", render.plain(about))
    return "\n".join([f"{NAME}.png", *lines])


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
