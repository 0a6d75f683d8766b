"""From the text of a completion to the answer in it.

Short answers are read by form (`FORMS`): a letter, a number, a word, a list. A completion states its answer
bare ("e", "**E.**", "1,023") or in a sentence that ends or begins with it ('The last letter is "e".', "Paris
is the capital of France."). Where several sentences state one, those that call theirs "the answer" decide,
else all must agree; a completion that states two different answers has none. Case, quotes, emphasis and a
trailing full stop never matter. Nothing here evaluates text.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence

from sva.tasks.base import Grade
from sva.tasks.grading.numerals import amounts, fold
from sva.tasks.grading.wrappings import unwrapped

_TAIL = 20_000  # characters at the end of a completion in which the answer to a solution is looked for
_LONGEST = 2_000  # characters at the end of a completion in which a short answer is looked for

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+|,? (?=(?:because|since)\b)|, (?=which\b)")
_PLEASANTRY = re.compile(r"\A(?:sure|certainly|of course|okay|ok)[!,.:]\s*(?=\S)", re.IGNORECASE)
_ASIDE = re.compile(r"(?<=\S)\s*\([^()]*\s[^()]*\)")
LINK = re.compile(
    r"\b(?:is|are|was|be|becomes|equals|equal to|has|have|contains|gives|makes|called|known as)\b"
    r"|[=→]|(?<!\d):|:(?!\d)",  # "3:30" links nothing
    re.IGNORECASE,
)
_VERB = re.compile(r"\s(?:is|are|comes|has|have)\s(?!not\b)", re.IGNORECASE)
_PRONOUNS = {"it", "this", "that", "there", "here", "he", "she", "they", "which", "what", "answer", "the"}


_NEXT_QUESTION = re.compile(r"(?<=\n)[ \t]*(?:question|problem|instruction|q|human|user)\b[ \d]*:", re.IGNORECASE)
_LAST_NOTE = re.compile(r"\n[ \t]*[*_(]{0,3}(?:note|p\.?s\.?|n\.?b\.?)[*_]{0,2}:[^\n]*\Z", re.IGNORECASE)


_CLOSING = re.compile(
    r"\W{0,4}(?:please )?(?:let me know|feel free|do(?:n't| not) hesitate"
    r"|(?:i )?(?:do |really |sincerely )?hope (?:this|that|these|those|it|you|the|my)\b"
    r"|if you (?:have|need|want|would like)[^.!?\n]{0,40}\b(?:questions?|help|assistance|clarification|explanations?)\b"
    r"|is there anything|thank(?:s| you)\b|good luck|best of luck|have an? (?:great|nice|good|wonderful|lovely) "
    r"|you(?:'re| are) (?:most )?welcome|(?:i(?:'m| am) )?(?:happy|glad|here) to (?:help|assist|explain)"
    r"|keep (?:up|practi[cs])|great (?:job|question|work)|any (?:other|more|further) questions|need (?:any |more )?help"
    r"|(?:do|would|did|can|could|shall|should|want|may) (?:you|i|we|me)\b[^.!\n]*\?\s*\Z)",
    re.IGNORECASE,
)
_MOST_CLOSING = 6  # sentences


def _unclosed(text: str) -> str:
    """`text` without the pleasantries that it closes with, unless they name an answer."""
    start = max(0, len(text) - 1_000)
    breaks = [start + match.end() for match in re.finditer(r"[.!?)*]\s+|\n+", text[start:])]
    for place in breaks[: -_MOST_CLOSING - 1 : -1]:
        sentence = text[place:].replace("\u2019", "'")
        if not sentence.strip() or (
            _CLOSING.match(sentence) and not re.search(r"\banswer\b[^.!?]*\d|####|boxed", sentence)
        ):
            text = text[:place].rstrip()
        else:
            break
    return text


def conclusion(completion: str) -> str:
    """The end of a completion where its answer is.

    Without its thinking and tags, before a question that it asks itself next, and without closing pleasantries and a
    note in its last line, unless they name an answer.
    """
    text = unwrapped(completion)[-_TAIL:].rstrip()
    following = _NEXT_QUESTION.search(text)
    text = text[: following.start()].strip() or text if following else text
    text = _unclosed(text)
    note = _LAST_NOTE.search(text)
    return text[: note.start()].strip() or text if note and "answer" not in note[0].lower() else text


def plain(text: str) -> str:
    """`text` without what only dresses it: quotes, markdown emphasis, LaTeX wrapping, control characters."""
    text = fold(text).replace("\u2212", "-")
    text = "".join(c if c == "\n" or not unicodedata.category(c).startswith("C") else " " for c in text)
    for _ in range(2):  # \\boxed{\\text{B}}
        text = re.sub(r"\\(?:boxed|text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\$([^$\n]+)\$", r"\1", re.sub(r"\\[()\[\]]", " ", text))
    text = text.replace("\u2019", "'").replace("\u2018", "'")
    text = re.sub(r"[\"\u201c\u201d\u00ab\u00bb`]|\*\*|(?<!\w)['_*]+(?=\S)|(?<=\S)['_*]+(?!\w)", "", text)
    text = re.sub(r"(?m)^[^\S\n]*(?:[#>•-]+[^\S\n]+)?", "", text)
    return re.sub(r"[ \t]+", " ", text).strip()


def _trim(text: str, nouns: str) -> str:
    """`text` without punctuation around it, without "the letter ..." and "... words in the list"."""
    text = text.strip(" \n\t.,;:!")
    while len(text) > 2 and (text[0], text[-1]) in (("(", ")"), ("[", "]")):
        text = text[1:-1].strip()
    text = re.sub(rf"^(?:(?:the|a|an) )?(?:{nouns})(?: of)?:? (?=\S)", "", text, flags=re.IGNORECASE)
    place = r"(?: in (?:the|this|your) list)?"
    text = re.sub(rf"^(?:an? )?(\S+) (?:{nouns}){place}$", r"\1", text, flags=re.IGNORECASE)
    return text.strip(" .,;:!")


def _letter(text: str) -> str | None:
    text = _trim(text, "letter").lower()
    return text if re.fullmatch(r"[a-z]", text) else None


def _letters(text: str) -> str | None:
    text = re.sub(r"\b([a-z])(?: and |[ ,-])+(?=[a-z]\b)", r"\1", _trim(text, "letters").lower())
    return text if re.fullmatch(r"[a-z]+", text) else None


def _number(text: str) -> str | None:
    text = _trim(text, "numbers?|words?|items?|total").removeprefix("+")
    found = amounts(text) if len(text) <= _LONGEST else []
    if len(found) != 1 or (found[0].start, found[0].end) != (0, len(text)) or found[0].value is None:
        return None
    return found[0].value if re.fullmatch(r"-?\d+", found[0].value) else None


def _numbers(text: str) -> str | None:
    parts = re.split(r" *(?:,? and |[,;<]| ) *", _trim(text, "numbers"))
    read = [_number(part) for part in parts if part]
    return ", ".join(part for part in read if part) if len(read) > 1 and all(read) else None


def _word(text: str) -> str | None:
    text = _trim(text, "word|number|city|animal").casefold()
    return text if re.fullmatch(r"[^\W\d_](?:['-]?[^\W\d_])*", text) and text not in _PRONOUNS else None


def _words(text: str) -> str | None:
    if LINK.search(text):
        return None
    parts = re.split(r" *(?:,? and |[,;]| ) *", _trim(text, "words"))
    read = [_word(part) for part in parts if part]
    return ", ".join(part for part in read if part) if len(read) > 1 and all(read) else None


def _name(text: str) -> str | None:
    words = _trim(text, "city").casefold().split()
    fits = 0 < len(words) <= 5 and re.fullmatch(r"[^\W\d_][\w'. ,-]*", " ".join(words))
    return (
        " ".join(words) if fits and not {"the", "of", "capital", "is", "and", "or", *_PRONOUNS} & set(words) else None
    )


def _text(text: str) -> str | None:
    return " ".join(text.strip(" \n.!").casefold().split()) or None


FORMS: dict[str, Callable[[str], str | None]] = {
    "letter": _letter,
    "letters": _letters,
    "number": _number,
    "numbers": _numbers,
    "word": _word,
    "words": _words,
    "name": _name,
    "text": _text,
}
"""Readers of a bare answer: its canonical spelling, or None where the text is no answer of that form."""


def _stated(sentence: str, read: Callable[[str], str | None]) -> str | None:
    """The answer that a sentence states: bare, at its end ("... is e") or as its subject ("e is the ...")."""
    if sentence.endswith("?"):
        return None
    if (bare := read(sentence)) is not None:
        return bare
    links = list(LINK.finditer(sentence))
    for link in links[:-9:-1]:  # from the last; a sentence with more is no answer
        if (tail := read(sentence[link.end() :])) is not None:
            return tail
    verb = _VERB.search(sentence)
    return read(sentence[: verb.start()]) if verb and len(links) <= 1 else None


def _end(text: str) -> str:
    """The sentences at the end of a long text."""
    if len(text) <= _LONGEST:
        return text
    text = text[-_LONGEST:]
    first = SENTENCE_END.search(text)
    return text[first.end() :] if first else ""


def find(completion: str, form: str) -> str | None:
    """The one answer of that form (a key of `FORMS`) stated by a completion, canonically spelled, or None."""
    read = FORMS[form]
    text = _PLEASANTRY.sub("", plain(_end(unwrapped(completion))))
    if (bare := read(text)) is not None:
        return bare
    sentences = [_ASIDE.sub("", s).strip() for s in SENTENCE_END.split(text)]
    stated = [(s, answer) for s in sentences if s and (answer := _stated(s, read)) is not None]
    named = {answer for s, answer in stated if re.search(r"\banswer\b", s, re.IGNORECASE)}
    asides = {answer for s, answer in stated if s.startswith("which ")}  # "is Paris, which is a city"
    answers = named or {answer for s, answer in stated if not s.startswith("which ")} or asides
    if not answers and form in ("numbers", "words"):  # one item a line
        return _stated(re.sub(r"(?m)^\d+[.)] +", "", text).replace("\n", " "), read)
    return answers.pop() if len(answers) == 1 else None


def grade(completion: str, form: str, accepted: Sequence[str]) -> Grade:
    """Right if the completion states exactly one answer of that form that is accepted, or is an accepted text."""
    read = FORMS[form]
    texts = [unwrapped(text) for text in accepted]
    said = unwrapped(completion)
    if len(said) <= _LONGEST + 2 * max(map(len, texts)) and _text(plain(said)) in {
        _text(plain(text)) for text in texts
    }:
        return Grade(True, read(plain(texts[0])))
    right = {read(plain(text)) for text in texts} - {None}
    answer = find(said, form)
    return Grade(answer in right, answer)
