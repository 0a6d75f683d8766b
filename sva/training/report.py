"""One HTML page about a run, with everything inside it: no file beside it, no network."""

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from sva.training import metrics
from sva.utils.errors import UserError
from sva.utils.files import read_json, read_lines, read_text, write_atomically

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
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
h1, h2 { line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; width: 100%; table-layout: fixed } th, td { text-align: left; vertical-align: top;
padding: .3rem .6rem; border-bottom: 1px solid #eee; overflow-wrap: anywhere; white-space: pre-wrap }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: .85rem }
svg, img { max-width: 100%; height: auto }
.wrong { background: #fdecea } .right { background: #e9f6ec } .alarm { color: #b3261e }
"""


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
    parts = [
        _summary(result, rows),
        _section("Curves", curves(rows) if rows else "<p>No step is done yet.</p>"),
        _section("Answers that changed", _changes(_lines(run_dir / "before.jsonl"), _lines(run_dir / "after.jsonl"))),
        _spectrum(run_dir / "spectrum.png"),
        _alarms(rows, run_dir / "failed"),
        _section("Configuration", f"<pre>{html.escape(read_text(settings))}</pre>"),
        _section("Environment", _environment(result)),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{html.escape(title)}</h1>\n{''.join(parts)}</body>\n</html>\n"
    )


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


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>\n"


def _summary(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    if "before" not in result:
        return f"<p>Not finished: {len(rows)} steps are done.</p>\n"
    cells = [(name, result[name]) for name in ("before", "after", "gain")]
    shown = "".join(
        f"<tr><th>{name}</th><td>{100 * x['mean']:.1f} % [{100 * x['low']:.1f}, {100 * x['high']:.1f}]</td></tr>"
        for name, x in cells
    )
    about = f"Greedy answers to {result['n']} held-out prompts ({result['split']}), with 95 % intervals; "
    about += f"{result['parameters']} numbers trained in {len(rows)} steps."
    return f"<p>{html.escape(about)}</p><table>{shown}</table>\n"


def _changes(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> str:
    if not before or len(before) != len(after):
        return "<p>The run has not answered the held-out prompts twice yet.</p>"
    pairs = list(zip(before, after, strict=True))
    body = ""
    for title, was, now in (("From wrong to right", False, True), ("From right to wrong", True, False)):
        changed = [pair for pair in pairs if (pair[0]["correct"], pair[1]["correct"]) == (was, now)]
        lines = "".join(
            f"<tr><td>{html.escape(a['question'])}</td>"
            f'<td class="{_colour(was)}">{html.escape(a["completion"])}</td>'
            f'<td class="{_colour(now)}">{html.escape(b["completion"])}</td></tr>'
            for a, b in changed[:SAMPLES]
        )
        shown = f", the first {SAMPLES}" if len(changed) > SAMPLES else ""
        body += f"<h3>{title}: {len(changed)} of {len(pairs)}{shown}</h3>"
        body += f"<table><tr><th>prompt</th><th>before</th><th>after</th></tr>{lines}</table>" if lines else ""
    return body


def _colour(is_right: bool) -> str:
    return "right" if is_right else "wrong"


def _spectrum(picture: Path) -> str:
    if not picture.is_file():
        return ""
    data = base64.b64encode(picture.read_bytes()).decode()
    return _section("Spectrum of the expert", f'<img alt="what the expert moved" src="data:image/png;base64,{data}">')


def _alarms(rows: Sequence[Mapping[str, Any]], failed: Path) -> str:
    lines = [f"step {row['step']}: {alarm}" for row in rows for alarm in row.get("alarms", ())]
    lines += [f"step {row['step']} was left out" for row in rows if "skipped" in row]
    lines += [f"kept in failed/{path.name}: {_json(path)['reason']}" for path in sorted(failed.glob("*.json"))]
    items = "".join(f'<li class="alarm">{html.escape(line)}</li>' for line in lines)
    return _section("Alarms", f"<ul>{items}</ul>") if lines else ""


def _environment(result: Mapping[str, Any]) -> str:
    if not result:
        return "<p>Written when the run is finished.</p>"
    found = dict(result.get("versions", {}))
    found |= {name: result[name] for name in ("command", "fingerprint", "quantisation", "seconds") if name in result}
    lines = (f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in found.items())
    return f"<table>{''.join(lines)}</table>"


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_lines(path) if line.strip()] if path.is_file() else []
