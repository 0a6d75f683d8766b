"""Which number a solution ends in, over the ways in which people and models write numbers."""

import time

import pytest

from sva.tasks.amounts import final_number
from sva.tasks.gsm8k import Gsm8k


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 10½.", "10.5"),
        ("The answer is 2¾.", "2.75"),
        ("The answer is 1e3.", "1000"),
        ("The answer is 10^3.", "1000"),
        ("The answer is: 1 080", "1080"),
        ("The answer is 1,080.", "1080"),
        ("The answer is 2 1/2.", "2.5"),
        ("The answer is 18%.", "18"),
    ],
)
def test_amounts_are_read_as_people_write_them(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "gold"),
    [("The answer is 10½.", "101"), ("The answer is: 1 080", "80"), ("The answer is 10^3.", "10")],
)
def test_a_part_of_a_number_is_not_the_number(text, gold):
    assert not Gsm8k().grade(text, {"question": "", "answer": f"#### {gold}"}).correct


NEW = [
    # fractions of one character, with a fraction slash, mixed
    ("She needs ⅓ of a cup. The answer is ⅓.", "1/3"),
    ("#### 5⅝", "5.625"),
    ("The answer is ⅞ mile.", "0.875"),
    ("So it takes 3 ½ hours.", "3.5"),
    ("It is 1⁄2.", "0.5"),
    ("The answer is 10 1⁄4 feet.", "10.25"),
    ("\\boxed{1½}", "1.5"),
    ("The answer is -2½.", "-2.5"),
    ("The answer is $4½ million.", "4500000"),
    ("The answer is ½5.", None),
    ("The answer is \\(2\\frac{1}{2}\\).", "2.5"),
    ("The answer is $\\frac12$.", "0.5"),
    ("The answer is 7 and 1/2 hours.", "7.5"),
    ("The answer is 40 3/8 inches", "40.375"),
    ("The answer is \\frac{10}{x}.", None),
    # powers and exponents
    ("The answer is 10**3.", "1000"),
    ("**Answer:** 10**3", "1000"),
    ("The answer is 10³.", "1000"),
    ("The answer is $10^{3}$.", "1000"),
    ("The answer is 2.5 × 10^4 grams.", "25000"),
    ("The answer is $2.5 \\times 10^{4}$.", "25000"),
    ("The answer is 3 \\cdot 10^2.", "300"),
    ("Answer: 6.02e2", "602"),
    ("Answer: 1.5E+3 m", "1500"),
    ("The answer is 5e-1.", "0.5"),
    ("The answer is 10⁻².", "0.01"),
    ("The answer is 2^10.", "1024"),
    ("The answer is 10 to the power of 3.", "1000"),
    ("The answer is 10^x.", None),
    ("The answer is 2^{n+1}.", None),
    ("The answer is 9^9^9.", None),
    ("The answer is 10^{400}.", None),
    ("The answer is 24 cm².", "24"),
    ("The answer is 24cm^2.", "24"),
    # groups of digits
    ("The answer is 1 080 000 euros.", "1080000"),
    ("She pays 1 080 dollars.", "1080"),
    ("The answer is 1'080.", "1080"),
    ("The answer is CHF 12’500.", "12500"),
    ("The answer is ₹1,23,456.", "123456"),
    ("The answer is 12,34,567.", "1234567"),
    ("The answer is 1_000.", "1000"),
    ("The answer is 1\u00a0080.", "1080"),
    ("The answer is 1\u202f080.", "1080"),
    ("The answer is 2 lakh rupees.", "200000"),
    ("The answer is $2.5M.", "2500000"),
    ("The answer is 5 hundred.", "500"),
    # what is understood in part
    ("The answer is 1,08.", None),
    ("The answer is 1,50 euros.", None),
    ("The answer is 1,0800.", None),
    ("She saved 2,5 kg.", None),
    ("It costs 12,50 euros.", None),
    ("It costs €12,50.", None),
    ("The answer is 3.4.5.", None),
    ("The answer is 12abc.", None),
    ("The answer is 1.080.000.", None),
    ("The answer is 0.333...", None),
    ("The answer is 12/25/2023.", None),
    ("The answer is √16.", None),
    ("The answer is 5\\sqrt{2}.", None),
    ("The answer is 3π.", None),
    ("The answer is 2x.", None),
    ("The answer is ±5.", None),
    ("The answer is 18①.", None),
    ("The answer is 5'11.", None),
    ("The answer is 1_00.", None),
    ("#### 1,08", None),
    ("\\boxed{3x}", None),
    # times and ratios
    ("She gets home at 3:30 pm.", None),
    ("The answer is 3:30 pm.", None),
    ("The answer is 10:05.", None),
    ("The answer is 2:1.", None),
    ("The answer is 5:00 pm.", "5"),
    ("She works from 9:30 to 11:45 and earns $18.", "18"),
    # words
    ("The answer is two and a half.", "2.5"),
    ("The answer is two and a half hours.", "2.5"),
    ("The answer is 2 and a half.", "2.5"),
    ("The answer is three and three quarters.", "3.75"),
    ("The answer is half.", "0.5"),
    ("The answer is one half.", "0.5"),
    ("The answer is two thirds.", "2/3"),
    ("The answer is half a million.", "500000"),
    ("The answer is two point five.", "2.5"),
    ("The answer is one thousand, two hundred and fifty.", "1250"),
    ("The answer is twenty-first.", None),
    ("The answer is nineteen eighty-four.", None),
    ("The answer is a million and a half.", None),
    ("There are 3 boxes of 4. The answer is a dozen.", None),
    ("The answer is minus two and a half.", "-2.5"),
    # percent, ranges, sums, several
    ("The answer is 12.5 %.", "12.5"),
    ("The answer is 0.5 percent.", "0.5"),
    ("The answer is 10-15.", None),
    ("The answer is 10–15 minutes.", None),
    ("The answer is between 10 and 15.", None),
    ("It takes 10-15 minutes.", None),
    ("The answer is 40 + 24.", None),
    ("She has 40 + 24 apples.", None),
    ("The answer is 3, 5 and 7.", None),
    ("\\boxed{18, 20}", None),
    ("The answer is 2 0.", None),
    ("The answer is –5.", "-5"),
    # what comes behind the answer
    ("The answer is 18. Let me know if you have 2 more questions!", "18"),
    ("She makes $18 every day. I hope these 3 steps help!", "18"),
    ("She makes $18 every day.\n\nLet me know if you need 5 more examples. Good luck!", "18"),
    ("So she makes $18.\n\nWould you like me to solve 3 more problems?", "18"),
    ("**18**\n\nFeel free to ask if any of the 4 steps is unclear.", "18"),
    ("She had 16 eggs and ate 3. So she makes $18 every day. She had 16 eggs and ate 3.", "18"),
    (
        "Ducks lay 16 eggs and she eats 3, so 13 are sold at $2. Therefore, she makes $26. Of 16 eggs, 3 are eaten.",
        "26",
    ),
    ("The answer is 18. This answer is based on 16 eggs.", "18"),
    ("She makes $18. This is because she sells 9 eggs at $2 each.", "18"),
    ("The answer is 18. I am 100% sure.", "18"),
    ("Thus there are 42 left. You can check it in 2 ways.", "42"),
    ("So he has 20 left. Then he buys 7 more and has 27.", "27"),
]


@pytest.mark.parametrize(("text", "number"), NEW)
def test_a_number_is_read_whole_or_not_at_all(text, number):
    assert final_number(text) == number


def test_the_table_of_new_answers_is_long_enough():
    assert len(NEW) >= 60


@pytest.mark.parametrize(
    "piece",
    [
        "1 ",
        "1 080 ",
        "1,23,",
        "10^",
        "½",
        "10½",
        "1e",
        "two ",
        "two and ",
        "(a ",
        "half ",
        "\\frac{",
        "$",
        "- ",
        "'1",
        "1:",
    ]
    + [
        "answer is 1 or ",
        "So 1. ",
        "not 1 ",
        "**1",
        "1/2 ",
        "hundred and ",
        "hope this. ",
        "1 x 10",
        "_1",
        "10**",
        "²",
    ],
)
def test_reading_takes_time_linear_in_the_text(piece):
    text = piece * (200_000 // len(piece))
    started = time.process_time()
    final_number(text)
    final_number("The answer is " + text)
    assert time.process_time() - started < 2.0
