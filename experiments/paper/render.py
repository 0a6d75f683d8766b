"""Tables and figures as files: Markdown, LaTeX, JSON and PNG of one name under experiments/paper/results."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.paper.records import HERE
from sva.utils.files import write_atomically, write_json

RESULTS = HERE / "results"


@dataclass(frozen=True)
class Table:
    """Rows of text under a header, and a sentence a note."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table as Markdown."""
        lines = [f"### {self.title}", "", _line(self.header), _line(["---"] * len(self.header))]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]).rstrip() + "\n"

    def latex(self) -> str:
        """The table as LaTeX, for `booktabs`."""
        body = " \\\\\n".join(" & ".join(map(_escaped, row)) for row in self.rows)
        head = " & ".join(map(_escaped, self.header))
        caption = _escaped(". ".join([self.title, *self.notes]).replace("..", "."))
        return (
            f"\\begin{{table}}\n\\caption{{{caption}}}\n\\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}\n"
            f"\\toprule\n{head} \\\\\n\\midrule\n{body} \\\\\n\\bottomrule\n\\end{{tabular}}\n\\end{{table}}\n"
        )


def write(
    name: str,
    tables: Sequence[Table],
    data: Mapping[str, Any],
    command: str,
    directory: Path = RESULTS,
    *,
    records: str = "experiments/paper/cells",
) -> str:
    """Writes name.md, name.tex and name.json, which holds the numbers that the text rounds; returns the Markdown."""
    made = f"Made by `{command}` from the records in `{records}`.\n"
    markdown = "\n".join([*(table.markdown() for table in tables), made])
    latex = "\n".join([f"% {command}", *(table.latex() for table in tables)])
    for ending, text in (("md", markdown), ("tex", latex)):
        write_atomically(directory / f"{name}.{ending}", lambda path, text=text: path.write_text(text))
    write_json(directory / f"{name}.json", plain({**data, "command": command}))
    return markdown


def write_figure(figure: Any, name: str, data: Mapping[str, Any], command: str, directory: Path = RESULTS) -> None:
    """Writes name.png, and what it shows as name.json."""
    write_atomically(directory / f"{name}.png", lambda path: figure.savefig(path, dpi=130, format="png"))
    write_json(directory / f"{name}.json", plain({**data, "command": command}))


def percent(score: Mapping[str, float] | None, status: str = "") -> str:
    """'72.0 [65.3, 77.9]' in percent; the status where there is no score, behind it where some are missing."""
    if score is None:
        return status or "not run"
    text = f"{100 * score['mean']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
    return f"{text} ({status})" if status else text


def points(comparison: Any) -> str:
    """'+3.1 [+1.0, +5.2]' in points; empty where there is none."""
    if comparison is None:
        return ""
    return f"{100 * comparison.mean:+.1f} [{100 * comparison.low:+.1f}, {100 * comparison.high:+.1f}]"


def basis(comparison: Any) -> str:
    """'3 x 300', seeds and items that a difference rests on; empty where there is none."""
    return "" if comparison is None else f"{comparison.seeds} x {comparison.n}"


def beside(name: str, paper: Mapping[str, Sequence[float]]) -> str:
    """'79.15 (+3.26) / ...', the paper's scores and behind each the difference from its own base; or empty."""
    if name not in paper:
        return ""
    pairs = zip(paper[name], paper["base"], strict=True)
    return " / ".join(f"{x:.2f}" if name == "base" else f"{x:.2f} ({x - base:+.2f})" for x, base in pairs)


def p_value(p: float | None) -> str:
    """'0.012' or '< 0.001'; empty where there is none."""
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def millions(number: int | None) -> str:
    """'3.04M', '51.8k' or '13'."""
    if number is None:
        return ""
    return f"{number / 1e6:.2f}M" if number >= 1e6 else f"{number / 1e3:.1f}k" if number >= 1e3 else str(number)


def plain(value: Any) -> Any:
    """The value as JSON has it: tuples as lists, numbers to six digits, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(part) for part in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return json.loads(json.dumps(value))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    for mark in "%&_#$":
        text = text.replace(mark, f"\\{mark}")
    return text.replace("<", "$<$").replace("±", "$\\pm$")
