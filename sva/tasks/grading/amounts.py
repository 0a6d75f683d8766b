"""Which number a worked solution ends in. Nothing here evaluates text."""

import itertools
import re
from collections.abc import Sequence

from sva.tasks.grading.answers import conclusion
from sva.tasks.grading.numerals import Amount, amounts, fold

_STATEMENTS = 20  # of what the answer is are read at most, from the last

_ANSWER_IS = re.compile(
    r"\banswer\b[^\n.]{0,100}?(?:\b(?:is|are|was|be)\b|[:=])"
    r"(?! (?:not|correct|right|wrong|incorrect|clear|based)\b)\s*|\banswer\s+[-\u2013]\s+"
    r"|\b(?:ans\b[.:]?|result:)\s*",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"[.?](?:\s|$)|\n|;|\b(?:because|since)\b", re.IGNORECASE)
# A number after one of these says how many, how long or for whom, rather than what came out.
_DETERMINED = r"(?:all |only |just |about )?(?:the |these |those |his |her |their |your |a |an )?(?:remaining |other )?"
_RESULT = r"(?!(?:a|an|the|about|only|just|exactly|pay|spend|earn|save|get|have|be|give|sell|need|work) )"
_ASIDE = re.compile(
    r"\b(?:(?:for|per|in|counting|across|among|after|within|during|each of|out of|over|every|at|on|than|from"
    r"|(?:at|by) the end of) "
    rf"{_DETERMINED}|of (?:the|these|those|his|her|their) (?:remaining |other )?|the other |giving away "
    r"|(?:after|before|by|from|for|of|without) [a-z]+ing (?:away |back |out |up |off |in |down )?"
    rf"{_DETERMINED}(?:[$€£]?\d[\d.,]* and )?"
    rf"|to {_RESULT}[a-z]+ {_DETERMINED})"
    r"(?:next |last |first )?[$€£]?\s*$",
    re.IGNORECASE,
)
# Nor is what follows one of these after a number: "42 pages if ... 84 pages", "$990, which includes $50".
_SUBORDINATE = re.compile(
    r",? (?:which includ|if\b|including\b|(?:out )?of (?:which|whom)\b"
    r"|which is (?:about |only |just )?[$€£]?\d[\d.,/]*%? (?:of|more|less|fewer|times)\b)",
    re.IGNORECASE,
)
_REASON = re.compile(r"\bbecause\b", re.IGNORECASE)  # unless a comma leads back to the main clause
# Nor what follows one of these, if a result comes before it and only known numbers behind: "$686: $560 plus $126".
_DETAILS = re.compile(r"[:;]\s|\s[-\u2013\u2014]\s|,? with\b", re.IGNORECASE)
_THEREFORE = re.compile(r"\b(?:so|then|thus|therefore)\b", re.IGNORECASE)  # leads back to the main clause
_NUMBERING = re.compile(r"\s*(?:(?:step|part|case|day|example)\b|\d+[.)]\s+[A-Za-z])", re.IGNORECASE)
# Between two numbers, of which neither then is the answer alone: a choice, a range, a sum, a ratio.
_OPEN = re.compile(
    r",? or | to | and |,|\s*[-\u2013\u2014+*\u00d7\u00b7\u00f7/:~&]\s*|\(|\s+(?:x|plus|minus|times)\s+|\s+",
    re.IGNORECASE,
)
_CHOICE = re.compile(r",? or (?:maybe |perhaps |possibly )?", re.IGNORECASE)
_FORMULA = re.compile(r"\s*[+*\u00d7\u00b7\u00f7]\s*|\s+[-\u2013x]\s+|\s*[-\u2013]\s*", re.IGNORECASE)
_HALF = re.compile(
    r"(?:an? |one |exactly |about )?half\b"
    r"(?:(?P<dozen> (?:an? )?dozen)| (?:an? )?(?P<scale>thousand|million|billion)\b)?",
    re.IGNORECASE,
)
# Sentences that repeat numbers behind the answer: "This is because she sells 9", "You can check it: ...".
_AFTERWORD = re.compile(
    r"\W*(?:(?:this|that|it) (?:is|was) because|(?:you|we|i) (?:can|could) (?:also )?(?:check|verify))\b", re.IGNORECASE
)
# Nor do these replace an answer: "That is about 15.7 miles a day", "To check: 3 x 12 = 36".
_REMARK = re.compile(
    r"\W*(?:on average|(?:(?:this|that|it|which)(?: is|'s)|that would be) (?:just |only |a little |slightly |well )?"
    r"(?:about|approximately|roughly|around|nearly|almost|over|under|an average of|equivalent to|(?:more|less) than))\b"
    r"(?![^\n]*(?:=|\b(?:so|therefore|thus|hence)\b))",
    re.IGNORECASE,
)
_CHECK = re.compile(
    r"\W*(?:(?:to|let's|let us|let me|we can|you can|we) )?(?:(?:also|quickly) )?"
    r"(?:(?:double|cross)[- ])?(?:check|checking|verify|verification)\b",
    re.IGNORECASE,
)
_CONCLUDES = re.compile(
    r"\W*(?:so|therefore|thus|hence|in total|altogether|in conclusion|overall|finally)\b", re.IGNORECASE
)
_BULLET = re.compile(r"\s*\n\s*[-\u2022]\s+")


def final_number(completion: str) -> str | None:
    """The number that a worked solution ends in, canonically spelled, else None.

    In this order: after the last "####", unless it is the heading of a part that goes on; in the last \\boxed{}; in the
    last sentence that says what the answer is; the last number of the last sentence that has one, what comes after its
    "=" before the rest, and asides such as "for 3 days" after both. What follows a new question is not read, nor are
    closing pleasantries. There is none where that number is understood in part only ("1,08", "10^x", half past three),
    and none in "18 or 20" and "10-15".
    """
    text = _plain(conclusion(completion))
    marked = text.rpartition("####")
    if marked[1]:
        line, _, rest = _unstressed(marked[2], "").lstrip().partition("\n")
        if not _is_heading(line, rest) and (number := _named(line)):
            return number.value
    boxes = re.findall(r"\\boxed\s?\{((?:[^{}]|\{[^{}]*\})*)\}", text)
    if boxes and (number := _named(boxes[-1])):
        return number.value
    bold = _bold(text)
    text = _unstressed(text)
    last = max((amount.end for amount in amounts(text)), default=-1)  # behind the last number none is stated
    said = [match for match in _ANSWER_IS.finditer(text) if match.end() < last or _HALF.match(text, match.end())]
    weak: Amount | None = None
    for match in reversed(said[-_STATEMENTS:]):
        rest = _BULLET.sub("", text[match.end() :], count=1).lstrip()
        end = _CLAUSE_END.search(rest)
        clause = rest[: end.start() if end else None]
        if (end and end[0].startswith("?")) or not (number := _named(clause)):
            continue
        if not _is_aside(clause.rpartition("=")[2], number):
            return number.value
        weak = weak or number
    number = weak or bold or _last(text)
    return number and number.value


def _is_heading(line: str, rest: str) -> bool:
    """Whether what follows "####" is a heading: numbered, or of more than a number with a result in what follows it."""
    if _NUMBERING.match(line):
        return True
    is_stated = re.fullmatch(r"[^\s\d]?-?[^\s\d]?\d[\d.,/]*", line.strip()) or "answer" in line.lower()
    return not is_stated and bool(_ANSWER_IS.search(rest) or re.search(r"=\s*[$€£]?-?\d", rest))


def _plain(text: str) -> str:
    """`text` with LaTeX's ways to write a number spelled as in print, and without the numbers that it denies."""
    text = fold(text.replace("\u00ba", "\u00b0")).replace("\u2212", "-")
    text = re.sub(
        r"(?<![\w)\]\s])[\u2013\u2014](?=[$\u20ac\u00a3]?\d)|(?<=\s)[\u2013\u2014](?=[$\u20ac\u00a3]?\d)", "-", text
    )
    text = re.sub(r"(?<=\d)(?:\\,|\{,\})(?=\d)", ",", text)
    text = re.sub(r"(?<=\d) ?(?=\\[dt]?frac)", " ", text)
    text = re.sub(r"\\[dt]?frac(?:\{(-?\d+)\}|(\d))(?:\{(\d+)\}|(\d))", r"\1\2/\3\4", text)
    text = re.sub(r"\\times\b ?", "\u00d7", re.sub(r"\\cdot\b ?", "\u00b7", text))
    text = re.sub(r"\\[,!; ]|\\(?=[$%])|\\text\{\s*\\?\$\s*\}|`|\bRs\.(?=\d)", "", text)
    return _without_denied(text) if re.search(r"\bnot\b", text, re.IGNORECASE) else text


def _unstressed(text: str, instead: str = " ") -> str:
    """`text` without the asterisks of bold type; those of "10**3" are kept."""
    return re.sub(r"(?<![\w)*])\*{2,3}|\*{2,3}(?![\d({*-]|[a-z]\b)", instead, text)


def _without_denied(text: str) -> str:
    parts = []
    start = 0
    for amount in amounts(text):
        if not amount.in_words and (denial := re.search(r"\bnot \\?$", text[start : amount.start][-6:], re.IGNORECASE)):
            parts.append(text[start : amount.start - len(denial[0])])
            start = amount.end
    return "".join(parts) + text[start:]


def _is_open(text: str, found: Sequence[Amount], place: int, between: re.Pattern[str]) -> bool:
    """Whether one of the numbers beside `found[place]` leaves open which of the two is meant."""
    pairs = [(found[i], found[i + 1]) for i in (place - 1, place) if i >= 0 and i + 1 < len(found)]
    return any(between.fullmatch(text, first.end, second.start) for first, second in pairs)


def _named(clause: str) -> Amount | None:
    """The number that a clause names: what it begins with after its last "=", else as `_last`; None without numbers."""
    part = clause.rpartition("=")[2]
    part = part if amounts(part) else clause
    found = amounts(part)
    if half := _HALF.match(part.lstrip()):
        scaled = {"thousand": "500", "million": "500000", "billion": "500000000"}
        is_alone = not [amount for amount in found if not amount.in_words]
        value = scaled.get((half["scale"] or "").lower(), "0.5") if is_alone and not half["dozen"] else None
        return Amount(value, 0, half.end(), True)
    if not found:
        return None
    before = part[: found[0].start]
    if re.fullmatch(r"[\s$€£(\[{\\A-Za-z]{0,12}", before) and not _ASIDE.search(before):
        is_one = not _is_open(part, found, 0, _OPEN) and not _is_list(part, found)
        return found[0] if is_one else found[0]._replace(value=None)
    return _strong(part, found)


def _is_list(text: str, found: Sequence[Amount]) -> bool:
    """Whether a text is several numbers and no more: "3, 5 and 7"."""
    gaps = [text[first.end : second.start] for first, second in itertools.pairwise(found)]
    return (
        bool(gaps)
        and all(re.fullmatch(r",? and |, ", gap) for gap in gaps)
        and not text[found[-1].end :].strip(" .)}\n")
    )


def _strong(text: str, found: Sequence[Amount]) -> Amount:
    """The last of the numbers that is no aside, else the first; without a value where it is a part of a formula."""
    digits = [amount for amount in found if not amount.in_words] or found
    back = max(digits[0].end, max((match.end() for match in _THEREFORE.finditer(text)), default=0))
    if aside := _SUBORDINATE.search(text, back) or _REASON.search(text, max(back, text.rfind(","))):
        digits = [amount for amount in digits if amount.end <= aside.start()]
    strong = [amount for amount in digits if not _is_aside(text, amount)]
    chosen = strong[-1] if strong else digits[0]
    between = _CHOICE if re.search(r"\bbetween\b", text, re.IGNORECASE) else _FORMULA
    return chosen._replace(value=None) if _is_open(text, found, found.index(chosen), between) else chosen


def _is_aside(text: str, amount: Amount) -> bool:
    share = "/" in text[amount.start : amount.end] and text.startswith(" of ", amount.end)  # "2/3 of the pizza"
    share = share or text.startswith((" of which", " of whom"), amount.end)
    return share or _ASIDE.search(text[max(0, amount.start - 40) : amount.start]) is not None


def _last(text: str) -> Amount | None:
    """The number that the last sentence with one ends in; without a value where it names two or asks for one."""
    spoken = re.sub(r"\([^()\n]*\)", lambda match: " " if re.search(r"\s", match[0]) else match[0], text)
    for part in (spoken, text):
        sentences = [(s, amounts(s)) for s in re.split(r"(?<=[.!?])\s+|\n+", part)]
        numbered = [(sentence, found) for sentence, found in sentences if found]
        if numbered:
            place = _concluding(numbered)
            sentence, found = numbered[place]
            if _is_open(sentence, found, 0, _CHOICE):
                return found[0]._replace(value=None)
            if "=" not in sentence and (result := _detailed(sentence, numbered[:place])):
                return result
            tail = sentence.rpartition("=")[2]
            return _strong(tail, amounts(tail)) if amounts(tail) else _strong(sentence, found)
    return None


def _detailed(sentence: str, before: Sequence[tuple[str, Sequence[Amount]]]) -> Amount | None:
    """The result that a sentence repeats where only details of it follow, in numbers known from before."""
    result = _computed(before)
    found = amounts(sentence)
    first = next((amount for amount in found if not _is_aside(sentence, amount)), None)
    if result is None or first is None or first.value != result:
        return None
    behind = [amount for amount in found if amount.start > first.start]
    known = {amount.value for _, numbers in before for amount in numbers}
    if behind and {amount.value for amount in behind} <= known:
        return first if _DETAILS.search(sentence, first.end, behind[0].start) else None
    return None


def _computed(sentences: Sequence[tuple[str, Sequence[Amount]]]) -> str | None:
    """The value of the last number that stands alone behind an "="."""
    for sentence, _ in reversed(sentences):
        tail = sentence.rpartition("=")
        if tail[1] and (numbers := amounts(tail[2])):
            return numbers[0].value if len(numbers) == 1 else None
    return None


def _states(numbered: Sequence[tuple[str, Sequence[Amount]]], place: int) -> bool:
    """Whether a sentence states the answer: it concludes, or it says in words what was computed before it."""
    sentence, found = numbered[place]
    if _CONCLUDES.match(sentence):
        return True
    is_said = "=" not in sentence and not _REMARK.match(sentence)
    return is_said and _strong(sentence, found).value == (_computed(numbered[max(0, place - 4) : place]) or "")


def _concluding(numbered: Sequence[tuple[str, Sequence[Amount]]]) -> int:
    """The place of the sentence with the answer: the last, save remarks, checks and repetitions behind a conclusion."""
    values = [{amount.value for amount in found} for _, found in numbered]
    last = len(numbered) - 1
    while last > 0 and _AFTERWORD.match(numbered[last][0]):
        last -= 1
    last = _before_check(numbered[: last + 1], values)
    for place in range(last, max(-1, last - 4), -1):
        if _states(numbered, place):
            known = set().union(*values[:place])
            behind = [(numbered[i][0], values[i] <= known) for i in range(place + 1, last + 1)]
            is_over = all(_REMARK.match(text) or (is_known and "=" not in text) for text, is_known in behind)
            return place if is_over else last
    return last


def _before_check(numbered: Sequence[tuple[str, Sequence[Amount]]], values: Sequence[set[str | None]]) -> int:
    """The place of the last sentence before a check that has the stated answer in it, and ends in no other answer."""
    last = len(numbered) - 1
    for place in range(max(1, last - 4), last + 1):
        if not _CHECK.match(numbered[place][0]) or not _states(numbered, place - 1):
            continue
        stated = _strong(*numbered[place - 1]).value
        known = set().union(*values[: place + 1])
        rest = range(place + 1, last + 1)
        if stated in values[place] and all(
            values[i] <= known and (stated in values[i] or not _CONCLUDES.match(numbered[i][0])) for i in rest
        ):
            return place - 1
    return last


def _bold(text: str) -> Amount | None:
    """The only number in bold type of the last line that has numbers, if there is exactly one."""
    for line in reversed(text.splitlines()):
        if amounts(_unstressed(line)):
            parts = [part for part in re.findall(r"\*\*([^*\n]+)\*\*", line) if amounts(part)]
            found = amounts(parts[0]) if len(parts) == 1 and not _NUMBERING.match(parts[0]) else []
            return found[0] if len(found) == 1 else None
    return None
