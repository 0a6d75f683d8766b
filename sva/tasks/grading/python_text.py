"""The stretches of a completion that are Python: blocks of code, transcripts, code among words. Nothing is run."""

import ast
import itertools
import re
import textwrap
import warnings
from collections.abc import Iterator
from typing import NamedTuple

_MOST_STRETCHES, _MOST_CUTS = 20, 6  # tried in one text; lines cut off one of them
_LANGUAGES = ("", "python", "python2", "python3", "py", "py3", "ipython", "pycon")
_UNSEEN = {0x200B: None, 0x2060: None, 0xA0: " "}  # blanks that Python refuses outside of strings
_BEFORE_FENCE = re.compile(r"[ \t]*(?:(?:[-*+>]|\d+[.)])[ \t]+)?")
_CODE_ON_FENCE = re.compile(r"(?:python3?|py)?[ \t]*((?:def|class|import|from|async def|@)\b.*)")
_BLOCK_OF_ONE_LINE = re.compile(r"^[ \t]*```(?:python3?|py)?[ \t]*(\S.*?)```[ \t]*$", re.MULTILINE)
_QUOTED_FENCE = re.compile(r"^[ \t]*>[ \t]?(?:```|~~~)", re.MULTILINE)
_QUOTED = re.compile(r"^[ \t]*>(?!>)[ \t]?", re.MULTILINE)
_WORDS_BEFORE_CODE = re.compile(r"^(?=\S)[^\n#\"'`]{0,60}?(?::|\w>)[ \t]*(?=(?:async )?def \w+\()", re.MULTILINE)
_DEFINITION = r"(?P<sure>def |class |import |from |@|async def )"
_ASSIGNMENT = r"[A-Za-z_][\w.]*(?:\[[^\]\n]*\])?(?:[ \t]*:[ \t]*[\w\[\], .]+)?[ \t]*(?:[-+*/%|&^]|//|\*\*|<<|>>)?=(?!=)"
_CODE_BEGINS = re.compile(rf"^(?P<indent>[ \t]*)(?:{_DEFINITION}|{_ASSIGNMENT})", re.MULTILINE)


class Piece(NamedTuple):
    """A stretch of Python; `is_complete` unless the text stops being Python inside an indented line."""

    source: str
    tree: ast.Module
    is_block: bool
    is_complete: bool = True


def parse(source: str) -> ast.Module | int:
    """The syntax tree, or the number of the line where it is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the program's own making, such as "\d"
        try:
            return ast.parse(source)
        except SyntaxError as error:
            return error.lineno or 1
        except (ValueError, RecursionError, MemoryError):
            return 1


def pieces(text: str) -> list[Piece]:
    """All stretches of Python in a text, in its order."""
    found: list[Piece] = []
    text = _QUOTED.sub("", text) if _QUOTED_FENCE.search(text) else text
    for content, is_block in _blocks(_BLOCK_OF_ONE_LINE.sub(r"```python\n\1\n```", text)):
        if not is_block:
            found += _stretches(_WORDS_BEFORE_CODE.sub("", content), False)
            continue
        source = _typed(dedented(content.replace("\ufeff", "")))
        tree = parse(source)
        if isinstance(tree, int) and source.translate(_UNSEEN) != source:
            source = source.translate(_UNSEEN)
            tree = parse(source)
        found += _stretches(source, True) if isinstance(tree, int) else [Piece(source, tree, True)]
    return found


def dedented(text: str) -> str:
    """The text without the indent of its first line, or of all its lines where that is less."""
    first = _first_line(text)
    if not first.startswith((" ", "\t")):
        return text  # as it stands: blank lines in its strings keep their blanks
    text = textwrap.dedent(text)
    first = _first_line(text)
    indent = first[: len(first) - len(first.lstrip())]
    return "\n".join(line.removeprefix(indent) for line in text.split("\n"))


def _first_line(text: str) -> str:
    return next((line for line in text.split("\n") if line.strip()), "")


def code_at(text: str) -> Piece | None:
    """The lines from the beginning of `text` up to where it stops being Python; None where that is at once."""
    lines = text.split("\n")
    kept = lines
    for _ in range(_MOST_CUTS):
        tree = parse("\n".join(kept))
        if not isinstance(tree, int):
            is_complete = len(kept) == len(lines) or not lines[len(kept)].startswith((" ", "\t"))
            return Piece("\n".join(kept), tree, False, is_complete) if tree.body else None
        kept = kept[: min(tree, len(kept)) - 1]
    return None


def _opening(line: str) -> tuple[str, str] | None:
    """The fence with which a line opens a block, and what stands behind it."""
    for mark in ("```", "~~~"):
        before, found, info = line.rpartition(mark)
        if found:
            bare = before.rstrip(mark[0])
            is_alone = _BEFORE_FENCE.fullmatch(bare) is not None
            if is_alone or (mark not in bare and info.strip().lower() in _LANGUAGES[1:]):
                return mark + before[len(bare) :], info.strip()
    return None


def _closing(lines: list[str], start: int, fence: str) -> int:
    """The number of the line that ends a block which begins at `start`.

    A fence inside a text in three quotes ends it only where no other does.
    """
    in_quotes, first = [0, 0], None
    for number in range(start, len(lines)):
        line = lines[number].strip()
        if line.startswith(fence) or (line.endswith(fence) and fence[0] == "`"):
            first = number if first is None else first
            if not any(count % 2 for count in in_quotes):
                return number
        in_quotes = [count + line.count(mark) for count, mark in zip(in_quotes, ('"""', "'''"), strict=True)]
    return len(lines) if first is None else first


def _blocks(text: str) -> Iterator[tuple[str, bool]]:
    """The text in parts: (content, whether it is a block that may be Python)."""
    lines, number, words = text.split("\n"), 0, []
    while number < len(lines):
        opened = _opening(lines[number])
        if opened is None:
            words.append(lines[number])
            number += 1
            continue
        fence, info = opened
        end = _closing(lines, number + 1, fence)
        code = _CODE_ON_FENCE.match(info)
        content = [code[1]] if code else []
        content += lines[number + 1 : end]
        last = lines[end].strip() if end < len(lines) else ""
        if not last.startswith(fence):
            content.append(lines[end].rstrip().rstrip(fence[0]) if last else "")
        language = re.match(r"[{. \t]*(\w*)", info)
        if code or (language and language[1].lower() in _LANGUAGES):
            yield "\n".join(words), False
            yield "\n".join(content), True
            words = []
        else:
            words += content
        opens_next = last.startswith(fence) and last.strip(fence[0]) != ""
        number = end if opens_next else end + 1
    yield "\n".join(words), False


def _typed(source: str) -> str:
    """The lines typed in a transcript of an interpreter; other sources as they are."""
    if not source.lstrip().startswith(">>>"):
        return source
    lines = [line.lstrip() for line in source.split("\n")]
    return "\n".join(line[4:] for line in lines if line.startswith((">>>", "...")))


def _stretches(text: str, is_block: bool) -> Iterator[Piece]:
    """Code that stands among words, or in a block that is not Python throughout."""
    position, num_tries = 0, 0
    while num_tries < _MOST_STRETCHES and (begins := _CODE_BEGINS.search(text, position)):
        position = text.find("\n", begins.end()) + 1 or len(text)
        if not begins["sure"] and num_tries >= _MOST_STRETCHES // 2:
            continue
        num_tries += 1
        indent, rest = begins["indent"], text[begins.start() :]
        if indent:
            lines = rest.split("\n")
            own = itertools.takewhile(lambda line, i=indent: not line.strip() or line.startswith(i), lines)
            rest = "\n".join(line.removeprefix(indent) for line in own)
        if piece := code_at(rest):
            yield piece._replace(is_block=is_block)
            num_lines = piece.source.count("\n") + 1
            passed = text[begins.start() :].split("\n", num_lines)[:num_lines]
            position = max(position, begins.start() + sum(len(line) + 1 for line in passed))
