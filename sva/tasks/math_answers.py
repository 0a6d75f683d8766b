"""From a solution to a MATH problem to the answer in it, as LaTeX."""

import re

from sva.tasks.answers import conclusion

_SAID = re.compile(r"\b(?:answer|result|solution)s?\b[^\n.$\\]{0,60}?(?:\b(?:is|are|be)\b|[:=])\s*", re.IGNORECASE)
_MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_PLAIN_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def boxed(text: str) -> str | None:
    """What the last \\boxed{} or \\fbox{} of a text holds; of an empty one nothing."""
    starts = [match.end() for match in re.finditer(r"\\f?box(?:ed)?\s*(?=[{\d])", text)]
    for start in reversed(starts[-20:]):
        if text[start] != "{":
            return text[start]  # \boxed 5
        depth = 0
        for i in range(start, min(len(text), start + 5_000)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                if text[start + 1 : i].strip():
                    return text[start + 1 : i].strip()
                break
    return None


def final_answer(completion: str) -> str | None:
    """The answer that a solution ends in, as LaTeX, else None.

    In this order: the last \\boxed{}; after the last "####"; the last sentence that says what the answer is; the last
    formula; a completion of one line; the last number.
    """
    text = conclusion(completion).replace("\u2212", "-").replace("\\$", "")
    if found := boxed(text):
        return tidy(found)
    text = text.replace("**", "").replace("`", "")
    if "####" in text and (line := tidy(text.rpartition("####")[2].strip().partition("\n")[0])):
        return line
    for said in reversed(list(_SAID.finditer(text))):
        if found := _stated(text[said.end() :].lstrip()):
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
    if formula.count("=") > 1:
        formula = formula.rpartition("=")[2]
    return tidy(formula)


def tidy(text: str) -> str | None:
    """An answer without dollars, spacing, units, dressing and the full stop after it; None where nothing is left."""
    text = (
        text.replace("\u2212", "-").replace("\u03c0", "\\pi ").replace("\u221e", "\\infty ").replace("\u221a", "\\sqrt")
    )
    text = text.replace("\u00b0", "^\\circ").replace("\u00d7", "\\times ").replace("\u00b7", "\\cdot ")
    text = re.sub(r"(?<=\d)\\[,!](?=\d{3})|\\(?=[%$])", "", text)
    text = re.sub(r"(?<!\\)\\[!,;: ]|\\q?quad\b|\\displaystyle\b|\\left(?![a-z])|\\right(?![a-z])|~", " ", text)
    text = re.sub(r"\$|\\\$|\\[()\[\]]", "", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    text = re.sub(r"(?<=\d)(?:\{,\}|, ?)(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"\^\{?\\circ\}?|\\degrees?\b", "", text)
    text = re.sub(r"(?<=[\d}])\s*\\(?:text|mathrm|mbox)\{\s*[^{}]*\}(?:\^\{?\d\}?)?\s*$", "", text)
    text = re.sub(r"(?<=\d)\((?=\d)", r"\\cdot(", text)  # a product, no function
    return text.lstrip(" \n\t:*").rstrip(" \n\t.:*") or None


def is_wording(gold: str) -> bool:
    """Whether a right answer is words, such as \\text{Evelyn} or \\text{(C)}, and no expression."""
    wording = re.sub(r"\\(?:text|mathrm|textbf|mbox|textit)\s*\{([^{}]*)\}", "", gold).strip(" $.,")
    return not wording or re.fullmatch(r"[A-Z]|[A-Za-z]{2,}[A-Za-z ]*", wording) is not None


def same_words(answer: str, gold: str) -> bool:
    """Whether two texts agree but for \\text{}, brackets, quotes, case and spaces; only where `gold` is words."""

    def bare(text: str) -> str:
        text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox|textit)\s*\{([^{}]*)\}", r"\1", text)
        return re.sub(r"[\s(){}\"'.,$*\\]", "", text).casefold()

    return is_wording(gold) and bare(answer) == bare(gold)
