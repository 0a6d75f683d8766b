"""Accuracy of the first pass, its confusion matrix and the cost of both passes, over the rows of an evaluation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sva.evaluation.stats import accuracy
from sva.tasks.labels import OTHER

AMOUNTS = ("seconds", "read", "drawn", "flops")


def confusion(right: Sequence[str], chosen: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """[C, C] counts: rows are the right label, columns the chosen one."""
    matrix = np.zeros((len(labels), len(labels)), int)
    np.add.at(matrix, ([labels.index(name) for name in right], [labels.index(name) for name in chosen]), 1)
    return matrix


def costs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cost of both passes over all rows, and the share of the first.

    Returns:
      {"first": {"seconds", "read", "drawn", "flops"}, "second": likewise, "share_of_first": {"seconds", "tokens",
      "flops"}}. Seconds leave compiling out; tokens and flops leave padding out, and the question's instruction, which
      is read once for all (`sva.adaptation.dispatchers.work`).
    """
    first, second = (
        {amount: sum(row[name][amount] for row in rows) for amount in AMOUNTS} for name in ("first", "second")
    )
    tokens = [each["read"] + each["drawn"] for each in (first, second)]
    share = {
        "seconds": _share(first["seconds"], second["seconds"]),
        "tokens": _share(*tokens),
        "flops": _share(first["flops"], second["flops"]),
    }
    return {"first": first, "second": second, "share_of_first": share}


def _share(part: float, rest: float) -> float:
    return part / (part + rest) if part + rest else 0.0


def scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Share of right labels (Wilson's interval), confusion matrix, mean probability, and `costs`."""
    right, chosen = [row["right_label"] for row in rows], [row["label"] for row in rows]
    labels = sorted({*right, *chosen}, key=lambda name: (name == OTHER, name))
    hits = np.array([a == b for a, b in zip(right, chosen, strict=True)])
    return {
        "labels": labels,
        "right_label": accuracy(hits)._asdict(),
        "confusion": confusion(right, chosen, labels).tolist(),
        "mean_prob": float(np.mean([row["prob"] for row in rows])),
        "cost": costs(rows),
    }


def as_text(found: Mapping[str, Any]) -> str:
    """`scores` in three lines."""
    cost = found["cost"]
    passes = "\n".join(
        f"{name} pass: {each['seconds']:.1f} s, {each['read']} tokens read, {each['drawn']} generated, "
        f"{each['flops'] / 1e9:.0f} GFLOP"
        for name, each in (("first", cost["first"]), ("second", cost["second"]))
    )
    share = cost["share_of_first"]
    return (
        f"sent to the right expert: {100 * found['right_label']['mean']:.1f} %\n{passes}\nfirst pass of both: "
        f"{share['seconds']:.0%} of the time, {share['tokens']:.0%} of the tokens, {share['flops']:.0%} of the flops"
    )
