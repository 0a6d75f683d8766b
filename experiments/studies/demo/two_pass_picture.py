"""The two passes as one picture, from the real model: one matrix's spectrum, the experts' z over it, one prompt.

    python experiments/studies/demo/two_pass_picture.py     # writes two_passes.png and two_passes.json beside this file

SmolLM2-135M-Instruct (Q4_1) and two experts that the package ships. The first pass scores the labels for PROMPT; the
expert that it chooses is drawn in colour, the other one in grey. The matrix is the one whose z differ most from 1 over
both experts; all 90 mlp matrices are scaled in the same way.
"""

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import sva

MODEL = "smollm2-135m-instruct-q4_1"
EXPERTS = ("capitals", "list_last")
PROMPT = "What is the capital of Switzerland? Answer with the city only."  # held out
CHOSEN, OTHER, INK = "#d1495b", "#a3a9b3", "#222831"
LINES = 64  # points of each z that are joined by a line; beyond, there is no room for it
HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def found() -> dict[str, Any]:
    """What is drawn: the labels' probabilities, both answers, and s and every expert's z of one matrix."""
    lm = sva.load(MODEL)
    experts = [sva.Expert.load(ROOT / f"sva/assets/{name}.safetensors") for name in EXPERTS]
    model = sva.adaptive(lm, experts)
    decision = model.choose([PROMPT])
    labels = [label.name for label in model.labels]
    (answer,) = model.answer([PROMPT], max_new_tokens=16)
    (base,) = model.by("fixed:other").answer([PROMPT], max_new_tokens=16)
    spectra = sva.decompose(lm, "mlp")
    zs = [expert.z(spectra) for expert in experts]
    name = max(zs[0], key=lambda weight: min(float(np.std(np.asarray(z[weight]))) for z in zs))
    return {
        "model": lm.name,
        "prompt": PROMPT,
        "probs": dict(zip(labels, decision.probs[0].tolist(), strict=True)),
        "chosen": answer.label,
        "answer": answer.text,
        "base_answer": base.text,
        "matrix": name,
        "matrices": len(spectra),
        "s": rounded(spectra[name].s),
        "z": {label: rounded(z[name]) for label, z in zip(labels, zs, strict=False)},
    }


def rounded(values: Any) -> list[float]:
    """Numbers with the digits that a picture can show."""
    return np.round(np.asarray(values, np.float64), 5).tolist()


def draw(data: dict[str, Any], path: Path) -> None:
    """The first pass on the left, the second on the right."""
    figure = Figure(figsize=(10.5, 4.6), facecolor="white")
    grid = figure.add_gridspec(
        1, 2, width_ratios=(1, 1.75), left=0.025, right=0.985, top=0.86, bottom=0.115, wspace=0.2
    )
    left = grid[0].subgridspec(3, 1, height_ratios=(0.8, 1.1, 1.15), hspace=0.12)
    right = grid[1].subgridspec(2, 1, height_ratios=(1, 1.25), hspace=0.1)
    first_pass(figure, left, data)
    spectrum = figure.add_subplot(right[0])
    scales = figure.add_subplot(right[1], sharex=spectrum)
    second_pass(spectrum, scales, data)
    heading = {"fontsize": 13, "fontweight": "bold", "color": INK, "va": "top"}
    figure.text(0.025, 0.965, "First pass: which expert?", **heading)
    title = "Second pass: answer with W' = U diag(s z) V\N{MODIFIER LETTER CAPITAL T}"
    figure.text(scales.get_position().x0, 0.965, title, **heading)
    figure.savefig(path, dpi=140)


def first_pass(figure: Figure, grid: Any, data: dict[str, Any]) -> None:
    """The prompt, a bar for each label, and the answers that follow."""
    question, bars, answers = (figure.add_subplot(cell) for cell in grid)
    for axes in (question, answers):
        axes.set_axis_off()
    wrapped = "\n".join(textwrap.wrap(data["prompt"], 36))
    box = {"boxstyle": "round,pad=0.55", "facecolor": "#f3f4f6", "edgecolor": "#d5d8de"}
    question.text(0.045, 0.93, wrapped, fontsize=11, va="top", color=INK, bbox=box, transform=question.transAxes)
    names, probs = list(data["probs"]), list(data["probs"].values())
    colours = [CHOSEN if name == data["chosen"] else OTHER for name in names]
    places = np.arange(len(names))[::-1]
    bars.barh(places, probs, color=colours, height=0.62)
    for place, name, prob, colour in zip(places, names, probs, colours, strict=True):
        shown = CHOSEN if colour == CHOSEN else INK
        bars.text(-0.02, place, name, ha="right", va="center", fontsize=11, color=shown)
        bars.text(prob + 0.02, place, f"{prob:.0%}", va="center", fontsize=11, color=shown)
    bars.set(xlim=(-0.36, 1.14), ylim=(-0.6, len(names) - 0.4))
    bars.set_axis_off()
    for height, who, text, colour in (
        (0.72, "base alone", data["base_answer"], INK),
        (0.3, f"with the expert '{data['chosen']}'", data["answer"], CHOSEN),
    ):
        words = textwrap.shorten(text, 44, placeholder=" ...")
        answers.text(0.02, height, f"{who}:", fontsize=10, va="center", color="#6b7280", transform=answers.transAxes)
        answers.text(0.02, height - 0.17, words, fontsize=11.5, va="center", color=colour, transform=answers.transAxes)


def second_pass(spectrum: Any, scales: Any, data: dict[str, Any]) -> None:
    """One matrix's singular values, and each expert's z at the same places."""
    s = np.asarray(data["s"])
    index = np.arange(1, len(s) + 1)
    spectrum.fill_between(index, s, s.min() * 0.8, color="#dfe3ea", linewidth=0)
    spectrum.plot(index, s, color=INK, linewidth=1.6)
    spectrum.set(yscale="log", xscale="log", xlim=(1, len(s)), ylim=(s.min() * 0.8, s.max() * 1.4))
    decades = [each * 10.0**power for power in range(-3, 5) for each in (1, 2, 5)]
    spectrum.set_yticks([tick for tick in decades if s.min() <= tick <= s.max()])
    spectrum.yaxis.set_major_formatter("{x:g}")
    spectrum.minorticks_off()
    spectrum.set_ylabel("s", fontsize=11, color=INK)
    spectrum.tick_params(labelbottom=False)
    spectrum.text(
        0.985, 0.9, f"{data['matrix'].removesuffix('.weight')}, one of {data['matrices']} matrices",
        transform=spectrum.transAxes, ha="right", va="top", fontsize=10, color="#6b7280",
    )  # fmt: skip
    scales.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    for name in sorted(data["z"], key=lambda label: label == data["chosen"]):
        chosen = name == data["chosen"]
        z, colour, order = data["z"][name], CHOSEN if chosen else OTHER, 3 if chosen else 2
        scales.plot(index[:LINES], z[:LINES], color=colour, linewidth=1.1, zorder=order)
        sizes = np.interp(np.log(index), [0, np.log(len(s))], [30, 3])
        label = f"z of {name}, chosen" if chosen else f"z of {name}"
        scales.scatter(index, z, s=sizes, color=colour, linewidths=0, zorder=order, label=label)
    ticks = [1, 2, 5, 10, 20, 50, 100, 200, len(s)]
    scales.set_xticks(ticks, [str(tick) for tick in ticks])
    scales.minorticks_off()
    scales.set_xlabel("index of the singular value, the largest first", fontsize=11, color=INK)
    scales.set_ylabel("z", fontsize=11, color=INK)
    scales.legend(loc="upper left", ncols=3, fontsize=10, frameon=False)
    low, high = np.min(list(data["z"].values())), np.max(list(data["z"].values()))
    scales.set_ylim(low - 0.01, high + 0.25 * (high - low))
    for axes in (spectrum, scales):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eceef2", linewidth=0.8)
        axes.set_axisbelow(True)


def main() -> None:
    """Measures, keeps what it found, and draws it."""
    data = found()
    (HERE / "two_passes.json").write_text(json.dumps(data) + "\n")
    draw(data, HERE / "two_passes.png")
    print({name: value for name, value in data.items() if name not in ("s", "z")})


if __name__ == "__main__":
    main()
