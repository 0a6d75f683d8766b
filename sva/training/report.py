"""One HTML page about a run, with everything inside it: no file beside it, no network."""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from matplotlib import rc_context
from matplotlib.figure import Figure

from sva.training import metrics
from sva.utils.errors import UserError
from sva.utils.files import read_json, read_lines, read_text, write_atomically

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
SAMPLES = 20  # answers shown of each kind
_PANELS = (  # title, metrics in it
    ("reward of sampled answers", ("reward",)),
    ("accuracy", ("accuracy", "validation_accuracy")),
    ("loss", ("loss",)),
    ("KL, nats a completion", ("kl",)),
    ("entropy, nats a token", ("entropy",)),
    ("norm of the gradient", ("grad_norm",)),
    ("spread of z", ("z_spread",)),
    ("mean tokens of a completion", ("mean_length",)),
    ("sampler against trainer, nats", ("logprob_gap", "logprob_gap_mean")),
    (
        "seconds of a step",
        ("rollout_seconds", "grading_seconds", "update_seconds", "validation_seconds", "rest_seconds"),
    ),
)


def write(run_dir: Path, out: Path) -> None:
    """Writes the page of the run at `run_dir`, finished or not, to `out`.

    Raises:
      UserError: no run there, or the page cannot be written.
    """
    page_of_run = page(run_dir)
    write_atomically(out, lambda path: path.write_text(page_of_run, encoding="utf-8"))


def page(run_dir: Path) -> str:
    """The HTML text.

    Raises:
      UserError: `run_dir` holds no run.
    """
    settings = run_dir / "config.yaml"
    if not settings.is_file():
        raise UserError(f"{run_dir} holds no run of `sva train` (no config.yaml); give its run_dir")
    rows = metrics.read(run_dir / "metrics.jsonl")
    result = _json(run_dir / "result.json")
    title = f"{result.get('task', run_dir.name)} on {result['model']}" if "model" in result else run_dir.name
    picture = run_dir / "spectrum.png"
    values = {
        "title": title,
        "result": result,
        "steps": len(rows),
        "curves": curves(rows) if rows else None,
        "changes": _changes(_lines(run_dir / "before.jsonl"), _lines(run_dir / "after.jsonl")),
        "spectrum": base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else None,
        "alarms": _alarms(rows, run_dir / "failed"),
        "settings": read_text(settings),
        "environment": _environment(result),
    }
    pages = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return pages.from_string(read_text(_TEMPLATE)).render(values)


def curves(rows: Sequence[Mapping[str, Any]]) -> str:
    """An inline SVG picture: one panel for each group of metrics that the rows have."""
    panels = [
        (title, [name for name in names if any(row.get(name) is not None for row in rows)]) for title, names in _PANELS
    ]
    panels = [(title, names) for title, names in panels if names]
    lines = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 2.4 * lines), layout="constrained")
    grid = figure.subplots(lines, 2, squeeze=False).ravel()
    for axes, (title, names) in zip(grid, panels, strict=False):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 60 else "", label=name, linewidth=1.2)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=7)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):  # text stays text: smaller, searchable
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return re.sub(r"^.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)


class _Changes(NamedTuple):
    """Prompts whose answer became right or wrong, the first of them with both answers."""

    title: str
    number: int
    total: int
    first: list[dict[str, str]]  # prompt, before, after
    before: str  # right or wrong
    after: str


def _changes(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[_Changes]:
    """Both kinds of changes; empty where the run has not answered the held-out prompts twice yet."""
    if not before or len(before) != len(after):
        return []
    pairs = list(zip(before, after, strict=True))
    kinds = []
    for was, now in (("wrong", "right"), ("right", "wrong")):
        changed = [
            {"prompt": a["question"], "before": a["completion"], "after": b["completion"]}
            for a, b in pairs
            if (a["correct"], b["correct"]) == (was == "right", now == "right")
        ]
        kinds.append(_Changes(f"From {was} to {now}", len(changed), len(pairs), changed[:SAMPLES], was, now))
    return kinds


def _alarms(rows: Sequence[Mapping[str, Any]], failed: Path) -> list[str]:
    lines = [f"step {row['step']}: {alarm}" for row in rows for alarm in row.get("alarms", ())]
    lines += [f"step {row['step']} was left out" for row in rows if "skipped" in row]
    return lines + [f"kept in failed/{path.name}: {_json(path)['reason']}" for path in sorted(failed.glob("*.json"))]


def _environment(result: Mapping[str, Any]) -> dict[str, Any]:
    names = ("command", "fingerprint", "quantisation", "seconds")
    return {**result.get("versions", {}), **{name: result[name] for name in names if name in result}}


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_lines(path) if line.strip()] if path.is_file() else []
