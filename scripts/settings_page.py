"""Writes docs/settings.md from the dataclasses of settings: `python scripts/settings_page.py`; a test checks it."""

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sva.training.config import Config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"

_TOP = """# Settings

<!-- Written by scripts/settings_page.py from sva/training/config and sva/parallel/mesh_config.py; change those. -->

Every setting of `sva train`, its default, and what it does, where the name does not say it. A YAML file sets them
(`configs/` has examples), and words such as `train.lr=2e-3` on the command line set them on top; in Python they are
fields of `sva.Config`. [Train your own expert](training.md#settings) shows which ones belong to which way to train.
"""


class Setting(NamedTuple):
    """One row of the page."""

    name: str
    kind: str
    default: str
    about: str


def settings(cls: type, prefix: str = "") -> Iterator[Setting]:
    """The fields of a dataclass, and of those inside it."""
    lines = textwrap.dedent(inspect.getsource(cls)).splitlines()
    (tree,) = ast.parse("\n".join(lines)).body
    assert isinstance(tree, ast.ClassDef)
    places = {node.target.id: node for node in tree.body if isinstance(node, ast.AnnAssign)}  # pyright: ignore
    for field in dataclasses.fields(cls):
        inner = field.default_factory if field.default is dataclasses.MISSING else None
        if isinstance(inner, type) and dataclasses.is_dataclass(inner):
            yield from settings(inner, f"{prefix}{field.name}.")
            continue
        node = places[field.name]
        default = field.default if inner is None else inner()  # pyright: ignore[reportCallIssue]
        yield Setting(prefix + field.name, ast.unparse(node.annotation), _value(default), _comment(lines, node))


def _comment(lines: list[str], node: ast.AnnAssign) -> str:
    """The comment behind a field, which a long value puts on another of its lines, else the one above it."""
    assert node.end_lineno is not None
    behind = [line.split("  # ", 1)[1] for line in lines[node.lineno - 1 : node.end_lineno] if "  # " in line]
    above = lines[node.lineno - 2].strip()
    return " ".join(behind) or above.removeprefix("# ") * above.startswith("# ")


def _value(value: Any) -> str:
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


def page() -> str:
    """The whole text of docs/settings.md."""
    sections: dict[str, list[Setting]] = {}
    for row in settings(Config):
        sections.setdefault(row.name.rpartition(".")[0], []).append(row)
    text = _TOP
    for section, rows in sections.items():
        text += f"\n## `{section}`\n" if section else "\n## The run\n"
        text += "\n| setting | type | default | |\n|---|---|---|---|\n"
        for name, kind, default, about in rows:
            cells = (f"`{name}`", f"`{kind}`".replace("|", "\\|"), default, about.replace("|", "\\|"))
            text += f"| {' | '.join(cells)} |\n".replace("|  |", "| |")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
