"""Settings as people write them: YAML text, read by the type that each setting has.

YAML guesses a type from a value's looks: `no` is false, 010 is 8, 1:30 is 90, 1e-3 is text. Here the setting decides:
text is taken as it is written, a number as Python reads it, and what could be meant in two ways is refused. Names may
be nested (`train: {lr: 1e-3}`) or dotted (`train.lr: 1e-3`). OmegaConf merges the result and resolves `${...}`.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import yaml

from sva.utils.errors import UserError
from sva.utils.trees import nearest

_TAG = "tag:yaml.org,2002:"
_READ_TAGS = ("str", "int", "float", "bool", "null", "timestamp", "merge", "value", "seq", "map")
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "a list"}


class Setting(NamedTuple):
    """The values that one setting may have."""

    kind: type  # str, int, float, bool, or tuple for a list of texts
    is_optional: bool  # null is a value of it
    has_off: bool  # `false` is null, because null turns it off
    words: tuple[str, ...] = ()  # the only texts that it may be, true and false perhaps among them


def settings_of(config: type, prefix: str = "") -> dict[str, Setting]:
    """Every setting of a dataclass, by its dotted name; a field that holds settings is a dataclass itself.

    A field with the metadata `off` takes false for None; one with `words` takes no other texts than those.
    """
    hints, found = typing.get_type_hints(config), {}
    for field in dataclasses.fields(config):
        kinds = [hints[field.name]]
        if isinstance(kinds[0], types.UnionType):
            kinds = [kind for kind in typing.get_args(kinds[0]) if kind is not types.NoneType]
        name, kind = prefix + field.name, typing.get_origin(kinds[0]) or kinds[0]
        if dataclasses.is_dataclass(kind):
            found |= settings_of(typing.cast(type, kind), f"{name}.")
        else:
            words = field.metadata.get("words", ())
            found[name] = Setting(kind, kinds[0] != hints[field.name], "off" in field.metadata, words)
    return found


def parse(text: str, where: str) -> yaml.Node | None:
    """The tree of a YAML text; None of an empty one.

    Raises:
      UserError: it is not YAML; the line and the fault are named.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark and "\n" in text.strip() else ""
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
        if "cannot start" in str(error.problem) or "undefined alias" in str(error.problem):
            hint = hint or "; put the value in quotes"
        raise UserError(f"{where} is not readable as YAML: {line}{error.problem or error.context}{hint}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        said = str(error).split("\n")[0]
        raise UserError(f"{where} is not readable as YAML: {said}") from error


def pairs(node: yaml.Node, where: str, prefix: str = "") -> list[tuple[str, yaml.Node]]:
    """(name, value) of a mapping's entries, anchors and `<<` followed.

    Raises:
      UserError: something else than a mapping, or a name twice.
    """
    if not isinstance(node, yaml.MappingNode):
        about = f"{prefix[:-1]} holds settings of its own, " if prefix else "it holds "
        found = "a list" if isinstance(node, yaml.SequenceNode) else f"not {node.value!r}" if prefix else "one value"
        raise UserError(f"{where}: {about}{found}; write one `name: value` a line{_example(prefix)}")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name = prefix + str(key.value) if isinstance(key, yaml.ScalarNode) else None
        if name is None:
            raise UserError(f"{where}: line {key.start_mark.line + 1}: a name must be text")
        if name in lines and key.value != "<<":
            raise UserError(f"{where}: {name} is set twice, in lines {lines[name]} and {key.start_mark.line + 1}")
        lines[name] = key.start_mark.line + 1
    try:
        yaml.SafeLoader("").flatten_mapping(node)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: `<<` must be followed by a mapping") from error
    return list({prefix + key.value: value for key, value in node.value}.items())


def _example(prefix: str) -> str:
    return f" below `{prefix[:-1]}:`, or {prefix}NAME: value" if prefix else ""


def leaves(
    entries: Iterable[tuple[str, yaml.Node]], known: Mapping[str, Setting], where: str
) -> Iterator[tuple[str, yaml.Node]]:
    """(dotted name, value) of every setting among `entries`, in order, whether nested or dotted.

    Raises:
      UserError: an unknown name (the nearest ones are named), or one twice.
    """
    seen: set[str] = set()
    for name, node in entries:
        if name in known:
            inner = [(name, node)]
        elif any(other.startswith(f"{name}.") for other in known):
            inner = [] if _is_nothing(node) else leaves(pairs(node, where, f"{name}."), known, where)
        else:
            raise UserError(f"{where}: unknown setting {name!r}{_nearest(name, known)}")
        for full, value in inner:
            if full in seen:
                raise UserError(f"{where}: {full} is set twice, once nested and once with a dot; keep one")
            seen.add(full)
            yield full, value


def is_null(node: yaml.Node) -> bool:
    """Whether a value is null, or nothing at all."""
    return node.tag == f"{_TAG}null"


def _is_nothing(node: yaml.Node) -> bool:
    """Whether nothing follows the colon, as where all of a section is commented out."""
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value == ""


def _nearest(name: str, known: Iterable[str]) -> str:
    """`nearest`, or the settings whose last part is this name's: lr is nearest to train.lr."""
    last = name.strip().rpartition(".")[2].lower()
    same = [other for other in known if other.rpartition(".")[2] == last and other != name]
    return f" (did you mean {', '.join(same)}?)" if same else nearest(name, known)


def value_of(node: yaml.Node, setting: Setting, name: str, where: str) -> Any:
    """The value of one setting: str, int, float, bool, a list of str, or None. Text with `${` stays text.

    Raises:
      UserError: it is of another type, or could be meant in two ways.
    """
    return _read(node, setting, name, where if where.startswith(f"{name}=") else f"{where}: {name}")


def _read(node: yaml.Node, setting: Setting, name: str, where: str) -> Any:
    tag = node.tag.removeprefix(_TAG)
    if tag not in _READ_TAGS:
        raise UserError(f"{where}: the tag {node.tag.replace(_TAG, '!!')} is not read; leave it out")
    if is_null(node) or (setting.has_off and _is_off(node, tag)):
        if setting.is_optional:
            return None
        raise UserError(
            f"{where}: needs {_KINDS[setting.kind]}, and nothing is given; leave {name} out for its default"
        )
    if setting.kind is tuple:
        if not isinstance(node, yaml.SequenceNode):
            raise UserError(f"{where}: needs a list; write {name}: [a, b]")
        one = Setting(str, False, False)
        return [_read(item, one, name, where) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
        hint = f", or put it in quotes: {name}: '...'" if setting.kind is str else ""
        raise UserError(f"{where}: needs {_KINDS[setting.kind]}, not {kind}; give one value{hint}")
    text = str(node.value).strip()
    if "${" in text:
        return text
    if setting.words:
        if text.lower() not in setting.words:
            raise UserError(f"{where}: {text!r} is not one of {', '.join(setting.words)}")
        return text.lower()
    return _text(text, tag, name, where) if setting.kind is str else _number(text, setting, name, where)


def _is_off(node: yaml.Node, tag: str) -> bool:
    """Whether a plain value says that something is turned off."""
    if not isinstance(node, yaml.ScalarNode) or node.style is not None:
        return False
    return str(node.value).lower() == "none" or (tag == "bool" and not _BOOLEANS[str(node.value).lower()])


def _text(text: str, tag: str, name: str, where: str) -> str:
    if tag == "bool":
        raise UserError(f'{where}: needs text, and {text} is true or false in YAML; if it is meant, quote it: "{text}"')
    if text in ("", "???"):  # the second is OmegaConf's for "still to be given"
        raise UserError(
            f"{where}: {'the text is empty' if not text else '??? is not a value'}; leave {name} out for its default"
        )
    return text


def _number(text: str, setting: Setting, name: str, where: str) -> bool | int | float:
    kind, lower = setting.kind, text.lower()
    if kind is bool and lower in _BOOLEANS:
        return _BOOLEANS[lower]
    hint = "; for none write null" if setting.is_optional and lower == "none" else ""
    digits = lower.lstrip("+-")
    if kind is not bool and len(digits) > 1 and digits[0] == "0" and digits[1] in "0123456789_":
        raise UserError(f"{where}: {text} begins with 0, which YAML reads in base eight; leave the 0 out")
    try:
        if kind is int:
            return int(text, 0)
        if kind is float:
            return float(text.replace(".", "") if digits in (".inf", ".nan") else text)
    except ValueError:
        if kind is int and _is_whole(text):
            hint = f"; write {int(float(text))}"
    raise UserError(f"{where}: {text!r} is not {_KINDS[kind]}{hint}")


def _is_whole(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return False


def override(name: str, value: Any) -> str:
    """`name=value` that is read back as this value of any type, quoted where YAML would read it otherwise."""
    if not isinstance(value, str):
        return f"{name}={json.dumps(value, ensure_ascii=False)}"
    try:
        node = parse(value, name)
    except UserError:
        node = None
    is_text = (
        isinstance(node, yaml.ScalarNode)
        and node.style is None
        and node.value == value
        and node.tag.removeprefix(_TAG) not in ("bool", "null")
        and value.lower() != "none"
    )
    return f"{name}={value if is_text else json.dumps(value, ensure_ascii=False)}"
