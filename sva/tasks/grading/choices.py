"""From the text of a completion to the option that it chooses. Nothing here evaluates text."""

import re
from collections.abc import Sequence

from sva.tasks.grading.answers import FORMS, LINK, SENTENCE_END, conclusion, plain

_LETTERS = "ABCDEFGHIJ"
_NEGATION = re.compile(r"\bnot\b|n't\b|\bwrong\b|\bincorrect\b", re.IGNORECASE)
_OWN_NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|cannot|instead|rather|unlike|wrong|incorrect)\b|n't\b"
    r"|\b(?:rul(?:e|ed|ing) out|eliminat(?:e|ed|ing))\b",
    re.IGNORECASE,
)
_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_ORDINAL = re.compile(rf"(?:the )?(?P<place>{'|'.join(_ORDINALS)}) (?:option|choice|answer|one)[.!]?", re.IGNORECASE)
_END = r"(?=\s*(?:$|[\n).,:;!\u3002])|\s[-\u2013\u2014]\s)(?!\.\d)"
_RIGHT_SIGN, _WRONG_SIGN = "[\u2713\u2714\u2705\u2611]", "[\u2717\u2718\u274c\u2716]"
_TURNS = (
    r"actually|no wait|or rather|no|wait|hold on|hmm|sorry|correction|scratch that|on second thoughts?|i mean|rather"
)
_CORRECTION = re.compile(
    r"(?:^|(?<=[.!?,;:\u2013\u2014-])\s|\n|\.\.\.)[^\S\n]*"
    rf"(?:(?:{_TURNS})(?:[,.:;!\u2013\u2014-]+\s*|\s*\Z|(?<!\bno)\s+))+",  # "no" needs a comma: "no metal"
    re.IGNORECASE,
)
_IS_WRONG = re.compile(
    r"\W*|(?:that|this|it)(?: is|'s) (?:wrong|incorrect|not (?:right|correct|true|it))\W*", re.IGNORECASE
)
_LEAVES = r"(?:(?:this|that|which|it) leaves|leaving)(?: us)?(?: with)?|left with"
# What an option may stand behind, besides the links of `answers`.
_LED_TO = re.compile(
    rf"\b(?:caused by|made (?:of|from)|due to|explained by|the result of|{_LEAVES})(?: only| just)? ", re.IGNORECASE
)


def choice(completion: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """The label that a completion chooses, else None.

    What it denies ("not A but B", "A is wrong") is left out first, unless an option has such words itself. Then, in
    this order: the full text of an option and no more; what takes an earlier choice back ("A. No, wait: B"); the last
    "answer is B" or "only B is left"; the only option with a tick; a label that the completion begins with ("B",
    "(B) ...", "Option B. ..."); a sentence that gives an option in full; "option B", where no other is named so; where
    there is one sentence only, the only option, else the only label, in it; and the option that the last sentence
    names where those before it are denied. A label is a word of its own; the article "a" is none. Where nothing is
    found, a letter may stand for a number by its place and the other way round, if it is called the answer or stands
    alone.

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
    rules = _rules(labels)
    if found := _corrected(text, labels, options, rules) or _called_answer(text, rules):
        return found
    if found := _ticked(text, labels, options):
        return found
    if _repeats(text, labels, options):
        return "?"
    if found := _first(text, labels):
        return found
    if found := _sentence_given(text, labels, options):
        return found
    named = {
        match["label"].upper() for match in re.finditer(rf"(?i:\b(?:choice|option|letter)) {_label(labels)}", text)
    }
    if named:
        return named.pop() if len(named) == 1 else "?"
    if ordinal := _ORDINAL.fullmatch(text):
        place = _ORDINALS.index(ordinal["place"].lower())
        return labels[place].upper() if place < len(labels) else None
    sentences = re.split(r"(?<=[.!?])\s+|\n+", text)
    if len(sentences) != 1:
        return _named_behind_denials(sentences, labels, options)
    if _NEGATION.search(text):
        return None
    alone = {match["label"].upper() for match in re.finditer(rf"(?<![\w']){_label(labels)}", text)}
    return _mentioned(text, labels, options) or (alone.pop() if len(alone) == 1 else None)


def _first(text: str, labels: Sequence[str]) -> str | None:
    """The label that a text begins with; "?" where it begins several sentences with "Option A. ", "Option B: "."""
    lower = "|".join(re.escape(label.lower()) for label in labels)
    label = rf"\(?(?P<label>(?i:{lower}))"
    dash = rf"\s[-\u2013\u2014]\s(?!or\b|\(?(?i:{lower})\)?\W*$)"
    first = re.match(
        rf"(?P<lead>(?i:option|choice|letter) )?{label}(?:\)|[.:](?!\d)|\s*$|\s*\n|{dash}|,?\s(?:because|since|as)\b)",
        text,
    )
    if not first:
        return None
    heads = rf"(?:^|(?<=[.!?;])\s|\n)[^\S\n]*(?i:option|choice|letter) {label}(?!\w)"
    several = {match["label"].upper() for match in re.finditer(heads, text)} if first["lead"] else set()
    return "?" if len(several) > 1 else first["label"].upper()


def _corrected(
    text: str, labels: Sequence[str], options: Sequence[str], rules: Sequence[re.Pattern[str]]
) -> str | None:
    """The label behind the last "No, wait: "; "?" where that takes a choice back and makes no clear one."""
    turns = [match for match in _CORRECTION.finditer(text) if match.start()]
    if not turns:
        return None
    rest = text[turns[-1].end() :]
    if _IS_WRONG.fullmatch(rest):
        return "?"
    label = rf"(?:(?:it is|it's|it should be|make that|(?:the )?(?:answer|option)(?: is)?):? )?{_label(labels, True)}"
    sentence = SENTENCE_END.split(rest, maxsplit=1)[0]
    behind = re.match(label, rest, re.IGNORECASE)
    found = _called_answer(rest, rules) or _given(sentence, labels, options)
    if found or behind:
        return found or (behind and behind["label"].upper())
    is_back = re.search(r"\b(?:no|wait|hold on|correction|scratch|second)\b", turns[-1][0], re.IGNORECASE)
    is_more = re.search(rf"(?<![\w']){_label(labels)}", rest) or _options_in(rest, labels, options)
    return "?" if is_back and is_more else None


def _ticked(text: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """The label of the only line with a tick; "?" where there are more, or signs but no tick."""
    if not re.search(f"{_RIGHT_SIGN}|{_WRONG_SIGN}", text):
        return None
    lines = [line for line in text.splitlines() if re.search(_RIGHT_SIGN, line)]
    if len(lines) != 1 or re.search(_WRONG_SIGN, lines[0]):
        return "?"
    line = re.sub(rf"{_RIGHT_SIGN}\ufe0f?", "", lines[0]).strip()
    return _given(line, labels, options) or _first(line, labels) or "?"


def _sentence_given(text: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """The label of the first option that a sentence gives in full."""
    for sentence in SENTENCE_END.split(text):
        if sentence and (found := _given(sentence, labels, options)):
            return found
    return None


def _named_behind_denials(sentences: Sequence[str], labels: Sequence[str], options: Sequence[str]) -> str | None:
    """The label of the only option that the last sentence names, where all other sentences with options deny them."""
    if any(_OWN_NEGATION.search(option) for option in options) or sentences[-1].endswith("?"):
        return None
    denying = [sentence for sentence in sentences[:-1] if _OWN_NEGATION.search(sentence)]
    others = [sentence for sentence in sentences if sentence not in denying]
    denied, stated = (
        set().union(*(_options_in(part, labels, options) for part in parts)) for parts in (denying, others)
    )
    is_clear = denied and len(stated) == 1 and not stated & denied and not _OWN_NEGATION.search(sentences[-1])
    return next(iter(stated)) if is_clear and _options_in(sentences[-1], labels, options) else None


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
    joint = r",? ?(?:[-\u2013\u2014] )?(?:or|and|/|,|&) ?(?:(?:rather|maybe|perhaps|possibly) )?"
    other = rf"(?P<other>{joint}(?:option )?\(?(?:{upper})(?![\w']))?"
    said = (
        r"(?i:(?:\banswer\b|\b(?:correct|right|best|final|my) (?:choice|option|letter)\b|\u7b54\u6848\u662f)"
        rf"(?:[^\n.]{{0,60}}?\b(?:is|was|be|choice|option|letter|number))?)\s*[:=]?\s*{label}{other}"
    )
    option_is = (
        r"(?i:\b(?:choice|option|letter)\b"
        rf"(?:[^\n.]{{0,60}}?\b(?:is|was|be)\b(?: (?:choice|option|letter|number))?\s*[:=]?|\s*[:=]))\s*{label}{other}"
    )
    so = rf"(?i:\b(?:so|therefore|thus|hence),? (?:it's |it is )?(?:choice|option)) {_label(labels, True)}{other}"
    own = rf"(?<![\w'])\(?(?P<label>{upper})\)?{other}"
    is_right = rf"{own} (?:(?:is|would be) (?:the )?(?:correct|right|best|answer)|it is(?=\W*$))\b"
    only_left = rf"\b(?<![Nn]ot )(?i:only (?:option )?){own} (?:(?:is|are) (?:left|possible)|remains?\b)"
    left = rf"{own} is the only (?:one|option|choice|answer|possibility) (?:left|remaining|that (?:remains|is left))\b"
    leaves = (
        rf"(?i:\b(?:{_LEAVES}|(?:one|option|choice) (?:left|remaining) is)"
        rf"(?: only| just)?(?: option)?) {label}{other}"
    )
    settled = (
        r"(?i:\b(?:(?:must|has to|should|would|can only) be|(?:so|therefore|thus|hence|but),? (?:it is|it's)"
        rf"|choose|pick|select|go(?:ing)? with)(?: option| choice)?) {label}{other}"
    )
    return [re.compile(rule) for rule in (said, option_is, so, is_right, only_left, left, leaves, settled)]


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
        spelled = (
            rf"(?:it is |it's )?(?:option |choice )?\(?{re.escape(label)}[).:]*(?:(?:(?<=[).:])|\s)\s*{text_of}[.!]?)?"
        )
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
    link, led = LINK.search(text), _LED_TO.search(text)
    if led and _NEGATION.search(text[: led.start()]):
        led = None
    ends = (text, text[link.end() :] if link else "", text.rpartition(":")[2], text[led.end() :] if led else "")
    for part in dict.fromkeys(filter(None, ends)):
        for spell in (lambda words: words.strip(" \n.!"), FORMS["text"], _without_article):  # from the strictest
            same = [
                label
                for label, option in zip(labels, options, strict=True)
                if spell(option) == spell(part) and option.upper() not in labels
            ]
            if len(same) == 1:
                return same[0]
    return None


def _without_article(text: str) -> str | None:
    return re.sub(r"^(?:an?|the) (?=\S)", "", FORMS["text"](text) or "") or None


def _mentioned(sentence: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """The label of the only option that a sentence has in it, word for word."""
    found = _options_in(sentence, labels, options)
    return found.pop() if len(found) == 1 else None


def _options_in(sentence: str, labels: Sequence[str], options: Sequence[str]) -> set[str]:
    """The labels of the options that a sentence has in it, word for word; of one within another only the longer."""
    spelled = {
        (FORMS["text"](option) or option).removeprefix("it ").removeprefix("they "): label
        for label, option in zip(labels, options, strict=True)
    }
    whole = FORMS["text"](sentence) or ""
    named = [option for option in spelled if re.search(rf"(?<!\w){re.escape(option)}(?!\w)", whole)]
    return {spelled[option] for option in named if not any(option != other and option in other for other in named)}
