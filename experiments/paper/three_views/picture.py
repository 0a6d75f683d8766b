"""The picture that the article draws in words, drawn from the measured numbers, areas to one scale.

Left: K whole models behind a router. Middle: one model whose layers hold K modules. Right: one model, and an arm for
each skill that ends in its z. A percentage beside a skill is what the view answers rightly of that skill's prompts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle

from sva.utils.files import write_atomically

COLOURS, SHARED, INK, GREY = ("#d1495b", "#2f7ebc", "#3f9b5f", "#b5762a"), "#e4e7ec", "#222831", "#6b7280"
HEIGHT = 3.0  # of the base model, whose area is 1.9 by 3
AREA = 1.9 * HEIGHT
LAYERS = 10  # lines that suggest layers
WIDE, TOP, BOTTOM = 7.8, 5.7, -1.75
TITLES = {
    "macro": ("Macro: whole models", "a router sends each question to one"),
    "micro": ("Micro: one mixture of experts", "in every layer, a router picks modules for each token"),
    "self-adaptive": ("Self-adaptive: one model, experts of z", "a first pass picks the arm, a second one answers"),
}
SYSTEMS = {
    "macro": "macro: whole models, routed",
    "micro": "micro: one mixture",
    "self-adaptive": "self-adaptive: two passes",
}


def write(data: Mapping[str, Any], directory: Path) -> None:
    """Writes three_views.png and three_views.svg into a directory."""
    figure = drawn(data)
    with matplotlib.rc_context({"svg.hashsalt": "three views", "svg.fonttype": "none"}):
        for form, more in (("png", {"dpi": 140}), ("svg", {"metadata": {"Date": None}})):
            path = directory / f"three_views.{form}"
            write_atomically(path, lambda place, form=form, more=more: figure.savefig(place, format=form, **more))


def drawn(data: Mapping[str, Any]) -> Figure:
    """The figure of three panels."""
    figure = Figure(figsize=(13.5, 4.75), facecolor="white")
    draw = {"macro": _macro, "micro": _micro, "self-adaptive": _adaptive}
    for place, (view, (title, about)) in enumerate(TITLES.items()):
        axes = figure.add_axes((0.01 + place / 3.04, 0.075, 0.315, 0.915))
        axes.set(xlim=(0, WIDE), ylim=(BOTTOM, TOP), aspect="equal")
        axes.set_axis_off()
        axes.text(WIDE / 2, TOP - 0.05, title, ha="center", va="top", fontsize=12.5, fontweight="bold", color=INK)
        axes.text(WIDE / 2, TOP - 0.6, about, ha="center", va="top", fontsize=9.5, color=GREY)
        draw[view](axes, data)
        _facts(axes, data, view)
    base = 100 * data["systems"]["base"]["score"]["mean"]
    text = (
        f"All areas to one scale of stored numbers. {data['model']}, base {base:.0f} % right; {data['n']} held-out "
        f"prompts, seeds: {len(data['seeds'])}. Made by python -m "
        "experiments.paper.three_views."
    )
    figure.text(0.5, 0.025, text, ha="center", fontsize=8.5, color=GREY)
    return figure


def _facts(axes: Axes, data: Mapping[str, Any], view: str) -> None:
    """Accuracy over all, and what the view takes."""
    cost, score = data["costs"][view], data["systems"][SYSTEMS[view]]["score"]
    mean, low, high = (100 * score[name] for name in ("mean", "low", "high"))
    axes.text(WIDE / 2, -0.62, f"{mean:.0f} % right [{low:.0f}, {high:.0f}]", **_centred(12, "bold"))
    took = f"{_short(cost['parameters'])} numbers trained, {_short(cost['stored_parameters'])} stored"
    axes.text(WIDE / 2, -1.08, took, **_centred(9.5))
    memory = f"{cost['bytes_held'] / 1e6:,.0f} MB held, first answer after {cost['first_answer_seconds']:.0f} s"
    axes.text(WIDE / 2, -1.48, memory, **_centred(9.5))


def _macro(axes: Axes, data: Mapping[str, Any]) -> None:
    """A rectangle a model, each as large as the base."""
    skills = _skills(data, "macro")
    width = _area(data, data["costs"]["macro"]["stored_parameters"] / len(skills)) / HEIGHT
    gap = (WIDE - width * len(skills)) / (len(skills) + 1)
    _router(axes, WIDE / 2, 4.35, 0.17)
    for place, (label, share, colour) in enumerate(skills):
        left = gap + place * (width + gap)
        _block(axes, left, width, colour, 0.55)
        axes.plot([WIDE / 2, left + width / 2], [4.17, HEIGHT], color=GREY, lw=1, zorder=0)
        _skill(axes, left + width / 2, 0.55 * HEIGHT, label, share)


def _micro(axes: Axes, data: Mapping[str, Any]) -> None:
    """One rectangle: what all modules share, and a column a module."""
    skills = _skills(data, "micro")
    total = data["costs"]["micro"]["stored_parameters"]
    module = (total - data["costs"]["base"]["stored_parameters"]) / (len(skills) - 1)
    wide, shared = (_area(data, x) / HEIGHT for x in (module, total - module * len(skills)))
    left = (WIDE - shared - wide * len(skills)) / 2
    _block(axes, left, shared, SHARED, 1)
    axes.text(left + shared / 2, HEIGHT / 2, "shared", rotation=90, **_centred(9))
    axes.add_patch(Rectangle((left, 0), shared + wide * len(skills), HEIGHT, fill=False, ec=INK, lw=1.4, zorder=4))
    for place, (label, share, colour) in enumerate(skills):
        at = left + shared + place * wide
        _block(axes, at, wide, colour, 0.55)
        axes.text(at + wide / 2, HEIGHT / 2, f"{label}  {share:.0f} %", rotation=90, zorder=6, **_centred(10.5))
    for layer in range(LAYERS):
        _router(axes, left + shared, (layer + 0.5) * HEIGHT / LAYERS, 0.07)
    axes.text(WIDE / 2, HEIGHT + 0.55, "a module is one specialist's mlp,\na circle a layer's router", **_noted())


def _adaptive(axes: Axes, data: Mapping[str, Any]) -> None:
    """The base, and for each skill an arm whose end is as large as its z."""
    skills = _skills(data, "self-adaptive")
    costs = data["costs"]
    width = _area(data, costs["base"]["stored_parameters"]) / HEIGHT
    each = costs["self-adaptive"]["parameters"] / len(skills)
    side = _area(data, each) ** 0.5
    left = 1.0
    arm = left + width + 1.4
    _block(axes, left, width, SHARED, 1)
    axes.text(left + width / 2, HEIGHT / 2, "one\nmodel", zorder=6, **_centred(10.5))
    for place, (label, share, colour) in enumerate(skills):
        height = HEIGHT - (place + 0.5) * HEIGHT / len(skills)
        axes.plot([left + width, arm], [height, height], color=GREY, lw=1, zorder=0)
        axes.add_patch(Rectangle((arm, height - side / 2), side, side, color=colour, lw=0, zorder=3))
        axes.text(arm + 0.3, height, f"{label}  {share:.0f} %", ha="left", va="center", fontsize=10.5, color=colour)
    _router(axes, left + width, HEIGHT / 2, 0.13)
    text = f"the point at the end of an arm is its z:\n{_short(each)} numbers, to the same scale"
    axes.text(WIDE / 2, HEIGHT + 0.55, text, **_noted())


def _block(axes: Axes, left: float, width: float, colour: str, alpha: float) -> None:
    """A rectangle of the common height, with lines for layers."""
    axes.add_patch(Rectangle((left, 0), width, HEIGHT, fc=colour, alpha=alpha, lw=0, zorder=1))
    axes.add_patch(Rectangle((left, 0), width, HEIGHT, fill=False, ec=INK, lw=1, zorder=3))
    for layer in range(1, LAYERS):
        height = layer * HEIGHT / LAYERS
        axes.plot([left, left + width], [height, height], color="white", lw=0.8, zorder=2)


def _router(axes: Axes, x: float, y: float, radius: float) -> None:
    axes.add_patch(Circle((x, y), radius, fc="white", ec=INK, lw=1.2, zorder=5))


def _skill(axes: Axes, x: float, y: float, label: str, share: float) -> None:
    axes.text(x, y, f"{label}\n{share:.0f} %", zorder=6, **_centred(10.5))


def _skills(data: Mapping[str, Any], view: str) -> Sequence[tuple[str, float, str]]:
    """(label, percent right, colour) of every task."""
    shares = data["systems"][SYSTEMS[view]]["by_task"]
    labels = data["tasks"]
    return [
        (labels[task], 100 * shares[task]["mean"], COLOURS[place % len(COLOURS)]) for place, task in enumerate(labels)
    ]


def _area(data: Mapping[str, Any], parameters: float) -> float:
    """The area of so many numbers."""
    return AREA * parameters / data["costs"]["base"]["stored_parameters"]


def _centred(size: float, weight: str = "normal") -> dict[str, Any]:
    return {"ha": "center", "va": "center", "fontsize": size, "fontweight": weight, "color": INK}


def _noted() -> dict[str, Any]:
    return {"ha": "center", "va": "center", "fontsize": 9, "color": GREY}


def _short(number: float) -> str:
    """'403M' or '98k'."""
    return f"{number / 1e6:.0f}M" if number >= 1e6 else f"{number / 1e3:.0f}k"
