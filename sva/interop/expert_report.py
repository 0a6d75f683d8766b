"""Changes that an expert makes to a model's spectra, as numbers by layer and kind of matrix, and as text."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sva.models.weights import split_name
from sva.spectral.forms import require_vector
from sva.spectral.movement import Movement, movement
from sva.utils import plots
from sva.utils.files import write_atomically


def place(name: str) -> tuple[int, str]:
    """(layer, kind) of a weight: model.layers.3.mlp.up_proj.weight is (3, "mlp.up_proj"); modules are of one kind."""
    layer, path = split_name(name)
    return layer or 0, ".".join(part for part in path[:-1] if not part.isdigit())


def movements(z: Mapping[str, Any], s: Mapping[str, Any]) -> dict[str, Movement]:
    """Movement of z in each of its weights, whose singular values are s [R]."""
    for name, x in z.items():
        require_vector(name, x)
    return {name: movement(x, s[name]) for name, x in z.items()}


def by_kind(moved: Mapping[str, Movement]) -> dict[str, Movement]:
    """Over all layers of a kind, and all modules: means, and of `max_abs` and `spectral` the largest."""
    kinds: dict[str, list[Movement]] = {}
    for name, one in moved.items():
        kinds.setdefault(place(name)[1], []).append(one)
    return {kind: _over(group) for kind, group in kinds.items()}


def as_json(moved: Mapping[str, Movement]) -> dict[str, Any]:
    """For a program: the same numbers by kind and by weight."""
    return {
        "kinds": {kind: one._asdict() for kind, one in by_kind(moved).items()},
        "weights": {name: one._asdict() for name, one in moved.items()},
    }


def as_text(moved: Mapping[str, Movement]) -> str:
    """Two tables: by kind; and by layer, the change of W in % of its Frobenius norm."""
    kinds = by_kind(moved)
    width = max(20, 1 + max(map(len, kinds), default=0))
    lines = [
        "abs(z - 1), and the change W' - W relative to W; where in the spectrum the change lies (thirds of the index)",
        "",
        f"{'':<{width}}{'abs(z - 1)':^18}{'change of W, %':^20}{'share of it, %':^23}",
        f"{'':<{width}}{'mean':>8}{'max':>8}{'Frobenius':>12}{'spectral':>10}{'top':>8}{'middle':>8}{'bottom':>8}",
    ]
    for kind, one in kinds.items():
        shares = "".join(f"{100 * share:8.1f}" for share in one.shares)
        change = f"{100 * one.frobenius:12.2f}{100 * one.spectral:10.2f}"
        lines.append(f"{kind:<{width}}{one.mean_abs:8.4f}{one.max_abs:8.4f}{change}{shares}")
    lines += ["", "change of W by layer, % (Frobenius)", "", f"{'layer':<8}" + "".join(f"{k:>{width}}" for k in kinds)]
    table = _by_place(moved)
    for layer in sorted({layer for layer, _ in table}):
        cells = [table.get((layer, kind)) for kind in kinds]
        lines.append(f"{layer:<8}" + "".join(f"{'-' if x is None else f'{100 * x:.2f}':>{width}}" for x in cells))
    return "\n".join(lines)


def draw(moved: Mapping[str, Movement], z: Mapping[str, Any], title: str, path: Path) -> None:
    """Writes the picture, see `sva.utils.plots.movement`."""
    layers = sorted({place(name)[0] for name in moved})
    table = {kind: np.full(len(layers), np.nan) for kind in by_kind(moved)}
    profiles: dict[str, list[np.ndarray]] = {kind: [] for kind in table}
    for (layer, kind), change in _by_place(moved).items():
        table[kind][layers.index(layer)] = change
    for name in moved:
        profiles[place(name)[1]].append(np.abs(np.asarray(z[name]) - 1))
    stacked = {kind: np.stack(vectors) for kind, vectors in profiles.items()}
    write_atomically(path, lambda file: plots.movement(title, layers, table, stacked, file))


def _by_place(moved: Mapping[str, Movement]) -> dict[tuple[int, str], float]:
    """{(layer, kind): change of W relative to W}; of a mixture the mean of its modules."""
    found: dict[tuple[int, str], list[float]] = {}
    for name, one in moved.items():
        found.setdefault(place(name), []).append(one.frobenius)
    return {where: float(np.mean(changes)) for where, changes in found.items()}


def _over(group: Iterable[Movement]) -> Movement:
    mean_abs, max_abs, frobenius, spectral, shares = zip(*group, strict=True)
    top, middle, bottom = np.mean(shares, axis=0).tolist()
    return Movement(
        float(np.mean(mean_abs)), max(max_abs), float(np.mean(frobenius)), max(spectral), (top, middle, bottom)
    )
