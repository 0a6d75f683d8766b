"""A dataclass is a command line: each type is read, mistakes are one line, and every option of sva has its help."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from sva.cli.command_line import SETTING, Command, argument, option, parse, parser


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paint:
    """Paints a wall.

    A second coat
    needs a day.
    """

    walls: tuple[str, ...] = argument("which walls", ())
    colour: Literal["red", "blue"] = option("of the paint (default: %(default)s)", "red")
    edge: Literal["red", "blue"] | None = option("of the edges", None)
    coats: int = option("how many")
    sizes: tuple[float, ...] = option("in metres", (1.0,), nargs="+")
    leave_out: tuple[str, ...] = option("may be repeated", ())
    corners: tuple[int, int] | None = option("two", None, metavar=("A", "B"))
    out: Path | None = option("a picture", None, short="-o")
    dry: bool = option("paint nothing", False, excludes="how")
    wet: bool = option("paint all", False, excludes="how")


PARSER = parser([Command("paint", Paint, print)], prog="home")


def read(words):
    return parse(PARSER, ["paint", *words.split()])[1]


def test_words_become_values_of_the_fields_types():
    assert read("--coats 2") == Paint(coats=2)
    assert read("n s --coats 1 --leave-out a --leave-out b --sizes 1 2.5 --corners 3 4 -o x.png --dry --edge blue") == (
        Paint(
            walls=("n", "s"), coats=1, leave_out=("a", "b"), sizes=(1.0, 2.5), corners=(3, 4), out=Path("x.png"),
            dry=True, edge="blue",
        )
    )  # fmt: skip
    assert read("n --coats=1 --col=blue").colour == "blue"  # an option may be shortened


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("n", "required: --coats"),
        ("--coats x", "--coats: invalid int value: 'x'"),
        ("--coats 1 --colour pink", "choose from 'red', 'blue'"),
        ("--coats 1 --edge pink", "choose from 'red', 'blue'"),
        ("--coats 1 --corners 1", "expected 2 arguments"),
        ("--coats 1 --dry --wet", "not allowed with argument --dry"),
        ("--coats 1 --out gs://a/b", "must be on this machine"),
        ("--coats 1 --colours red", "did you mean --colour, --corners, --coats?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, told, capsys):
    with pytest.raises(SystemExit) as stop:
        read(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("home paint: ")
    assert told in line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """Mixes paint."""

    settings: tuple[str, ...] = argument("of the mixer", (), metavar=SETTING)
    dry: bool = option("mix nothing", False)


def test_a_setting_with_dashes_is_told_how_it_is_written(capsys):
    with pytest.raises(SystemExit):
        parse(parser([Command("mix", Mix, print)], prog="home"), ["mix", "--speed", "3"])
    assert "; a setting is written name=value, without dashes (see" in capsys.readouterr().err


def test_help_is_the_docstring_and_each_fields_text(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "Paints a wall. A second coat needs a day." in shown
    assert "of the paint (default: red)" in shown
    with pytest.raises(SystemExit):
        parse(PARSER, ["--help"])
    shown = capsys.readouterr().out
    assert "Paints a wall." in shown
    assert "second" not in shown
