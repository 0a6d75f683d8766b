"""Answers to MATH-like problems compared by value; tests/completions/math_values.txt holds right and wrong ones."""

import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from sva.tasks import math_hendrycks
from sva.tasks.grading import math_answers
from sva.tasks.grading.worker import Worker

TABLE = (Path(__file__).parent / "completions" / "math_values.txt").read_text()
ROWS = [line.rsplit(" | ", 2) for line in TABLE.splitlines() if not line.startswith("#")]

properties = settings(deadline=None, max_examples=60)


def is_right(gold, answer):
    return math_hendrycks.strict(f"So it is $\\boxed{{{answer}}}$.", gold).correct


@pytest.mark.parametrize(("gold", "answer", "verdict"), ROWS)
def test_an_answer_is_right_where_its_value_is(gold, answer, verdict):
    assert is_right(gold, answer) == (verdict == "right")


def test_the_table_is_large_and_has_both_verdicts():
    assert len(ROWS) > 300
    assert sum(verdict == "wrong" for _, _, verdict in ROWS) > 90


# The cases of issue 22.
@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("10^{-20}", "10^{-30}"),
        ("0.00000001", "0.00000002"),
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
        (r"1 - \frac{1}{\mathrm{e}}", r"1 + \frac{1}{\mathrm{e}}"),
        ("4", r"4\sqrt(2)"),
        (r"1, 2, \ldots, n", r"1, 3, 5, \ldots, 2n-1"),
    ],
)
def test_answers_of_another_value_are_wrong(gold, answer):
    assert not is_right(gold, answer)


@pytest.mark.parametrize(
    ("gold", "completion"),
    [
        ("xy", r"\boxed{x \cdot y}"),
        ("xy", r"\boxed{yx}"),
        (r"0.\overline{3}", r"\boxed{\frac13}"),
        ("6000", r"\boxed{6e3}"),
        (r"\frac{1}{2}", r"\boxed{\sin 30^\circ}"),
        ("2,3", r"\boxed{2} and \boxed{3}"),
    ],
)
def test_right_answers_in_other_forms_are_right(gold, completion):
    assert math_hendrycks.strict(f"So it is {completion}.", gold).correct


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"$x = \boxed{2}$ or $x = \boxed{-3}$", "2,-3"),
        (r"\(\boxed{1}\), \(\boxed{2}\), and \(\boxed{3}\)", "1,2,3"),
        (r"$\boxed{2} \text{ and } \boxed{3}$", "2,3"),
        (r"$\boxed{7}$, $\boxed{7}$", "7"),
        (r"First $\boxed{2}$. Then we add, and so $\boxed{5}$.", "5"),
        (r"$\boxed{2} + \boxed{3} = \boxed{5}$", "5"),
        (r"\boxed 10 is it", "10"),
        (r"The roots are $x = 1, x = -2$.", "x = 1, x = -2"),
    ],
)
def test_boxes_that_are_joined_are_one_answer(completion, answer):
    assert math_answers.final_answer(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("100 mod 7 = 2.\n\n**Saturday**", "Saturday"),
        ("There are 3 of them, and Ann is last. So the winner is **Ann**.", "Ann"),
        ("The day 3 days later is a **Tuesday**", "Tuesday"),
        ("By 2 tests, the function is:\n**odd**.", "odd"),
        ("100 mod 7 = 2.\n\n**42**", "42"),
        ("**Step 1**\nWe add.\n\n**$\\frac{1}{2}$**", "\\frac{1}{2}"),
        ("**Sunday**\n\nThere are 7 days in a week.", "7"),
        ("So there are 5.\n\n**Explanation:**", "5"),
        ("So there are 5.\n\n**Note**", "5"),
        ("The number is **not** 5.", "5"),
        ("So 5 is **correct**.", "5"),
        ("The answer is 5.\n\n**Good**", "5"),
        ("It is $\\boxed{5}$.\n\n**Sunday**", "5"),
    ],
)
def test_bold_text_that_a_solution_ends_in_is_its_answer(completion, answer):
    assert math_answers.final_answer(completion) == answer


@pytest.mark.parametrize(
    "answer",
    [r"5 + \foo{3}", r"\frac{5}{1", "5 +", r"5, \ldots", r"\sum_{i} 5", "5-", "5 § 3", "((((5", r"5 \\ 5", "5 5"],
)
def test_what_cannot_be_read_to_its_end_says_so(answer):
    verdict = math_hendrycks.compare("strict", "5", answer)
    assert not verdict.equal
    assert verdict.note.startswith("unreadable: ")


fractions = st.fractions(min_value=-1000, max_value=1000, max_denominator=400)


def written(value, way):
    """A fraction in LaTeX, in one of several ways."""
    sign, above, below = "-" if value < 0 else "", abs(value.numerator), value.denominator
    whole, rest = divmod(above, below)
    return [
        f"{sign}\\frac{{{above}}}{{{below}}}",
        f"{value.numerator}/{below}",
        f"{sign}\\dfrac{{{7 * above}}}{{{7 * below}}}",
        f"{sign}{whole}\\frac{{{rest}}}{{{below}}}" if rest and whole else f"{sign}{above} \\div {below}",
        f"{sign}{above} \\cdot {below}^{{-1}}",
        f"{sign}\\left({above}/{below}\\right)",
    ][way]


@given(fractions, st.integers(0, 5), st.integers(0, 5))
@properties
def test_a_number_written_in_two_ways_is_one_number(value, one, other):
    assert math_hendrycks.compare("strict", written(value, one), written(value, other)).equal


@given(fractions, fractions, st.integers(0, 5), st.integers(0, 5))
@properties
def test_two_different_numbers_are_never_equal(a, b, one, other):
    assume(a != b)
    assert not math_hendrycks.compare("strict", written(a, one), written(b, other)).equal


@given(st.integers(1, 10**30), st.integers(-60, 60), st.integers(1, 9))
@properties
def test_numbers_that_differ_in_their_last_digit_differ(digits, exponent, step):
    a, b = f"{digits} \\times 10^{{{exponent}}}", f"{digits + step} \\times 10^{{{exponent}}}"
    assert math_hendrycks.compare("strict", a, f"{digits}e{exponent}").equal
    assert not math_hendrycks.compare("strict", a, b).equal


@given(st.integers(0, 999), st.integers(1, 999))
@properties
def test_repeating_decimals_are_fractions(before, digits):
    value = Fraction(before, 1000) + Fraction(digits, 999 * 1000)
    text = f"0.{before:03}\\overline{{{digits:03}}}"
    assert math_hendrycks.compare("strict", text, f"\\frac{{{value.numerator}}}{{{value.denominator}}}").equal
    assert not math_hendrycks.compare("strict", text, f"0.{before:03}{digits:03}").equal


roots = st.lists(st.integers(-9, 9), min_size=1, max_size=4)


def expanded(roots):
    powers = [1]
    for root in roots:
        powers = [a - root * b for a, b in zip([*powers, 0], [0, *powers], strict=True)]
    return "+".join(f"({a})x^{{{len(powers) - 1 - i}}}" for i, a in enumerate(powers))


@given(roots, roots)
@properties
def test_products_are_equal_to_their_expansion_and_to_no_other(some, others):
    product = "".join(f"(x-{root})" if root >= 0 else f"(x+{-root})" for root in some)
    assert math_hendrycks.compare("strict", product, expanded(some)).equal
    assert math_hendrycks.compare("strict", product, expanded(others)).equal == (sorted(some) == sorted(others))


@given(st.lists(st.integers(-99, 99), min_size=2, max_size=5, unique=True), st.randoms())
@properties
def test_lists_and_sets_have_no_order_and_points_have_one(items, random):
    shuffled = random.sample(items, len(items))
    a, b = (", ".join(map(str, values)) for values in (items, shuffled))
    assert math_hendrycks.compare("strict", a, b).equal
    assert math_hendrycks.compare("strict", f"\\{{{a}\\}}", f"\\{{{b}\\}}").equal
    assert math_hendrycks.compare("strict", f"({a})", f"({b})").equal == (items == shuffled)
    assert not math_hendrycks.compare("strict", a, ", ".join(map(str, items[1:]))).equal


_PIECES = r"""
0 1 2 10 3.5 .5 1,000 x y n e i \pi \infty + - * / ^ _ = < > \le \in ( ) [ ] { } | , : ! % ' & \\ $ \{ \}
\frac \sqrt \sin \log \binom \overline \text{and} \text{cm} \cup \pm \cdot \circ \begin{pmatrix} \end{pmatrix}
\lfloor \rfloor \ldots \foo ½ ² ° √ word and 9^{9^9} (2)(3) 7! \mathbb{R} \langle \max \approx \gcd
"""
PIECES = _PIECES.split()


@pytest.fixture(scope="module")
def judge():
    worker = Worker("math_worker.py", cpu_secs=1.0)
    yield lambda gold, answer: worker.ask({"policy": "strict", "gold": gold, "answer": answer})
    worker.close()


@given(st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join) | st.text(max_size=40))
@example("\\frac" * 40)
@example("x^" * 100)
@example("(" * 399)
@example("2^{2^{20}} + 1")
@example("\\sqrt{" * 30 + "2" + "}" * 30)
@example("(x+1)^{100000}")
@settings(deadline=None, max_examples=150)
def test_no_answer_raises_or_lingers(judge, text):
    started = time.monotonic()
    for gold in ("5", "(1,2)"):
        verdict = judge(gold, text)
        assert isinstance(verdict.equal, bool)
    math_answers.final_answer(f"The answer is ${text}$. \\boxed{{{text}")
    assert time.monotonic() - started < 60  # two cores shared by many; the worker's own limit is of CPU time
