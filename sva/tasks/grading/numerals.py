"""The numbers that a text names, in figures or words. A number that is understood in part only has no value.

Nothing here evaluates text.
"""

import re
import unicodedata
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

_MOST_DIGITS = 40

# --- Unicode ---

_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074-\u2079"
_LOWERED = "\u2080-\u2089"
_VULGAR = "\u00bc-\u00be\u2150-\u215e\u2189"
_SLASHES = str.maketrans("\u2044\u2215", "//")


def fold(text: str) -> str:
    """`text` in Unicode's compatibility form (NFKC), where it changes no number.

    A vulgar fraction is a number of its own ("10 1/2", never "101/2"), raised figures after a number are its power
    ("10^3"), and other signs that stand for figures ("18" and a circled 1) are left as they are beside a figure.
    """
    if text.isascii():
        return text
    text = re.sub(rf"(?<![{_RAISED}])(\d?)([{_RAISED}]+)[\u2044/]([{_LOWERED}]+)(?![\d{_LOWERED}])", _stacked, text)
    text = re.sub(rf"(\d?)([{_VULGAR}])(?![\d{_VULGAR}{_RAISED}{_LOWERED}])", _stacked, text)
    text = re.sub(rf"(?<=[\d)\]}}])([\u207a\u207b]?[{_RAISED}]+)(?![\d{_VULGAR}{_LOWERED}])", _power, text)
    parts = []
    start = 0
    for match in re.finditer(r"(?<=\d)[^\W\d]|[^\W\d](?=\d)", text):
        if unicodedata.category(match[0]) == "No":  # it would run into the figures beside it
            parts += [unicodedata.normalize("NFKC", text[start : match.start()]), match[0]]
            start = match.end()
    return ("".join(parts) + unicodedata.normalize("NFKC", text[start:])).translate(_SLASHES)


def _stacked(match: re.Match[str]) -> str:
    before, *parts = match.groups()
    return f"{before} "[: 2 * len(before)] + unicodedata.normalize("NFKC", "\u2044".join(parts))


def _power(match: re.Match[str]) -> str:
    return "^" + unicodedata.normalize("NFKC", match[1]).replace("\u2212", "-").lstrip("+")


# --- words ---

_UP_TO_19 = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_UNITS = _UP_TO_19.split()
_WORDS = {word: i for i, word in enumerate(_UNITS)} | {word: 10 * i for i, word in enumerate(_TENS.split(), start=2)}
_BIG = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALES = _BIG | {"k": 10**3, "lakh": 10**5, "lakhs": 10**5, "crore": 10**7, "crores": 10**7}
_MONEY_SCALES = {"m": 10**6, "mn": 10**6, "b": 10**9, "bn": 10**9}  # "$5M"; "5m" is a length
_PARTS = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4} | {
    name + ending: size
    for size, name in {3: "third", 4: "fourth", 5: "fifth", 6: "sixth", 7: "seventh", 8: "eighth", 9: "ninth"}.items()
    for ending in ("", "s")
}
_PARTS |= {"tenth": 10, "tenths": 10, "hundredth": 100, "hundredths": 100, "thousandth": 1000, "thousandths": 1000}


def _any(words: Iterable[str]) -> str:
    """A pattern for one of the words."""
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_AND_PART = rf" and (?P<and_count>an?|{_any(_UNITS[1:10])})[ -](?P<and_part>{_any(_PARTS)})\b"  # "two and a half"
_AFTER_BIG = "(?:" + "|".join(f"(?<={word})" for word in _BIG) + ")"
_NUMBER_WORD = _any([*_WORDS, *_BIG])
_SPELLED = re.compile(
    r"\b(?P<minus>(?:negative|minus) )?"
    rf"(?P<words>(?:{_NUMBER_WORD})"
    rf"(?:(?:[ -]|{_AFTER_BIG},? and |{_AFTER_BIG}, (?=[a-z]+ hundred))(?:{_NUMBER_WORD}))*)\b"
    rf"(?: point(?P<decimals>(?: (?:{_any(_UNITS[:10])}))+)\b|{_AND_PART}|[ -](?P<part>{_any(_PARTS)})\b)?"
    rf"(?: (?P<scale>{_any(_BIG)})\b)?(?P<other>-(?:first|second)\b| and (?:an? )?half\b)?(?:[ -]dozen\b)?",
    re.IGNORECASE,
)


def _is_ordinal(match: re.Match[str]) -> bool:
    """Whether words are a place, such as "twenty-first" or "twenty-third"; "one third" is a number."""
    is_place = match["part"] and match["part"][-1] not in "sS" and match["words"].lower() != "one"
    return bool(is_place or (match["other"] or "").lower() in ("-first", "-second"))


def _spelled(match: re.Match[str]) -> Fraction | None:
    """The value of a number in words; None where it has none, such as "nineteen eighty"."""
    value = _whole(match["words"].lower())
    if value is None or match["other"]:
        return None
    if match["decimals"]:
        figures = "".join(str(_WORDS[word]) for word in match["decimals"].lower().split())
        return (value + Fraction(f"0.{figures}")) * _scale(match["scale"])
    if match["and_part"]:
        if match["words"].lower().endswith(tuple(_BIG)):  # "a million and a half" is no 1,000,000.5
            return None
        return (value + _part(match)) * _scale(match["scale"])
    if match["part"] and not (match["part"].lower() == "quarters" and value != 3):  # twelve quarters are coins
        return value / _PARTS[match["part"].lower()] * _scale(match["scale"])
    return value * _scale(match["scale"])


def _part(match: re.Match[str]) -> Fraction:
    """The half of "and a half"."""
    return Fraction(_WORDS.get(match["and_count"].lower(), 1), _PARTS[match["and_part"].lower()])


def _scale(word: str | None) -> int:
    return (_SCALES | _MONEY_SCALES)[word.lower()] if word else 1


def _whole(words: str) -> Fraction | None:
    """ "one hundred and twenty-four" is 124; None for words that make up no number."""
    total = part = 0
    last_scale = 10**15
    for word in re.findall(r"[a-z]+", words):
        if word == "hundred":
            if part > 99:
                return None
            part = (part or 1) * 100
        elif word in _BIG:
            if _BIG[word] >= last_scale:
                return None
            last_scale = _BIG[word]
            total, part = total + (part or 1) * last_scale, 0
        elif word != "and":
            # Ones go behind tens, and both behind hundreds: "twenty five" and no "five twenty" or "twenty eleven".
            free = 100 if part % 100 == 0 else 10 if part % 10 == 0 and part % 100 >= 20 else 0
            if not (_WORDS[word] < free and (_WORDS[word] or not part)):
                return None
            part += _WORDS[word]
    return Fraction(total + part)


# --- figures ---

_FIRST = r"[1-9]\d{0,2}"
_WHOLE = "|".join(
    (
        rf"{_FIRST}(?:,\d{{3}})+",  # 1,080
        r"[1-9]\d?(?:,\d{2})+,\d{3}",  # 1,23,456
        rf"{_FIRST}(?:['\u2019]\d{{3}})+",  # 1'080
        rf"{_FIRST}(?:_\d{{3}})+",  # 1_080
        rf"(?<!\d ){_FIRST}(?: \d{{3}})+(?! ?\d)(?!-[a-z])",  # 1 080
        r"\d+",
    )
)
_RAISED_TO = r" ?(?:\^|\*\*) ?"
_EXPONENT = r"\{-?\d{1,3}\}|\(-?\d{1,3}\)|-?\d{1,3}"
_POWERS = "|".join(
    (
        r"e(?P<e>[+-]?\d{1,3})",  # 1e3
        rf"{_RAISED_TO}(?P<power>{_EXPONENT})",  # 10^3, 10**3, 10^{3}
        rf"\s?(?:[\u00d7x*\u00b7])\s?10{_RAISED_TO}(?P<ten>{_EXPONENT})",  # 2.5 x 10^4
        r" to the power (?:of )?(?P<to_power>-?\d{1,3})",
        r" to the (?P<nth>\d{1,3})(?:st|nd|rd|th) power",
        r" (?P<named>squared|cubed)(?=\s*(?:[.;:!?)=]|\Z))",
    )
)
_UNIT_NAMES = (
    "kg mg g lb lbs oz km cm mm m mi ft in inch inches yd yds l ml h hr hrs hour hours min mins minute minutes s sec "
    "secs second seconds ms day days week weeks month months year years yrs mph kmh kph kwh c f am pm a.m p.m usd eur "
    "gbp inr dollar dollars cent cents euro euros pound pounds percent pct mile miles meter meters metre metres foot "
    "feet gram grams liter liters litre litres degrees people times points pts cal kcal gb mb kb"
)
_LETTERS = r"A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u024f\u0370-\u03ff\u0400-\u04ff"
_SIGNS = (
    r"\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u2189\u2460-\u24ff\u2776-\u2793"  # they stand for figures
)
_ENDS = (  # where a number is over; what goes on in any other way is garbled
    rf"(?![\d_^{_LETTERS}{_SIGNS}]|[.,/'\u2019]\d|:\d\d?(?!\d)|/[nxyz](?![a-z])| ?\*\*(?=[\w({{])"
    r"| ?\^|\s?(?:\\(?:pi|sqrt)\b|[\u03c0\u221a]))"
    r"(?!-(?:st|nd|rd|th)\b)"
)
_MONEY = r"(?:(?:US|A|C)?[$\u20ac\u00a3\u20b9\u00a5] ?)"
_BEFORE_FIGURE = rf"(?={_MONEY}?\.?\d)"
_FIGURES = re.compile(
    # What comes before: a root, "plus or minus" or a quotient of more than figures leaves no value.
    r"(?<![\w.^])(?<!\^\{)(?P<not_alone>(?:\u221a|\\sqrt\{?|\u00b1|\\pm|\\[dt]?frac\{?) ?)?"
    r"(?P<negative>(?:negative|minus) )?"
    # A minus sign with a blank after it is a dash or a bullet, but where the number would begin.
    rf"(?P<minus>(?<![)\]])-{_BEFORE_FIGURE}|(?:(?<![\s\S])|(?<=[=:(]\s)|(?<=\bis\s))- {_BEFORE_FIGURE})?"
    rf"(?P<money>{_MONEY})?(?P<inner>-)?"
    r"(?:(?P<ordinal>\d[\d,]*(?:st|nd|rd|th)\b)|"
    # The number itself.
    r"(?:(?P<beside>\d{1,4})(?: | and | & )(?P<over>\d{1,3})/(?P<under>\d{1,3})"  # 2 1/2
    rf"|(?P<value>(?:{_WHOLE})(?:\.\d+)?|\.\d+)"
    rf"(?:{_POWERS}|:00(?![:\d])|/(?P<divisor>\d+)|{_AND_PART}"
    rf"|[ -](?P<part>{_any(name for name in _PARTS if name.endswith('s') and name != 'quarters')})\b)?)"
    # What comes after.
    rf"(?:[\s-]?(?P<scale>{_any(_SCALES)})\b|(?(money)\s?(?P<money_scale>{_any(_MONEY_SCALES)})\b|(?!))"
    rf"|(?:{_any(_UNIT_NAMES.split())})(?:(?![\w'])\^?\{{?[23]\}}?|[23]|)(?![\w'])|(?-i:[AVW])\b)?"
    rf"(?:[ -]dozen\b)?{_ENDS}"
    rf"|(?P<garbled>\d(?:[\w{_SIGNS}]|[.,:/'\u2019*](?=\d)| ?\^ ?(?:\{{[^{{}}\n]{{0,40}}\}}|-(?=\w))?"
    r"| ?\*\*(?=[\w({]))*))",
    re.IGNORECASE,
)


def _figures(match: re.Match[str]) -> Fraction | None:
    """The value of a number in figures; None where it is garbled or too long, or more than a number."""
    if match["garbled"] or match["not_alone"] or len(match[0]) > _MOST_DIGITS + 20:
        return None
    if match["beside"]:
        if int(match["over"]) >= int(match["under"]):
            return None
        value = int(match["beside"]) + Fraction(int(match["over"]), int(match["under"]))
        return value * _scale(match["scale"] or match["money_scale"])
    figures = re.sub(r"[,'\u2019_ ]", "", match["value"])
    if len(figures) > _MOST_DIGITS or ("." in figures and match.string.startswith("..", match.end())):
        return None
    base, factor, exponent = Fraction(figures), Fraction(1), 1
    if exponents := match["power"] or match["to_power"] or match["nth"]:
        exponent = int(exponents.strip("{}()"))
    elif match["named"]:
        exponent = 2 if match["named"].lower() == "squared" else 3
    elif exponents := match["e"] or match["ten"]:
        base, factor, exponent = Fraction(10), base, int(exponents.strip("{}()"))
    power = _raised(base, exponent)
    if power is None:
        return None
    value = factor * power
    if match["and_part"]:
        value += _part(match)
    if match["part"]:
        value /= _PARTS[match["part"].lower()]
    return value / (int(match["divisor"] or 1) or 1) * _scale(match["scale"] or match["money_scale"])


def _raised(base: Fraction, exponent: int) -> Fraction | None:
    """A power; None where it has too many digits or is none."""
    if len(str(base)) * abs(exponent) > 2 * _MOST_DIGITS or (base == 0 and exponent <= 0):
        return None
    return base**exponent


# --- both ---


class Amount(NamedTuple):
    """A number in a text: its canonical spelling ("-1080", "3.5", "1/3"), where it stands, and whether in words.

    `value` is None where the number is not understood as a whole.
    """

    value: str | None
    start: int
    end: int
    in_words: bool = False


@lru_cache(maxsize=16)  # a reader asks again and again
def amounts(text: str) -> tuple[Amount, ...]:
    """The numbers in a text, in their order; `text` is folded (`fold`). Ordinals are left out."""
    found: list[Amount] = []
    for match in _FIGURES.finditer(text):
        if match["ordinal"]:
            continue
        if _is_listing(match):
            found += _listed(match)
            continue
        if (
            match["value"] == match[0] and match[0].isdecimal() and len(match[0]) <= _MOST_DIGITS
        ):  # most are; saves time
            found.append(Amount(str(int(match[0])), match.start(), match.end()))
            continue
        value = _figures(match)
        is_negative = match["negative"] or match["minus"] or match["inner"]
        found.append(Amount(_canonical(value, bool(is_negative)), match.start(), match.end()))
    found += [
        Amount(_canonical(_spelled(match), bool(match["minus"])), match.start(), match.end(), True)
        for match in _SPELLED.finditer(text)
        if not _is_ordinal(match)
    ]
    found += [Amount(None, match.start(), match.end(), True) for match in _DOZENS.finditer(text)]
    found.sort(key=lambda amount: (amount.start, -amount.end))
    apart: list[Amount] = []
    for amount in found:  # the "hundred" of "5 hundred" is no number of its own
        if not apart or amount.start >= apart[-1].end:
            apart.append(amount)
    return _joined(text, apart)


# "12 dollars and 50 cents", "5 feet 6 inches": two numbers that are one amount.
_BIG_UNIT = re.compile(
    r"(?:\s(?:(?P<money>dollars?|bucks|euros?|pounds?)|(?P<other>hours?|minutes?|feet|foot|weeks?|days?|years?)))?"
    r"(?P<and>,? and)? ",
    re.IGNORECASE,
)
_SMALL_UNIT = re.compile(
    r" (?:(?P<money>cents?|pence)|(?P<other>minutes?|seconds?|inch(?:es)?|days?|hours?|months?|ounces?))\b",
    re.IGNORECASE,
)


def _joined(text: str, found: list[Amount]) -> tuple[Amount, ...]:
    """The amounts, with those in two units as one: dollars with cents in dollars, of the rest only "2 hours 0 minutes".

    Others, such as 5 feet 6 inches, have no value, since the unit in which they are meant cannot be told.
    """
    joined: list[Amount] = []
    for amount in found:
        small = _SMALL_UNIT.match(text, amount.end) if joined else None
        big = _BIG_UNIT.fullmatch(text, joined[-1].end, amount.start) if small else None
        if not big or not small:
            joined.append(amount)
            continue
        first = joined[-1]
        is_sign = text[first.start] in "$\u20ac\u00a3" and big["and"] is not None
        is_money = small["money"] and (big["money"] or is_sign)
        if not is_money and not (small["other"] and (big["other"] or (big["money"] or "").startswith("pound"))):
            joined.append(amount)
            continue
        value = None
        if first.value and amount.value and Fraction(amount.value) in range(100 if is_money else 1):
            cents = Fraction(amount.value) / 100
            value = canonical(Fraction(first.value) + (-cents if first.value.startswith("-") else cents))
        joined[-1] = Amount(value, first.start, amount.end, first.in_words)
    return tuple(joined)


_DOZENS = re.compile(r"\b(?<!-)dozens?\b", re.IGNORECASE)


_AMOUNT_FOLLOWS = re.compile(rf"\s?(?:[$\u20ac\u00a3\u20b9%]|(?:{_any(_UNIT_NAMES.split())})\b)", re.IGNORECASE)


def _is_listing(match: re.Match[str]) -> bool:
    """Whether a garbled number is a list without blanks, "12,34" or "2,4,6", and no amount with a decimal comma."""
    if not match["garbled"] or match["not_alone"] or match["money"] or _AMOUNT_FOLLOWS.match(match.string, match.end()):
        return False
    return re.fullmatch(r"[1-9]\d+,[1-9]\d+|[1-9]\d*(?:,[1-9]\d*){2,}", match["garbled"]) is not None


def _listed(match: re.Match[str]) -> list[Amount]:
    """The numbers of "12,34", which is no grouping of digits."""
    starts = [part.start() + match.start("garbled") for part in re.finditer(r"\d+", match["garbled"])]
    parts = match["garbled"].split(",")
    return [
        Amount(part if len(part) <= _MOST_DIGITS else None, start, start + len(part))
        for part, start in zip(parts, starts, strict=True)
    ]


def _canonical(value: Fraction | None, is_negative: bool) -> str | None:
    return None if value is None else canonical(-value if is_negative else value)


def canonical(value: Fraction) -> str:
    """A decimal where it is exact and short, else a fraction in lowest terms."""
    decimal = Decimal(value.numerator) / Decimal(value.denominator)
    return f"{decimal.normalize():f}" if Fraction(decimal) == value else str(value)
