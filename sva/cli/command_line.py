"""A command's line from a frozen dataclass: the fields are its options, the docstring is its help.

A field's type says how its word is read: `bool` is a flag, `Literal` a choice, `Path` a path on this machine,
`X | None` an option without a default, `tuple[X, ...]` one that may be repeated, `tuple[X, X]` one of two words.
"""

import argparse
import collections
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sva.utils.errors import UserError
from sva.utils.remote import local_path
from sva.utils.trees import nearest

SETTING = "name=value"  # the metavar of a field that takes a configuration's settings


class Command(NamedTuple):
    """A command or an action: its word, the dataclass of its options, and what it does with them.

    `run` gives the exit code; None is 0.
    """

    name: str
    options: type
    run: Callable[[Any], int | None]
    epilog: str = ""  # text below the options, printed as it stands
    rest: str = ""  # the field that takes all words as they stand, but for a first --help; none by default


class Group(NamedTuple):
    """A command whose first word is one of several actions."""

    name: str
    text: str
    actions: tuple[Command, ...]


@dataclasses.dataclass(frozen=True)
class _About:
    """What a field's type does not say of an option."""

    text: str
    is_positional: bool
    short: str | None = None
    metavar: str | tuple[str, ...] | None = None
    read: Callable[[str], Any] | None = None
    nargs: str | None = None
    excludes: str | None = None


def argument(text: str, default: Any = dataclasses.MISSING, **about: Any) -> Any:
    """A dataclass field that is a word by itself; with a default it may be left out. Settings as in `option`."""
    return dataclasses.field(default=default, metadata={"about": _About(text, True, **about)})


def option(text: str, default: Any = dataclasses.MISSING, **about: Any) -> Any:
    """A dataclass field that is an option `--name`; without a default it is required.

    Args:
      text: its help; `%(default)s` stands for the default.
      about: `short`, another spelling such as -o; `metavar`, what help calls its word; `read`, str to value;
        `nargs`, "+" for several words behind one option; `excludes`, one word that options share of which at most one
        may be given.
    """
    return dataclasses.field(default=default, metadata={"about": _About(text, False, **about)})


class _Parser(argparse.ArgumentParser):
    """A parser that answers a mistake in one line, without the usage of all options."""

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser(commands: Sequence[Command | Group], **settings: Any) -> argparse.ArgumentParser:
    """The parser of a program that has these commands; `parse` reads with it."""
    top = _Parser(**settings)
    subs = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in commands:
        if isinstance(command, Command):
            _add(subs, command)
            continue
        group = subs.add_parser(command.name, help=command.text, description=command.text)
        actions = group.add_subparsers(title="actions", required=True, metavar="ACTION")
        for action in command.actions:
            _add(actions, action)
    return top


def parse(top: argparse.ArgumentParser, words: Sequence[str] | None) -> tuple[Command, Any]:
    """(the command, its options) that the words ask for, by default the process's.

    Raises:
      SystemExit: the words are not understood, which stderr says then (status 2), or ask for help (status 0).
    """
    found, unknown = top.parse_known_args(words)
    command, sub = found.command_, found.parser_
    if unknown and not command.rest:
        known = [name for action in sub._actions for name in action.option_strings]
        hint = nearest(unknown[0].partition("=")[0], known) if unknown[0].startswith("-") else ""
        if hint and any(field.metadata["about"].metavar == SETTING for field in dataclasses.fields(command.options)):
            hint += f"; a setting is written {SETTING}, without dashes"
        sub.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    values = {}
    if command.rest:
        if unknown[:1] in ([], ["-h"], ["--help"]):
            sub.print_help()
            sub.exit()
        return command, command.options(**{command.rest: tuple(unknown)})
    for field in dataclasses.fields(command.options):
        value = getattr(found, field.name)
        if isinstance(field.default, tuple) and value is None:
            value = field.default
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return command, command.options(**values)


def _add(commands: Any, command: Command) -> None:
    """Adds one command; the first paragraph of its dataclass' docstring stands in the overview too."""
    paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(command.options.__doc__ or "").split("\n\n")]
    settings: dict[str, Any] = {}
    if command.epilog:
        settings = {"epilog": command.epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}
    settings["add_help"] = not command.rest
    sub = commands.add_parser(command.name, help=paragraphs[0], description=" ".join(paragraphs), **settings)
    sub.set_defaults(command_=command, parser_=sub)
    if command.rest:
        return
    hints = typing.get_type_hints(command.options)
    exclusive = collections.defaultdict(sub.add_mutually_exclusive_group)
    for field in dataclasses.fields(command.options):
        about: _About = field.metadata["about"]
        names, how = _spelling(field, hints[field.name], about)
        (exclusive[about.excludes] if about.excludes else sub).add_argument(*names, **how)


def _spelling(field: "dataclasses.Field[Any]", hint: Any, about: _About) -> tuple[list[str], dict[str, Any]]:
    """The arguments with which argparse takes a field."""
    is_required = field.default is dataclasses.MISSING
    how = _reading(hint, about) | {"help": about.text}
    if about.metavar:
        how["metavar"] = about.metavar
    if how.get("action") == "append" and about.is_positional:
        del how["action"]
        how["nargs"] = "*"
    elif about.is_positional and not is_required:
        how["nargs"] = "?"
    if not is_required and how.get("action") != "append":
        how["default"] = field.default
    if about.is_positional:
        return [field.name], how
    name = f"--{field.name.replace('_', '-')}"
    return [about.short, name] if about.short else [name], how | ({"required": True} if is_required else {})


def _reading(hint: Any, about: _About) -> dict[str, Any]:
    """How argparse reads words as values of this type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # the second where one of the two is a Literal
        (kind,) = (kind for kind in inner if kind is not types.NoneType)
        return _reading(kind, about)
    if origin is tuple:
        one = _reading(inner[0], about)
        if inner[-1] is not Ellipsis:
            return one | {"nargs": len(inner)}
        return one | ({"nargs": about.nargs} if about.nargs else {"action": "append"})
    if origin is typing.Literal:
        return {"choices": list(inner)}
    if hint is bool:
        return {"action": "store_true"}
    return {"type": _reader(about.read or (_here if hint is Path else hint))}


def _here(text: str) -> Path:
    """The path, which must be on this machine."""
    return local_path(text, "this file or directory")


def _reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read` with its UserError as argparse passes it on, which would hide what another ValueError says."""
    if read in (int, float, str):
        return read

    def checked(text: str) -> Any:
        try:
            return read(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return checked
