"""The YAML file of `sva sweep`: a grid of settings, read into the training runs that it stands for."""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sva.training import config
from sva.training.config import SETTINGS
from sva.utils.errors import UserError
from sva.utils.files import decoded
from sva.utils.remote import local_path, to_path
from sva.utils.settings import Setting, is_null, leaves, override, pairs, parse, value_of
from sva.utils.trees import nearest

_KEYS = ("config", "overrides", "grid", "dir")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run of a sweep."""

    name: str
    config: str
    overrides: tuple[str, ...]
    run_dir: Path
    seedless: str  # the name without its seed: cells that share it are repetitions

    @property
    def words(self) -> list[str]:
        """The words of the `sva` command that runs it."""
        return ["train", self.config, *self.overrides, override("run_dir", str(self.run_dir))]


def read(path: Path) -> list[Cell]:
    """The cells of a sweep's file, in order: the last axis changes fastest.

    Raises:
      UserError: no such file, something else than the settings of a sweep, a setting that `sva train` would refuse.
    """
    path = local_path(path, "a sweep")
    asked = _asked(path)
    configs, axes = _configs(asked, path), _axes(asked, path)
    common = _overrides(asked, path)
    directory = to_path(_text(asked["dir"], "dir", path) if "dir" in asked else Path("runs") / path.stem)
    cells = []
    for file, values in itertools.product(configs, itertools.product(*axes.values())):
        named = [f"{name}={value.name}" for name, value in zip(axes, values, strict=True)]
        stem = [Path(file).stem] if len(configs) > 1 else []
        name, seedless = (
            "_".join([*stem, *kept]).replace("/", "-") or Path(file).stem
            for kept in (named, [axis for axis in named if not axis.startswith("seed=")])
        )
        cells.append(Cell(name, file, (*common, *(value.override for value in values)), directory / name, seedless))
    names = [cell.name for cell in cells]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: {names.count(name)} cells are called {name}; leave out repeated values")
    for cell in cells:
        config.load(cell.config, cell.words[2:])  # all faults are told before anything runs
    return cells


class _Value(NamedTuple):
    """One value of an axis: as a cell's name has it, and as an override that is read back as the same."""

    name: str
    override: str


def _asked(path: Path) -> dict[str, Any]:
    """The YAML nodes of a sweep's settings."""
    if not path.is_file():
        raise UserError(f"no sweep at {path}; see configs/sweeps/ for examples")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} is not readable as YAML: {error}") from error
    node = parse(decoded(content, f"{path} is not readable as YAML: it"), str(path))
    needs = f"{path} is not a sweep; it needs `config:`, a configuration of sva train or a list of them"
    if not isinstance(node, yaml.MappingNode):
        raise UserError(needs)
    asked = dict(pairs(node, str(path)))
    for key in asked:
        if key not in _KEYS:
            raise UserError(f"{path}: unknown setting {key!r}{nearest(key, _KEYS)}")
    if "config" not in asked:
        raise UserError(needs)
    return {key: node for key, node in asked.items() if key == "config" or not is_null(node)}


def _text(node: Any, name: str, path: Path) -> str:
    return value_of(node, Setting(str, False, False), name, str(path))


def _configs(asked: Mapping[str, Any], path: Path) -> list[str]:
    node = asked["config"]
    found = [_text(one, "config", path) for one in (node.value if isinstance(node, yaml.SequenceNode) else [node])]
    if not found:
        raise UserError(f"{path}: config is an empty list; name a configuration of sva train")
    return found


def _axes(asked: Mapping[str, Any], path: Path) -> dict[str, list[_Value]]:
    """The values of each axis of the grid, by the setting's dotted name."""
    where = f"{path}: grid"
    if "grid" not in asked:
        return {}
    axes = {}
    if not isinstance(asked["grid"], yaml.MappingNode):
        raise UserError(f"{where} must give every setting a list of values, e.g. grid: {{seed: [0, 1, 2]}}")
    for name, node in leaves(pairs(asked["grid"], where), SETTINGS, where):
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise UserError(f"{where} must give every setting a list of values, e.g. grid: {{{name}: [A, B]}}")
        axes[name] = []
        for one in node.value:
            value = value_of(one, SETTINGS[name], name, where)
            axes[name].append(_Value(_called(one, value), override(name, value)))
    return axes


def _called(node: Any, value: Any) -> str:
    """A value in a cell's name: text and numbers as they are written, but 0.010 as 0.01."""
    if isinstance(node, yaml.ScalarNode) and not isinstance(value, bool) and value is not None:
        is_decimal = isinstance(value, float) and "e" not in node.value.lower()
        return json.dumps(value) if is_decimal and "." in node.value else str(node.value)
    return json.dumps(value)


def _overrides(asked: Mapping[str, Any], path: Path) -> list[str]:
    """The overrides of every cell, from a list of name=value or from settings as a configuration has them."""
    where, node = f"{path}: overrides", asked.get("overrides")
    if node is None:
        return []
    if isinstance(node, yaml.MappingNode):
        found = leaves(pairs(node, where), SETTINGS, where)
        return [override(name, value_of(value, SETTINGS[name], name, where)) for name, value in found]
    if not isinstance(node, yaml.SequenceNode) or not all(
        isinstance(one, yaml.ScalarNode) and "=" in str(one.value) for one in node.value
    ):
        raise UserError(f"{where} must be a list of name=value, e.g. overrides: [evaluate.size=240]")
    return [one.value for one in node.value]
