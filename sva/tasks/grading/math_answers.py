"""From a solution to a MATH problem to the answer in it, as LaTeX."""

import re
from collections.abc import Iterator

from sva.tasks.grading.answers import conclusion

_SAID = re.compile(r"\b(?:answer|result|solution)s?\b[^\n.$\\]{0,60}?(?:\b(?:is|are|be)\b|[:=])\s*", re.IGNORECASE)
_MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_BOX = re.compile(r"\\f?box(?:ed)?\s*(?=[{\d])")
_JOINED = re.compile(  # what may stand between two boxes that are one answer
    r"[\s$]*(?:\\[)\]])?[\s$]*(?:,|;|and|or|&|, ?and|, ?or|\\(?:text|mbox)\{[ ,]*(?:and|or)[ ,]*\})"
    r"[\s$]*(?:\\[(\[])?[\s$]*(?:[A-Za-z](?:_\{?\w\}?)?\s*=\s*\$?)?\s*"
)
# Bold text that a solution ends in, alone on its line or behind a link, is its answer; a heading is none.
_BOLD_END = re.compile(
    r"(?:(?:\A|\n)[ \t]*|(?:\b(?:is|are|be|was|on|equals)(?: (?:an?|the))?|[:=])\s+)"
    r"\*\*(?!(?:note|explanation|solution|step|conclusion|correct|right|true|wrong|incorrect|done)\b)"
    r"([^*\n]{1,60}[^*\n:])\*\*[.!]?\s*\Z",
    re.IGNORECASE,
)
_PLAIN_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def boxed(text: str) -> str | None:
    """What the last \\boxed{} or \\fbox{} of a text holds; of an empty one nothing."""
    return next((content for content, _, _ in _boxes(text)), None)


def _boxes(text: str) -> Iterator[tuple[str, int, int]]:
    """What each of the last boxes holds, with where it begins and ends, from the last."""
    for match in reversed(list(_BOX.finditer(text))[-20:]):
        start = match.end()
        if text[start] != "{":
            number = re.compile(r"\d+(?:\.\d+)?").match(text, start)  # \boxed 5
            assert number is not None
            yield number[0], match.start(), number.end()
            continue
        depth = 0
        for i in range(start, min(len(text), start + 5_000)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                if content := text[start + 1 : i].strip():
                    yield content, match.start(), i + 1
                break


def all_boxed(text: str) -> str | None:
    """What the last box holds, after those that are joined to it by a comma or a word: "\\boxed{2} and \\boxed{3}"."""
    contents: list[str] = []
    begin = 0
    for content, start, end in _boxes(text):
        if contents and not _JOINED.fullmatch(text[end:begin]):
            break
        if content not in contents:
            contents.insert(0, content)
        begin = start
    return ",".join(contents) or None


def final_answer(completion: str) -> str | None:
    """The answer that a solution ends in, as LaTeX, else None.

    In this order: the last \\boxed{}; after the last "####"; the last sentence that says what the answer is; bold text
    at the end; the last formula; a completion of one line; the last number.
    """
    text = conclusion(completion).replace("\u2212", "-").replace("\\$", "")
    if found := all_boxed(text):
        return tidy(found)
    bold = _BOLD_END.search(text, max(0, len(text) - 200))
    text = text.replace("**", "").replace("`", "")
    if "####" in text and (line := tidy(text.rpartition("####")[2].strip().partition("\n")[0])):
        return line
    for said in reversed(list(_SAID.finditer(text))):
        if found := _stated(text[said.end() :].lstrip()):
            return found
    if bold and (found := _stated(bold[1])):
        return found
    formulas = list(_MATH.finditer(text))
    if formulas and (found := _side(next(filter(None, formulas[-1].groups())))):
        return found
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) == 1 and len(lines[0]) <= 60 and not re.search(r"[A-Za-z]{2,} [A-Za-z]{2,}", lines[0]):
        return _side(lines[0])
    numbers = _PLAIN_NUMBER.findall(text)
    return tidy(numbers[-1]) if numbers else None


def _stated(rest: str) -> str | None:
    """The formulas that a clause begins with, else its words up to the full stop."""
    clause = re.split(r"\.(?:\s|$)|\n\n|\n(?=[A-Z])|;|,? \b(?:because|since|as)\b", rest, maxsplit=1)[0]
    formulas = [next(filter(None, match.groups())) for match in _MATH.finditer(rest) if match.start() < len(clause)]
    opening = _MATH.search(rest)
    if opening and opening.start() <= 30 and formulas:
        between = _MATH.sub("", clause)
        if len(formulas) > 1 and not re.search(r"\b(?:and|or)\b|,", between):
            formulas = formulas[-1:] if "=" in between else formulas[:1]
        return ",".join(_side(formula) or "" for formula in formulas).strip(",") or None
    return _side(clause) if len(clause) <= 200 else None


def _side(formula: str) -> str | None:
    """The right side of an equation, or the whole."""
    formula = tidy(formula) or ""
    if formula.count("=") > 1 and not re.search(r",|;|\b(?:or|and)\b|\\(?:text|mbox)", formula):
        formula = formula.rpartition("=")[2]
    return tidy(formula)


def tidy(text: str) -> str | None:
    """An answer without dollars, spacing, dressing and the full stop after it; None where nothing is left."""
    text = (
        text.replace("\u2212", "-").replace("\u03c0", "\\pi ").replace("\u221e", "\\infty ").replace("\u221a", "\\sqrt")
    )
    text = text.replace("\u00b0", "^\\circ ").replace("\u00d7", "\\times ").replace("\u00b7", "\\cdot ")
    text = re.sub(r"^\s*\\\$\s*(\d[\d.,]*)\s*$", r"\1\\text{ dollars}", text)
    text = re.sub(r"(?<=\d)(?:\\[,!]|,\\!|\{,\}\\?!?)(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"(?<!\\)\\[!,;: ]|\\q?quad\b|\\displaystyle\b|\\left(?![a-z])|\\right(?![a-z])|~", " ", text)
    text = re.sub(r"\\?\$|(?<!\\)\\[()\[\]]", "", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    return text.lstrip(" \n\t:*").rstrip(" \n\t.:*") or None


def is_wording(gold: str) -> bool:
    """Whether a right answer is words, such as \\text{Evelyn} or \\text{(C)}, and no expression."""
    wording = re.sub(rf"{_DRESSED}\s*\{{([^{{}}]*)\}}", "", gold).strip(" $.,")
    if re.fullmatch(r"[A-Za-z]{2,4}", wording) and wording == gold.strip(" $.,"):
        return not _is_product(wording)
    return not wording or re.fullmatch(r"[A-Z]|[A-Za-z]{2,}[A-Za-z ]*", wording) is not None


def _is_product(letters: str) -> bool:
    """Whether letters are a product (xy, ABC) and no short word: none occurs twice, and of vowels there is at most an
    a or an i, in the order of the alphabet."""
    small = letters.lower()
    if len(set(small)) < len(small) or set(small) & set("eou") or small in ("is", "in", "it", "at", "an", "any"):
        return False
    return not set(small) & set("ai") or list(small) == sorted(small)


def same_words(answer: str, gold: str) -> bool:
    """Whether two texts agree but for \\text{}, brackets, quotes, case and spaces; only where `gold` is words.

    Several letters (of statements that hold) agree in any order.
    """
    if not is_wording(gold):
        return False
    letters, others = _letters(gold), _letters(answer)
    return _bare(answer) == _bare(gold) or (len(letters) > 1 and letters == others)


_DRESSED = r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox)"


def _bare(text: str) -> str:
    text = re.sub(rf"{_DRESSED}\s*\{{([^{{}}]*)\}}", r"\1", text)
    return " ".join(re.sub(r"[(){}\"'.$*\\]", "", text).replace(",", " ").casefold().split())


def _letters(text: str) -> list[str]:
    """The single capitals that a text lists, in order; none where it has more to it."""
    text = re.sub(rf"{_DRESSED}\s*\{{([^{{}}]*)\}}", r"\1", text)
    parts = [part for part in re.split(r"\band\b|&|[\s,;(){}.]", text) if part]
    return sorted(parts) if all(re.fullmatch("[A-Z]", part) for part in parts) else []
