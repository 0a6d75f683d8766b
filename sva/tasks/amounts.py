"""The numbers that a text names, and which of them a worked solution ends in. Nothing here evaluates text."""

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from sva.tasks.answers import conclusion

_MOST_DIGITS = 40
_STATEMENTS = 20  # of what the answer is are read at most, from the last

_UNITS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_WORDS = {word: i for i, word in enumerate(_UNITS)} | {word: 10 * i for i, word in enumerate(_TENS, start=2)}
_SCALES = {"thousand": 10**3, "k": 10**3, "million": 10**6, "billion": 10**9}
_SPELLED_WORD = "|".join((*_WORDS, "hundred", "thousand", "million"))

_AMOUNT = re.compile(
    r"(?<![\w.^])(?<!\^\{)(?P<negative>(?:negative|minus) )?(?:(?<![)\]])(?P<minus>-))?(?:US)?[$€£]? ?(?P<inner>-)?"
    r"(?P<value>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?::00\b)?(?:/(?P<divisor>\d+))?"
    r"(?!\d|(?:st|nd|rd|th)\b)(?:\s?(?P<scale>(?:thousand|million|billion|k)\b))?"
    rf"|\b(?P<spelled_negative>(?:negative|minus) )?(?P<spelled>(?:{_SPELLED_WORD})"
    rf"(?:(?:-| and | )(?:{_SPELLED_WORD}))*)\b",
    re.IGNORECASE,
)


class Amount(NamedTuple):
    """A number in a text: its canonical spelling ("-1080", "3.5", "1/3"), where it stands, and whether in words."""

    value: str
    start: int
    end: int
    in_words: bool = False


def amounts(text: str) -> list[Amount]:
    """The numbers in a text, in their order. Signs, thousands, fractions, currencies and "million" are understood."""
    found = []
    for match in _AMOUNT.finditer(text):
        if len(match[0]) > _MOST_DIGITS and not match["spelled"]:
            continue
        if match["spelled"]:
            value = Fraction(_spelled(match["spelled"].lower()))
        else:
            value = Fraction(match["value"].replace(",", "")) * _SCALES.get((match["scale"] or "").lower(), 1)
            value /= int(match["divisor"] or 1) or 1
        minus = match["negative"] or match["minus"] or match["inner"] or match["spelled_negative"]
        found.append(Amount(canonical(-value if minus else value), match.start(), match.end(), bool(match["spelled"])))
    return found


def canonical(value: Fraction) -> str:
    """A decimal where it is exact and short, else a fraction in lowest terms."""
    decimal = Decimal(value.numerator) / Decimal(value.denominator)
    return f"{decimal.normalize():f}" if Fraction(decimal) == value else str(value)


def _spelled(words: str) -> int:
    """ "one hundred and twenty-four" is 124."""
    total = part = 0
    for word in re.findall(r"[a-z]+", words):
        if word == "hundred":
            part = (part or 1) * 100
        elif word in _SCALES:
            total, part = total + (part or 1) * _SCALES[word], 0
        elif word != "and":
            part += _WORDS[word]
    return total + part


# --- which of them a solution ends in ---

_ANSWER_IS = re.compile(
    r"\banswer\b[^\n.]{0,100}?(?:\b(?:is|are|was|be)\b|[:=])(?! not\b)\s*|\banswer\s+[-\u2013]\s+"
    r"|\b(?:ans\b[.:]?|result:)\s*",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"\.(?:\s|$)|\n|;|\b(?:because|since)\b", re.IGNORECASE)
# A number after one of these says how many, how long or for whom, rather than what came out.
_DETERMINED = r"(?:all |only |just |about )?(?:the |these |those |his |her |their |your |a |an )?(?:remaining |other )?"
_RESULT = r"(?!(?:a|an|the|about|only|just|exactly|pay|spend|earn|save|get|have|be|give|sell|need|work) )"
_ASIDE = re.compile(
    r"\b(?:(?:for|per|in|counting|across|among|after|within|during|each of|out of|over|every|at|on|than|from"
    r"|(?:at|by) the end of) "
    rf"{_DETERMINED}|of (?:the|these|those|his|her|their) (?:remaining |other )?|the other |giving away "
    rf"|to {_RESULT}[a-z]+ {_DETERMINED})"
    r"(?:next |last |first )?[$€£]?\s*$",
    re.IGNORECASE,
)
# Nor is what follows one of these after a number: "42 pages if ... 84 pages", "$990, which includes $50".
_SUBORDINATE = re.compile(r",? (?:which includ|if\b|including\b)", re.IGNORECASE)
_THEREFORE = re.compile(r"\b(?:so|then|thus|therefore)\b", re.IGNORECASE)  # leads back to the main clause
_NUMBERING = re.compile(r"\s*(?:(?:step|part|case|day|example)\b|\d+[.)]\s+[A-Za-z])", re.IGNORECASE)
_SPACES = str.maketrans(dict.fromkeys("\u00a0\u2009\u202f", "\u2009"))


def final_number(completion: str) -> str | None:
    """The number that a worked solution ends in, canonically spelled, else None.

    In this order: after the last "####"; in the last \\boxed{}; in the last sentence that says what the answer is;
    the last number of the last sentence that has one, what comes after its "=" before the rest, and asides such as
    "for 3 days" after both. What follows a new question is not read, and of "18 or 20" neither.
    """
    text = _plain(conclusion(completion))
    marked = text.rpartition("####")
    if marked[1]:
        line = marked[2].lstrip().partition("\n")[0].replace("*", "")
        if not _NUMBERING.match(line) and (number := _named(line)):
            return number
    boxes = re.findall(r"\\boxed\s?\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    if boxes and (number := _named(boxes[-1])):
        return number
    bold = _bold(text)
    text = text.replace("*", " ") if "**" in text else text
    end = max((amount.end for amount in amounts(text)), default=-1)  # behind the last number none is stated
    for match in reversed([match for match in _ANSWER_IS.finditer(text) if match.end() < end][-_STATEMENTS:]):
        clause = _CLAUSE_END.split(text[match.end() :].lstrip(), maxsplit=1)[0]
        if _two(clause):
            return None
        if number := _named(clause):
            return number
    return bold or _last(text)


def _plain(text: str) -> str:
    text = text.translate(_SPACES)
    text = unicodedata.normalize("NFKC", re.sub(r"(?<=\d)\u2009(?=\d{3}\b)", ",", text)).replace("\u2212", "-")
    text = re.sub(r"(?<=\d)(?:\\,|\{,\})(?=\d{3})", ",", text)
    text = re.sub(r"(?<=[$€£])\d{1,3}(?: \d{3})+(?![\d,])", lambda match: match[0].replace(" ", ""), text)
    text = re.sub(r"\bnot \\?\$?\d[\d,]*(?:\.\d+)?\b", "", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=\d) ?(?=\\[dt]?frac)", " ", text)
    text = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"(?<![\w.,/])(\d{1,4}) (\d{1,3})/(\d{1,3})(?![\d/])", _mixed, text)
    return re.sub(r"\\[,!; ]|\\(?=[$%])|\\text\{\s*\\?\$\s*\}|`", "", text)


def _mixed(match: re.Match[str]) -> str:
    """ "2 1/2" as "5/2"."""
    whole, numerator, divisor = map(int, match.groups())
    return f"{whole * divisor + numerator}/{divisor}"


def _two(clause: str) -> bool:
    """Whether a clause leaves open which of two numbers it means."""
    found = amounts(clause)
    return len(found) > 1 and re.fullmatch(r",? or ", clause[found[0].end : found[1].start]) is not None


def _named(clause: str) -> str | None:
    """The number that a clause names: what it begins with after its last "=", else as `_last`."""
    part = clause.rpartition("=")[2]
    found = amounts(part) or amounts(clause)
    if not found:
        return None
    before = part[: found[0].start]
    if re.fullmatch(r"[\s$€£(\[{\\A-Za-z]{0,12}", before) and not _ASIDE.search(before):
        return found[0].value
    return _strong(part, found).value


def _strong(text: str, found: list[Amount]) -> Amount:
    """The last of the numbers that is no aside, else the first."""
    digits = [amount for amount in found if not amount.in_words] or found
    back = max((match.end() for match in _THEREFORE.finditer(text)), default=0)
    if aside := _SUBORDINATE.search(text, max(digits[0].end, back)):
        digits = [amount for amount in digits if amount.end <= aside.start()]
    strong = [amount for amount in digits if not _is_aside(text, amount)]
    return strong[-1] if strong else digits[0]


def _is_aside(text: str, amount: Amount) -> bool:
    share = "/" in text[amount.start : amount.end] and text.startswith(" of ", amount.end)  # "2/3 of the pizza"
    return share or _ASIDE.search(text[max(0, amount.start - 40) : amount.start]) is not None


def _last(text: str) -> str | None:
    """The number that the last sentence with one ends in; None where it names two or asks for one."""
    spoken = re.sub(r"\([^()\n]*\s[^()\n]*\)", " ", text)
    for part in (spoken, text):
        for sentence in reversed(re.split(r"(?<=[.!?])\s+|\n+", part)):
            tail = sentence.rpartition("=")[2]
            found = amounts(tail) or amounts(sentence)
            if found:
                return None if _two(sentence) else _strong(tail if amounts(tail) else sentence, found).value
    return None


def _bold(text: str) -> str | None:
    """The only number in bold type of the last line that has numbers, if there is exactly one."""
    for line in reversed(text.splitlines()):
        if amounts(line.replace("*", " ")):
            parts = [part for part in re.findall(r"\*\*([^*\n]+)\*\*", line) if amounts(part)]
            found = amounts(parts[0]) if len(parts) == 1 and not _NUMBERING.match(parts[0]) else []
            return found[0].value if len(found) == 1 else None
    return None
