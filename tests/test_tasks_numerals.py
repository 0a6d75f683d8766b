"""Numbers in figures and words: what is written in any supported way is read back, and nothing is read in part."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sva.tasks.grading import answers
from sva.tasks.grading.amounts import final_number
from sva.tasks.grading.numerals import amounts, canonical, fold

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
VULGAR = {"½": Fraction(1, 2), "⅓": Fraction(1, 3), "¾": Fraction(3, 4), "⅝": Fraction(5, 8), "⅞": Fraction(7, 8)}
RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def values(text):
    return [amount.value for amount in amounts(fold(text))]


def spelled(n):
    """A whole number below a billion in words, written for this test."""
    for size, name in ((10**6, "million"), (10**3, "thousand"), (100, "hundred")):
        if n >= size:
            rest = n % size
            joint = " and " if size == 100 else " "
            return f"{spelled(n // size)} {name}" + (joint + spelled(rest) if rest else "")
    if n < 20:
        return UNITS.split()[n]
    return TENS.split()[n // 10 - 2] + (f"-{UNITS.split()[n % 10]}" if n % 10 else "")


def indian(n):
    head, tail = str(n)[:-3], str(n)[-3:]
    pairs = []
    while head:
        pairs.insert(0, head[-2:])
        head = head[:-2]
    return ",".join([*pairs, tail])


GROUPED = [
    str,
    lambda n: f"{n:,}",
    lambda n: f"{n:_}",
    lambda n: f"{n:,}".replace(",", " "),
    lambda n: f"{n:,}".replace(",", "\u00a0"),
    lambda n: f"{n:,}".replace(",", "'"),
    lambda n: f"{n:,}".replace(",", "\u2019"),
    lambda n: f"{n:,}".replace(",", "\\,"),
    lambda n: f"{n:,}".replace(",", "{,}"),
    indian,
    spelled,
]


@given(n=st.integers(0, 10**9 - 1), write=st.sampled_from(GROUPED), sign=st.sampled_from(["", "-", "minus ", "\u2212"]))
@settings(max_examples=300, deadline=None)
def test_a_whole_number_is_read_back_however_it_is_written(n, write, sign):
    number = f"-{n}" if sign and n else str(n)
    if write is spelled:
        sign = "minus " if sign else ""
    assert final_number(f"So the answer is {sign}{write(n)}.") == number


@given(whole=st.integers(0, 9_999), part=st.sampled_from(sorted(VULGAR)), blank=st.sampled_from(["", " "]))
def test_a_mixed_number_is_its_whole_and_its_part(whole, part, blank):
    value = whole + VULGAR[part]
    plain = f"{VULGAR[part].numerator}/{VULGAR[part].denominator}"
    for text in (f"{whole}{blank}{part}", f"{whole} {plain}", f"{whole} and {plain}", f"{whole} \\frac{{1}}{{2}}"):
        right = whole + Fraction(1, 2) if "frac" in text else value
        assert final_number(f"The answer is {text}.") == canonical(right)


@given(base=st.integers(2, 99), exponent=st.integers(0, 9))
def test_a_power_is_its_value(base, exponent):
    raised = str(exponent).translate(RAISED)
    for text in (f"{base}^{exponent}", f"{base}**{exponent}", f"{base}^{{{exponent}}}", f"{base}{raised}"):
        assert final_number(f"The answer is {text}.") == str(base**exponent)


@given(digits=st.decimals(min_value="0.1", max_value=999, places=2), exponent=st.integers(-9, 9))
def test_a_number_with_a_power_of_ten_is_its_value(digits, exponent):
    right = canonical(Fraction(digits) * Fraction(10) ** exponent)
    raised = str(exponent).replace("-", "\u207b").translate(RAISED)
    for power in (
        f"e{exponent}",
        f" x 10^{exponent}",
        f" × 10{raised}",
        f" \\times 10^{{{exponent}}}",
        f"*10**{exponent}",
    ):
        assert final_number(f"The answer is {digits}{power}.") == right


@given(
    n=st.integers(0, 10**7),
    write=st.sampled_from([str, lambda n: f"{n:,}", lambda n: f"{n:_}", lambda n: f"{n}.5", lambda n: f"{n}/7"]),
    garbage=st.sampled_from(
        [
            "abc",
            "x",
            "½5",
            "^x",
            "^{n}",
            "**n",
            ".5.5",
            ",08",
            ",0",
            "'1",
            "_1",
            ":30",
            "π",
            "\\pi",
            "²³½",
            "①",
            "/x",
            "₁₀",
        ]
    ),
)
@settings(max_examples=300, deadline=None)
def test_garbage_behind_a_number_never_leaves_its_beginning(n, write, garbage):
    number = write(n)
    found = final_number(f"The answer is {number}{garbage}.")
    assert found is None or found not in (values(number)[0], str(n), *(str(n)[:i] for i in range(1, len(str(n)))))


NUMERIC = "0123456789½⅓²³①₂,.'^*/:_ -+xe\u00a0\u2044$%()[]{}\\\u0663\u0967"
TEXTS = st.text(st.sampled_from(NUMERIC), max_size=40) | st.text(max_size=60)


@given(
    text=TEXTS
    | st.lists(st.sampled_from([*UNITS.split(), "hundred", "and", "a", "half", "thirds", "-", "dozen", "point"])).map(
        " ".join
    )
)
@settings(max_examples=500, deadline=None)
def test_no_text_makes_a_reader_raise(text):
    for amount in amounts(fold(text)):
        assert amount.value is None or Fraction(amount.value) is not None
        assert amount.start < amount.end
    final_number(text)
    final_number(f"The answer is {text}")
    answers.find(text, "number")


@given(text=st.text(st.sampled_from(NUMERIC), max_size=40))
@settings(max_examples=300, deadline=None)
def test_folding_twice_changes_nothing_and_makes_no_longer_number(text):
    assert fold(fold(text)) == fold(text)


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("10½", "10 1/2"),
        ("½", "1/2"),
        ("10³", "10^3"),
        ("10⁻³", "10^-3"),
        ("2⁵⁄₈", "2 5/8"),
        ("m²", "m2"),
        ("１８", "18"),
        ("18①", "18①"),
        ("½5", "½5"),
        ("ﬁve", "five"),
    ],
)
def test_folding_keeps_the_value_of_numbers(text, folded):
    assert fold(text) == folded


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("10³", "1000"),
        ("1,23,456", "123456"),
        ("1'080", "1080"),
        ("1 080", "1080"),
        ("1e3", "1000"),
        ("twenty-one", "21"),
        ("two thousand", "2000"),
        ("10½", None),
        ("10²³½", None),
        ("1,08", None),
        ("2 dozen", "2"),
        ("3:30", None),
        ("12abc", None),
    ],
)
def test_the_form_number_reads_the_same_numbers(text, found):
    assert answers.find(text, "number") == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the 21st of 3", ["3"]),
        ("twenty-third", []),
        ("five hundred, two", ["500", "2"]),
        ("a 12-year-old", ["12"]),
        ("two dozen", ["2"]),
        ("a dozen", [None]),
        ("twelve quarters", ["12"]),
        ("12 quarters", ["12"]),
        ("three quarters", ["0.75"]),
        ("Week 3:210 pages", ["3", "210"]),
        ("240A", ["240"]),
        ("5 hundred", ["500"]),
        ("1/0", ["1"]),
        ("12,34", ["12", "34"]),
        ("20 - 5", ["20", "5"]),
        ("$5B and 5m", ["5000000000", "5"]),
    ],
)
def test_numbers_are_found_in_their_order(text, found):
    assert values(text) == found
