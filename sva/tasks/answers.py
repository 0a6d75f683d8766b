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

_LONGEST = 2_000  # characters of a completion in which a short answer is looked for

_SPELLED = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
)
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_SPELLED.split())}

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+|,? (?=(?:because|since)\b)")
_PLEASANTRY = re.compile(r"(?:sure|certainly|of course|okay|ok)[!,.:]\s*(?=\S)", re.IGNORECASE)
_ASIDE = re.compile(r"(?<=\S)\s*\([^()]*\s[^()]*\)")
_LINK = re.compile(
    r"\b(?:is|are|was|be|becomes|equals|equal to|has|have|contains|gives|makes)\b|[:=→]", re.IGNORECASE
)
_VERB = re.compile(r"\s(?:is|are|comes|has|have)\s(?!not\b)", re.IGNORECASE)
_PRONOUNS = {"it", "this", "that", "there", "here", "he", "she", "answer", "they", "which", "what"}


def plain(text: str) -> str:
    """`text` without what only dresses it: quotes, markdown emphasis, LaTeX wrapping, control characters."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-")
    text = "".join(c if c == "\n" or not unicodedata.category(c).startswith("C") else " " for c in text)
    text = re.sub(r"\\(?:boxed|text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[()\[\]]|\$", " ", text)
    text = text.replace("\u2019", "'").replace("\u2018", "'")
    text = re.sub(r"[\"\u201c\u201d\u00ab\u00bb`*]|(?<!\w)'|'(?!\w)|(?<!\w)_+|_+(?!\w)", "", text)
    text = re.sub(r"(?m)^\s*(?:[#>•-]+\s+)?", "", text)
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
    text = _trim(text, "numbers?|words?|items?|total").lower()
    text = _NUMBER_WORDS.get(text, text)
    if not re.fullmatch(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.0+)?", text):
        return None
    digits = text.partition(".")[0].replace(",", "").lstrip("+")
    sign, digits = ("-", digits[1:]) if digits.startswith("-") else ("", digits)
    digits = digits.lstrip("0") or "0"
    return digits if digits == "0" else sign + digits


def _numbers(text: str) -> str | None:
    parts = re.split(r" *(?:,? and |[,;<]| ) *", _trim(text, "numbers"))
    read = [_number(part) for part in parts if part]
    return ", ".join(part for part in read if part) if len(read) > 1 and all(read) else None


def _word(text: str) -> str | None:
    text = _trim(text, "word|number|city|animal").casefold()
    return text if re.fullmatch(r"[^\W\d_](?:['-]?[^\W\d_])*", text) and text not in _PRONOUNS else None


def _words(text: str) -> str | None:
    if _LINK.search(text):
        return None
    parts = re.split(r" *(?:,? and |[,;]| ) *", _trim(text, "words"))
    read = [_word(part) for part in parts if part]
    return ", ".join(part for part in read if part) if len(read) > 1 and all(read) else None


def _name(text: str) -> str | None:
    words = _trim(text, "city").casefold().split()
    fits = 0 < len(words) <= 5 and re.fullmatch(r"[^\W\d_][\w'. ,-]*", " ".join(words))
    return (
        " ".join(words)
        if fits and not {"the", "of", "capital", "is", "and", "or", *_PRONOUNS} & set(words)
        else None
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
    links = list(_LINK.finditer(sentence))
    if links and (tail := read(sentence[links[-1].end() :])) is not None:
        return tail
    verb = _VERB.search(sentence)
    return read(sentence[: verb.start()]) if verb and len(links) <= 1 else None


def find(completion: str, form: str) -> str | None:
    """The one answer of that form (a key of `FORMS`) stated by a completion, canonically spelled, or None."""
    read = FORMS[form]
    if len(completion) > _LONGEST:
        return None
    text = _PLEASANTRY.sub("", plain(completion), count=1)
    if form == "text":  # a copy: the whole, or what stands after "Here it is:"
        return read(text.rpartition(":")[2])
    if (bare := read(text)) is not None:
        return bare
    sentences = [_ASIDE.sub("", s).strip() for s in _SENTENCE_END.split(text)]
    stated = [(s, answer) for s in sentences if s and (answer := _stated(s, read)) is not None]
    named = {answer for s, answer in stated if re.search(r"\banswer\b", s, re.IGNORECASE)}
    answers = named or {answer for _, answer in stated}
    if not answers and form in ("numbers", "words"):  # one item a line
        return _stated(re.sub(r"(?m)^\d+[.)] +", "", text).replace("\n", " "), read)
    return answers.pop() if len(answers) == 1 else None


def grade(completion: str, form: str, accepted: Sequence[str]) -> Grade:
    """Right if the completion states exactly one answer of that form, and it is one of those accepted."""
    answer = find(completion, form)
    read = FORMS[form]
    return Grade(answer is not None and answer in {read(plain(right)) for right in accepted}, answer)
