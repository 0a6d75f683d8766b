"""From the text of a completion to the option that it chooses. Nothing here evaluates text."""

import re
from collections.abc import Sequence

from sva.tasks.answers import FORMS, LINK, SENTENCE_END, conclusion, plain

_LETTERS = "ABCDEFGHIJ"
_NEGATION = re.compile(r"\bnot\b|n't\b|\bwrong\b|\bincorrect\b", re.IGNORECASE)
_OWN_NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|cannot|instead|rather|unlike|wrong|incorrect)\b|n't\b"
    r"|\b(?:rul(?:e|ed|ing) out|eliminat(?:e|ed|ing))\b",
    re.IGNORECASE,
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_ORDINAL = re.compile(rf"(?:the )?(?P<place>{'|'.join(_ORDINALS)}) (?:option|choice|answer|one)[.!]?", re.IGNORECASE)
_END = r"(?=\s*(?:$|[\n).,:;!\u3002]))(?!\.\d)"


def choice(completion: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """The label that a completion chooses, else None.

    What it denies ("not A but B", "A is wrong") is left out first, unless an option has such words itself. Then, in
    this order: the full text of an option and no more; the last "answer is B"; a label that the completion begins with
    ("B", "(B) ...", "B. ..."); a sentence that gives an option in full; and where there is one sentence only, the only
    option, else the only label, in it. A label is a word of its own; the article "a" is none. Where nothing is found,
    a letter may stand for a number by its place and the other way round, if it is called the answer or stands alone.

    Args:
      labels: as shown to the model, such as A to E or 1 to 4.
      options: their texts, in the same order.
    """
    text, options = plain(conclusion(completion)), [plain(option) for option in options]
    if found := _given(text, labels, options):
        return found
    text = _undenied(text, labels, options)
    if found := _chosen(text, labels, options):
        return found if found != "?" else None
    others = [str(i + 1) for i in range(len(labels))] if labels[0].isalpha() else list(_LETTERS[: len(labels)])
    if any(re.search(rf"(?<!\w){label}(?!\w)", option) for label in others for option in options):
        return None
    text = _undenied(text, others, options)
    rules = _rules(others, only_at_end=True)
    found = _called_answer(text, rules) or _bare(text, others, options)
    return labels[others.index(found)] if found in others else None


def _chosen(text: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """The label chosen; "?" where several are, or what was chosen cannot be told although a rule applied."""
    if found := _called_answer(text, _rules(labels)):
        return found
    if _repeats(text, labels, options):
        return "?"
    lower = "|".join(re.escape(label.lower()) for label in labels)
    if first := re.match(
        rf"\(?(?P<label>(?i:{lower}))(?:\)|[.:](?!\d)|\s*$|\s*\n|\s[-\u2013]\s|,?\s(?:because|since|as)\b)", text
    ):
        return first["label"].upper()
    for sentence in SENTENCE_END.split(text):
        if sentence and (found := _given(sentence, labels, options)):
            return found
    if ordinal := _ORDINAL.fullmatch(text):
        place = _ORDINALS.index(ordinal["place"].lower())
        return labels[place].upper() if place < len(labels) else None
    if len(re.split(r"(?<=[.!?])\s+|\n+", text)) != 1 or _NEGATION.search(text):
        return None
    alone = {match["label"].upper() for match in re.finditer(rf"(?<![\w']){_label(labels)}", text)}
    return _mentioned(text, labels, options) or (alone.pop() if len(alone) == 1 else None)


def _label(labels: Sequence[str], only_at_end: bool = False) -> str:
    """The pattern of one label; before a word only in upper case, and "A" only where it can be no article."""
    upper = "|".join(re.escape(label.upper()) for label in labels)
    lower = "|".join(re.escape(label.lower()) for label in labels)
    before_word = rf"|(?!A\b)(?:{upper})(?![\w'/-]|\.\d)|A(?= (?:because|since|as|or|and)\b)"
    return rf"\(?(?P<label>(?i:{lower}){_END}{'' if only_at_end else before_word})\)?"


def _rules(labels: Sequence[str], only_at_end: bool = False) -> list[re.Pattern[str]]:
    """The sentences that call a label the answer."""
    upper = "|".join(re.escape(label.upper()) for label in labels)
    label = _label(labels, only_at_end)
    other = rf"(?P<other> ?(?:or|and|/|,|&) ?(?:option )?\(?(?:{upper})(?![\w']))?"
    said = (
        r"(?i:(?:\b(?:answer|choice|option|letter)\b|\u7b54\u6848\u662f)"
        rf"(?:[^\n.]{{0,60}}?\b(?:is|was|be|choice|option|letter|number))?)\s*[:=]?\s*{label}{other}"
    )
    is_right = rf"(?<![\w'])\(?(?P<label>{upper})\)?{other} (?:is|would be) (?:the )?(?:correct|right|best|answer)\b"
    settled = (
        r"(?i:\b(?:(?:must|has to|should|would|can only) be|(?:so|therefore|thus|hence),? (?:it is|it's)"
        rf"|choose|pick|select|go(?:ing)? with)(?: option| choice)?) {label}{other}"
    )
    return [re.compile(rule) for rule in (said, is_right, settled)]


def _called_answer(text: str, rules: Sequence[re.Pattern[str]]) -> str | None:
    """The last label that is called the answer; "?" where it is one of several."""
    called = [match for rule in rules for match in rule.finditer(text)]
    if not called:
        return None
    last = max(called, key=lambda match: match.start())
    return "?" if last["other"] else last["label"].upper()


def _bare(text: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """The label that a text consists of, with or without its option."""
    for label, option in zip(labels, options, strict=True):
        text_of = re.escape(option)
        spelled = rf"(?:it is |it's )?\(?{re.escape(label)}[).:]*(?:(?:(?<=[).:])|\s)\s*{text_of}[.!]?)?"
        if re.fullmatch(spelled, text, re.IGNORECASE):
            return label
    return None


# --- what is denied ---


def _undenied(text: str, labels: Sequence[str], options: Sequence[str]) -> str:
    """The text without the options that it denies, and without the sentences that do nothing else."""
    if not _OWN_NEGATION.search(text):
        return text
    denials = _denials(labels, options)
    mention = re.compile(rf"(?<![\w'])(?:{_mention(labels, options)})(?!\w)")
    kept = []
    for sentence in re.split(r"(?<=[.!?;])(?=\s)|(?=\n)", text):
        left = sentence
        for denial in denials:
            left = denial.sub("", left)
        if left == sentence or mention.search(left):
            kept.append(left)
    return "".join(kept).strip(" ,;")


def _denials(labels: Sequence[str], options: Sequence[str]) -> list[re.Pattern[str]]:
    one = rf"(?:the )?(?:(?i:option|choice|answer) )?\(?(?:{_mention(labels, options)})\)?"
    listed = rf"{one}(?:,? (?:or|nor|and) {one}|, ?{one}){{0,5}}"
    after = r"(?=\s*(?:$|[\n.,;:)!?]|(?:but|or|nor|and|because|since|as|so|it|the|rather)\b))"
    before = (
        r"(?i:,? ?(?:\b(?:and|but) )?(?:\bnot|n't|\bcannot|\bneither|\brather than|\binstead of|\bunlike"
        r"|\brul(?:e|ed|ing) out|\beliminat(?:e|ed|ing))(?: be| choose| pick| select| go with)?"
        r"(?: (?:think|believe)(?: that)?(?: it is| it's| the answer is)?)?) "
    )
    right = r"(?:the )?(?:correct|right|true|best|answer|one|it)\b"
    verdict = rf"(?:wrong|incorrect|false|(?:ruled )?out|eliminated|not {right})"
    is_not = rf"(?:(?:is|are|was|would be|seems?) {verdict}|(?:isn't|aren't|wasn't) {right})"
    return [
        re.compile(rf"{before}{listed}{after}(?:,? but(?: rather)?\b)?"),
        re.compile(rf"(?<![\w'(]){listed} (?:(?:both|all) )?{is_not}(?: (?:answer|choice|option))?"),
    ]


def _mention(labels: Sequence[str], options: Sequence[str]) -> str:
    """The pattern of any label in upper case, or of any option; of labels only where an option denies something."""
    found = [re.escape(label.upper()) for label in labels]
    texts = sorted((FORMS["text"](option) or "" for option in options), key=len, reverse=True)
    if not any(_OWN_NEGATION.search(option) for option in options):
        found = [rf"(?i:{re.escape(text)})" for text in texts if len(text) > 1] + found
    return "|".join(found)


# --- options in full ---


def _repeats(text: str, labels: Sequence[str], options: Sequence[str]) -> bool:
    """Whether a text begins with the first two options, label and all: the list again, and no choice."""
    lines = [line for line in text.splitlines() if line.strip()][:2]
    shown = [rf"\W*{re.escape(a)}\W+{re.escape(b[:12])}" for a, b in zip(labels[:2], options[:2], strict=True)]
    return len(lines) == 2 and all(
        re.match(form, line, re.IGNORECASE) is not None for form, line in zip(shown, lines, strict=True)
    )


def _given(text: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """The label of the option whose full text this is, or is what comes after "is" or a colon."""
    link = LINK.search(text)
    for part in (text, text[link.end() :] if link else "", text.rpartition(":")[2]):
        for spell in (lambda words: words.strip(" \n.!"), FORMS["text"]):  # as it is written, else whatever its case
            same = [
                label
                for label, option in zip(labels, options, strict=True)
                if spell(option) == spell(part) and option.upper() not in labels
            ]
            if len(same) == 1:
                return same[0]
    return None


def _mentioned(sentence: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """The label of the only option that a sentence has in it, word for word."""
    spelled = {
        (FORMS["text"](option) or option).removeprefix("it ").removeprefix("they "): label
        for label, option in zip(labels, options, strict=True)
    }
    whole = FORMS["text"](sentence) or ""
    named = [option for option in spelled if re.search(rf"(?<!\w){re.escape(option)}(?!\w)", whole)]
    longest = [option for option in named if not any(option != other and option in other for other in named)]
    return spelled[longest[0]] if len(longest) == 1 else None
