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


def movement(
    title: str, layers: Sequence[int], moved: Mapping[str, np.ndarray], profiles: Mapping[str, np.ndarray], path: Path
) -> None:
    """Draws an expert's changes: by layer and kind of matrix (left), and along the spectrum (right).

    Args:
      title: of the picture.
      layers: L layer numbers.
      moved: {kind: [L]} change of W relative to W (Frobenius); NaN where a layer is not adapted.
      profiles: {kind: [N, R]} abs(z - 1) along the index, of the N adapted matrices of the kind.
      path: the PNG file.
    """
    figure = Figure(figsize=(11, max(3.6, 1.2 + 0.16 * len(layers))), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    table = 100 * np.stack(list(moved.values()), axis=1)
    image = left.imshow(table, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    figure.colorbar(image, ax=left, label="change of W, % (Frobenius)")
    left.set(xlabel="kind of matrix", ylabel="layer")
    left.set_xticks(range(len(moved)), list(moved), rotation=20)
    every = max(1, len(layers) // 15)
    left.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    for kind, values in profiles.items():
        blocks = np.array_split(values, min(64, values.shape[1]), axis=1)  # single indices are too noisy to read
        ends = np.cumsum([0, *(block.shape[1] for block in blocks)]) / values.shape[1]
        middle = 50 * (ends[1:] + ends[:-1])
        means = np.stack([block.mean(axis=1) for block in blocks])  # [blocks, N]
        (line,) = right.plot(middle, means.mean(axis=1), label=kind)
        low, high = np.quantile(means, (0.1, 0.9), axis=1)
        right.fill_between(middle, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    right.set(xlabel="place in the spectrum, % (0: the largest singular value)", ylabel="abs(z - 1)", xlim=(0, 100))
    right.set_ylim(bottom=0)
    right.grid(alpha=0.3)
    right.legend(title="mean over matrices; band: 10 to 90 % of them")
    figure.savefig(path, dpi=120, format="png")
