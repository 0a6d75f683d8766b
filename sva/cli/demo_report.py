"""What the demo shows: one prompt's two answers, the table of all systems, and the report for who has read nothing."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sva.evaluation.evaluate import Record
from sva.evaluation.stats import accuracy, paired_difference

GREEN, RED, BOLD = 32, 31, 1  # of ANSI's escape codes


def contrast(kind: str, base: Sequence[Record], expert: Sequence[Record]) -> str:
    """The prompt of this kind that the expert alone answers rightly, the first of them, with both answers.

    Where there is none, the first of this kind. A sentence says which it is.
    """
    pairs = [pair for pair in zip(base, expert, strict=True) if pair[0].task == kind]
    won = [pair for pair in pairs if pair[1].correct and not pair[0].correct]
    was, now = (won or pairs)[0]
    how = (
        f"The first of {len(pairs)} held-out {kind!r} prompts that the expert answers rightly and the base wrongly; "
        if won
        else f"The first of {len(pairs)} held-out {kind!r} prompts; "
    )
    right = [sum(record.correct for record in records) for records in zip(*pairs, strict=True)]
    lines = [
        "",
        f"{how}of all {len(pairs)} the base has {right[0]} right, the expert {right[1]}.",
        "",
        f"  {colour(was.question, BOLD)}",
        f"  base model:  {_answer(was)}",
        f"  its expert:  {_answer(now)}",
    ]
    return "\n".join(lines)


def _answer(record: Record) -> str:
    """The answer on one line, green where it is right and red where it is wrong."""
    return colour(" ".join(record.completion.split()) or "(nothing)", GREEN if record.correct else RED)


def colour(text: str, code: int) -> str:
    """The text in this colour where standard output is a terminal that wants any (no-color.org)."""
    is_wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\033[{code}m{text}\033[0m" if is_wanted else text


def table(answers: Mapping[str, Sequence[Record]], kinds: Sequence[str]) -> dict[str, Any]:
    """Accuracies overall and by kind, and the paired differences that matter."""
    right = {name: np.array([record.correct for record in records]) for name, records in answers.items()}
    single = max((name for name in right if name.endswith("everywhere")), key=lambda name: right[name].mean())
    by_kind = {
        name: {kind: float(ok[[k == kind for k in kinds]].mean()) for kind in dict.fromkeys(kinds)}
        for name, ok in right.items()
    }
    return {
        "accuracy": {name: accuracy(ok)._asdict() for name, ok in right.items()},
        "by_kind": by_kind,
        "best_single": single,
        "two_pass_over_base": paired_difference(right["two-pass"], right["base"])._asdict(),
        "two_pass_over_best_single": paired_difference(right["two-pass"], right[single])._asdict(),
    }


def report(result: Mapping[str, Any], directory: Path) -> str:
    """What happened, for a person who has read nothing."""

    def share(interval: Mapping[str, float]) -> str:
        return f"{100 * interval['mean']:5.1f} % [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"

    def points(interval: Mapping[str, float]) -> str:
        return f"{100 * interval['mean']:+.1f} points [{100 * interval['low']:+.1f}, {100 * interval['high']:+.1f}]"

    live, kinds = result["live"], list(result["by_kind"]["base"])
    sent = {name: f"{100 * found['accuracy']:.0f} %" for name, found in result["dispatch"].items()}
    lines = [
        "",
        f"An expert is {result['model']}'s own weights with their singular values rescaled: one vector a matrix.",
        f"Trained here: {live['task']}, greedy on {live['n']} prompts never seen: {share(live['before'])} before, "
        f"{share(live['after'])} after.",
        "",
        f"Mixed set of {result['n']} held-out prompts ({', '.join(kinds)}); accuracy with 95 % interval:",
        f"  {'':24}{'all':>24}   " + "".join(f"{kind:>12}" for kind in kinds),
    ]
    for name, interval in result["accuracy"].items():
        cells = "".join(f"{100 * result['by_kind'][name][kind]:12.0f}" for kind in kinds)
        lines.append(f"  {name:24}{share(interval):>24}   {cells}")
    lines += [
        "",
        f"Two passes against the base model:   {points(result['two_pass_over_base'])}",
        f"Two passes against {result['best_single']}: {points(result['two_pass_over_best_single'])}",
        f"Sent to the right expert: {', '.join(f'{share} by the {name}' for name, share in sent.items())}.",
        "",
        f"What the passes took over all prompts:{'s':>12}{'tokens':>12}{'GFLOP':>12}",
        *(
            f"  {name:24}{kind:8}{cost[kind]['seconds']:16.1f}{cost[kind]['read'] + cost[kind]['drawn']:12}"
            f"{cost[kind]['flops'] / 1e9:12.0f}"
            for name, cost in result["cost"].items()
            for kind in ("first", "second")
        ),
        *(
            f"  {name:24}the first's share {cost['share_of_first']['seconds']:6.0%}"
            f"{cost['share_of_first']['tokens']:12.0%}{cost['share_of_first']['flops']:12.0%}"
            for name, cost in result["cost"].items()
        ),
        "(oracle dispatch: every prompt answered by its own kind's expert, 'other' by the base. What an expert",
        "answered in the second pass counts for it alone as well and is not answered twice.)",
        f"Pictures and records: {directory}",
    ]
    return "\n".join(lines)


def say(text: str) -> None:
    """A heading between the progress bars."""
    print(f"\n== {text}", file=sys.stderr)
