"""Sampled answers: pass@k and majority at k of the base and the main methods, one seed each.

    python -m experiments.paper.sampled --scale smol

Where pass@8 stays and pass@1 rises, training sharpened what the base could do already; where pass@8 rises too, it
learnt something.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.paper import command, render, scores
from experiments.paper.command import Context
from experiments.paper.methods import MAIN, METHODS
from sva.evaluation.significance import majority_at_k, pass_at_k

NAME, STAGES = "sampled", ("scout", "rates", "main")
Drawn = Mapping[str, Sequence[Sequence[Any]]]


def passed(drawn: Drawn, k: int) -> np.ndarray:
    """[n] the chance of each prompt that k of its answers hold a right one."""
    return np.array([pass_at_k(len(row), sum(row), k) for row in drawn["rights"]])


def voted(drawn: Drawn) -> np.ndarray:
    """[n] whether the commonest answer to each prompt is right."""
    pairs = zip(drawn["answers"], drawn["rights"], strict=True)
    return np.array([majority_at_k(answers, rights, len(answers)) for answers, rights in pairs])


def make(context: Context, out: Path) -> str:
    """Writes sampled.md, .tex and .json; returns the Markdown."""
    examples, rows, data = max(context.scale.examples), [], {}
    columns: dict[str, Callable[[Drawn], np.ndarray]] = {
        "pass@1": lambda x: passed(x, 1),
        "pass@4": lambda x: passed(x, 4),
        "pass@8": lambda x: passed(x, 8),
        "majority at 8": voted,
    }
    for task in context.known.tasks:
        found = {"base": None} | dict.fromkeys(MAIN)
        for method in MAIN:
            group = scores.group(context.cells(method, task, examples)[:1], context.store)
            for drawn in [record["sampled"] for record in group.records if "sampled" in record]:
                found["base"], found[method] = drawn["before"], drawn["after"]
        for name, drawn in found.items():
            title = "base" if name == "base" else METHODS[name].title
            values = (
                {} if drawn is None else {column: scores.score_of(of(drawn)[None]) for column, of in columns.items()}
            )
            rows.append((task, title, *(render.percent(values.get(column)) for column in columns)))
            data[f"{task}/{name}"] = values
    notes = (f"8 answers to each of 96 held-out prompts at temperature 1; seed 0, {examples} training prompts.",)
    table = render.Table("Sampled answers, %", ("task", "method", *columns), tuple(rows), notes)
    return render.write(NAME, [table], {"scores": data}, context.command, out)


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
