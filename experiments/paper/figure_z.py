"""The z's own figure: how alike experts are, by cosine and by principal components of z - 1.

    python -m experiments.paper.figure_z --scale smol

Cosines are between the concatenated s (z - 1) of two experts, what they change in the weights' own coordinates: experts
of one task and other seeds beside experts of other tasks. The components are those of the same vectors.
"""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.paper import command, figures, render
from experiments.paper.cells import Cell
from experiments.paper.command import Context
from sva.spectral.expert import Expert

NAME, STAGES = "figure_z", ("scout", "rates", "main")


def make(context: Context, out: Path) -> str:
    """Writes figure_z.png and .json; returns the mean cosines within and between tasks."""
    cells = [cell for task in context.known.tasks for cell in context.cells("svf", task, max(context.scale.examples))]
    there = [cell for cell in cells if context.store.expert_path(cell).exists()]
    if len(there) < 2:
        return f"{NAME}: not run (experts are in {context.store.directory / 'experts'})"
    changes = vectors(context, there)
    unit = changes / np.linalg.norm(changes, axis=1, keepdims=True)
    cosines = unit @ unit.T
    components, shares = principal(changes)
    _draw(cosines, components, shares, there, context, out)
    same = np.array([[a.task == b.task for b in there] for a in there])
    off = ~np.eye(len(there), dtype=bool)
    within, between = (cosines[off & where] for where in (same, ~same))
    lines = [
        f"{name}: {values.mean():+.3f}" if values.size else f"{name}: not run"
        for name, values in (("mean cosine of one task's seeds", within), ("mean cosine of two tasks", between))
    ]
    lines.append(f"first two components: {100 * shares[0]:.0f} % and {100 * shares[1]:.0f} % of the variance")
    return "\n".join([f"{NAME}.png: {len(there)} experts", *lines])


def vectors(context: Context, cells: list[Cell]) -> np.ndarray:
    """[E, D] s (z - 1) of every expert's matrices one after another."""
    from sva.generation.decompose import spectra_of
    from sva.generation.load import load
    from sva.generation.testing import toy_lm

    lm = toy_lm() if context.scale.model == "toy" else load(context.scale.model, progress=False)
    experts = [Expert.load(context.store.expert_path(cell), fingerprint=lm.fingerprint) for cell in cells]
    spectra = spectra_of(lm, experts[0].names)
    changes = []
    for expert in experts:
        z: Any = expert.z(spectra)
        changes.append(
            np.concatenate([np.asarray(spectra[name].s) * (np.asarray(z[name]) - 1) for name in expert.names])
        )
    return np.stack(changes)


def principal(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([E, 2] coordinates on the first two principal components of x [E, D], their shares of the variance)."""
    u, s, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    return u[:, :2] * s[:2], (s**2 / np.sum(s**2))[:2]


def _draw(
    cosines: np.ndarray, components: np.ndarray, shares: np.ndarray, cells: list[Cell], context: Context, out: Path
) -> None:
    figure, (left, right) = figures.panels(2)
    names = [f"{cell.task} {cell.seed}" for cell in cells]
    shown = left.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
    left.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    left.set_yticks(range(len(names)), names, fontsize=6)
    left.set_title("cosine of s (z - 1)")
    figure.colorbar(shown, ax=left, shrink=0.7)
    for color, task in enumerate(context.known.tasks):
        places = [i for i, cell in enumerate(cells) if cell.task == task]
        right.plot(*components[places].T, "o", color=f"C{color}", label=task)
    axes = [f"component {i + 1} ({100 * share:.0f} %)" for i, share in enumerate(shares)]
    right.set(xlabel=axes[0], ylabel=axes[1], title="principal components")
    right.legend(fontsize=7, frameon=False)
    about = {"experts": names, "cosines": cosines, "components": components, "shares": shares}
    render.write_figure(figure, NAME, about, context.command, out)


if __name__ == "__main__":
    command.run(NAME, __doc__ or "", make, STAGES)
