"""Pictures of a run, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def learning_curve(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Sampled accuracy over training steps, from the rows of metrics.jsonl."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [100 * row["accuracy"] for row in rows], marker="o")
    axes.set(title=title, xlabel="training step", ylabel="sampled answers right (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def confusion(matrices: Mapping[str, np.ndarray], labels: Sequence[str], path: Path) -> None:
    """One confusion matrix a dispatcher: rows are the true kinds, columns what was chosen, in % of the row."""
    figure = Figure(figsize=(4.6 * len(matrices), 4.4), layout="constrained")
    for axes, (name, counts) in zip(np.atleast_1d(figure.subplots(1, len(matrices))), matrices.items(), strict=True):
        shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        axes.set(title=name, xlabel="chosen", ylabel="kind of prompt")
        axes.set_xticks(range(len(labels)), labels, rotation=30)
        axes.set_yticks(range(len(labels)), labels)
        for i, j in np.ndindex(*shares.shape):
            axes.text(j, i, f"{shares[i, j]:.0f}", ha="center", va="center", color="w" if shares[i, j] > 50 else "k")
    figure.savefig(path, dpi=120)
