"""The tokens of an answer in LaTeX or plain text."""

import re
import unicodedata
from typing import NamedTuple

from .parts import Unreadable
from .units import UNITS


class Token(NamedTuple):
    """kind: number, letter, command, words (text that is no mathematics), and, or, sign (everything else)."""

    kind: str
    text: str
    spaced: bool = False  # whether a blank stands before it


_CIRCULAR = "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc sinh cosh tanh coth"
FUNCTIONS = frozenset(f"{_CIRCULAR} ln log lg exp max min gcd lcm".split())
_PLAIN_COMMANDS = {name: name for name in ("pi", "sqrt", "infty", "cup")} | {"infinity": "infty", "theta": "theta"}
_TEXT = (
    r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:rm|bf|it|sf)|mbox|hbox|operatorname\*?|boldsymbol|emph)\s*\{([^{}]*)\}"
)
_SPELLED = {
    **{"\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\ne ", "\u222a": "\\cup ", "\u2229": "\\cap "},
    **{"\u2208": "\\in ", "\u00b1": "\\pm ", "\u2205": "\\emptyset ", "\u211d": "\\mathbb{R}", "\u2026": "\\ldots "},
    **{"\u03b1": "\\alpha ", "\u03b2": "\\beta ", "\u03b8": "\\theta ", "\u03bb": "\\lambda ", "\u03c6": "\\phi "},
    **{"\u2044": "/", "\u2212": "-", "\u00d7": "\\times ", "\u00f7": "\\div "},
    **{"\u221e": "\\infty ", "\u03c0": "\\pi ", "\u221a": "\\sqrt", "\u00b7": "\\cdot ", "\u00b0": "^\\circ "},
}
_DRESSING = (
    r"\\(?:left|right)(?![A-Za-z])(?:\.(?!\d))?|\\(?:[bB]igg?[lr]?|displaystyle|textstyle|q?quad)(?![A-Za-z])"
    r"|(?<!\\)\\[!,;:> ]|~|\$"
)
_RAISED = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207f", "0123456789-n")
_LOWERED = {ord("\u2080") + digit: str(digit) for digit in range(10)}
_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_GROUPED = r"\d{1,3}(?: \d{3})+(?![\d.])"
_PLAIN = r"(?:\d+\.\d*|\d+|\.\d+|\.(?=\\overline|\\bar|\\dot))(?:[eE][+-]?\d+(?![\d.]))?"
_THOUSANDS = r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?"


def tokens(text: str, thousands: bool) -> list[Token]:
    """The tokens of a text; with `thousands`, 1,000 is one number, else two with a comma between them.

    Raises:
      Unreadable: a character that no token has, or text in braces that are not closed.
    """
    number = "|".join([*([_THOUSANDS] if thousands else []), _GROUPED, _PLAIN])
    token = re.compile(
        rf"(?P<words>{_TEXT})|(?P<command>\\[A-Za-z]+|\\[{{}}|%])|(?P<number>{number})|(?P<run>[A-Za-z]+)"
        r"|(?P<sign><=|>=|!=|\*\*|[-+*/^_=<>(){}\[\]|!,;:%&']|\\\\)"
    )
    text = _cleaned(text)
    found: list[Token] = []
    place = 0
    while place < len(text):
        start = place
        while place < len(text) and text[place].isspace():
            place += 1
        if place == len(text):
            break
        match = token.match(text, place)
        if match is None:
            raise Unreadable(f"no token at {text[place : place + 10]!r}")
        spaced = place > start
        place = match.end()
        if match["words"] is not None:
            found += _worded(match["words"], spaced)
        elif match["run"] is not None:
            found += _run(match["run"], spaced, found)
        elif match["number"] is not None:
            found.append(Token("number", match["number"].replace(",", "").replace(" ", ""), spaced))
        elif match["command"] is not None:
            found.append(Token("command", match["command"], spaced))
        else:
            found.append(Token("sign", {"**": "^"}.get(match["sign"], match["sign"]), spaced))
    if len(found) > 1 and found[-1].text in ("\\sec", "\\min"):  # 5 sec
        found[-1] = Token("words", found[-1].text[1:], True)
    return found


def _cleaned(text: str) -> str:
    text = re.sub(r"(?<=\d)(?=[\u00bc-\u00be\u2150-\u215e])", " ", text)  # 10 and a half is no 101/2
    text = re.sub(
        r"[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b\u207f]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text
    )
    text = re.sub(r"[\u2080-\u2089]+", lambda m: f"_{{{m[0].translate(_LOWERED)}}}", text)
    text = "".join(_SPELLED.get(c) or unicodedata.normalize("NFKC", c) for c in text)
    text = "".join(_SPELLED.get(c, c) for c in text)
    text = re.sub(r"(?<=\d)(?:\{,\}|,\\!|\\,|\\!)(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"\\([dt])(frac|binom)(?![A-Za-z])", r"\\\2", text).replace("\\lvert", "|").replace("\\rvert", "|")
    text = re.sub(r"\\(?:vert|mid)(?![A-Za-z])", "|", text)
    return re.sub(_DRESSING, " ", text)


def _worded(source: str, spaced: bool) -> list[Token]:
    """What stands in \\text{...}: a connective, a number or a letter, a function, else words."""
    content = re.sub(_TEXT, r"\1", source)
    words = content.strip().strip(",").strip()
    if words.lower() in ("and", "or"):
        return [Token(words.lower(), words, True)]
    if words in FUNCTIONS and (words not in UNITS or not source.startswith(("\\text", "\\mbox", "\\hbox"))):
        return [Token("command", f"\\{words}", spaced)]
    if re.fullmatch(rf"[-+]?(?:{_PLAIN})(?:[,/]\d+)?", words):
        return tokens(words, thousands=True)
    if words.lower() in _NUMBERS:
        return [Token("number", str(_NUMBERS.index(words.lower())), spaced)]
    if re.fullmatch(r"[A-Za-z]", words) and not source.startswith(("\\text", "\\mbox", "\\hbox")):
        return [Token("letter", words, spaced)]
    return [Token("words", words, True)] if words else []


def _run(run: str, spaced: bool, before: list[Token]) -> list[Token]:
    """Letters outside \\text{}: a connective, a function, a unit or words after a number, else a product of letters."""
    if run.lower() in ("and", "or"):
        return [Token(run.lower(), run, spaced)]
    if run in FUNCTIONS:
        return [Token("command", f"\\{run}", spaced)]
    if not before and run.lower() in _NUMBERS:
        return [Token("number", str(_NUMBERS.index(run.lower())), spaced)]
    if run in _PLAIN_COMMANDS:
        return [Token("command", f"\\{_PLAIN_COMMANDS[run]}", spaced)]
    after = before[-1] if before else None
    ends = after is not None and (after.kind in ("number", "words") or after.text in ("}", ")", "\\pi", "\\%", "%"))
    if ends and len(run) > 1 and run.lower() in UNITS:
        return [Token("words", run, True)]
    if len(run) >= 5 or (len(run) == 4 and spaced and ends) or (after is not None and after.kind == "words"):
        return [Token("words", run, True)]
    return [Token("letter", letter, spaced and i == 0) for i, letter in enumerate(run)]
