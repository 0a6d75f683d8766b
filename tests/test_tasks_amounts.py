"""Which number a solution ends in, over the ways in which people and models write numbers."""

import pytest
from growth import is_linear

from sva.tasks.grading.amounts import final_number
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


# Numbers behind a stated answer: they do not replace it, unless they correct it or answer on.
BEHIND = [
    # a remark
    ("4 * 30 = 120.\n\nIn 4 weeks she saves 120 dollars. That is about 4.3 dollars a day.", "120"),
    ("4 * 30 = 120. So she saves $120. That's roughly $4.29 per day.", "120"),
    ("4 * 30 = 120. So she saves $120. This is approximately 2 bills of 50.", "120"),
    ("Therefore, he needs 16 hours. That is almost 2 working days.", "16"),
    ("So the car uses 35 liters. On average, that is 7 liters per 100 km.", "35"),
    ("Thus he reads 84 pages. This is more than 80 pages.", "84"),
    ("4 * 30 = 120. Then 120 - 20 = 100. That is about 14 per day.", "14"),
    ("She saves 120 dollars in 4 weeks. That is about 30 dollars a week.", "30"),
    ("So she has 120 left. That is 20 less than she needs, so she needs 140.", "140"),
    # a check
    ("36 / 3 = 12. So each gets 12 marbles. Check: 3 x 12 = 36.", "12"),
    ("So each gets 12 marbles. To verify: 12 + 12 + 12 = 36, and that is what they had.", "12"),
    ("36 / 3 = 12. Each brother gets 12 marbles.\n\nLet's check: 12 * 3 = 36.", "12"),
    ("Therefore there are 7 cats.\n\nVerification: 7 * 4 = 28 legs.", "7"),
    ("So each gets 12 marbles. Let's verify this: 3 x 12 = 36. That matches the 36 marbles.", "12"),
    ("So each gets 12 marbles. Check: 3 x 12 = 38. That is wrong, so each gets 13.", "13"),
    ("So each gets 12 marbles. Check: 3 x 15 = 45.", "45"),
    ("Check the price: 3 * 12 = 36.", "36"),
    ("So we have 12 left. To check the total we add: 12 + 5 = 17. So she has 17.", "17"),
    # dollars and cents
    ("She has 12 dollars and 50 cents.", "12.5"),
    ("The answer is 12 dollars and 5 cents.", "12.05"),
    ("It costs twelve dollars and fifty cents.", "12.5"),
    ("The answer is $3 and 25 cents.", "3.25"),
    ("He pays 7 euros and 0 cents.", "7"),
    ("He pays 7 pounds and 20 pence.", "7.2"),
    ("The answer is 1 dollar 75 cents.", "1.75"),
    ("Her balance is -3 dollars and 25 cents.", "-3.25"),
    ("She has 3 dollars and 250 cents.", None),
    ("She has 12 dollars and 50 cents in 3 coins.", "12.5"),
    ("It took 2 hours and 30 minutes.", None),
    ("It took 2 hours and 0 minutes.", "2"),
    ("He is 5 feet 6 inches tall.", None),
    ("He has 2 dollars and 3 coins of 50 cents.", "50"),
    # numbers of the question in the same sentence
    ("She has 5 apples left after giving 7 apples to her 2 brothers.", "5"),
    ("He has 15 dollars left after buying 3 books at $5 each.", "15"),
    ("She earns $45 by selling 9 cups.", "45"),
    ("She earned $45 from selling 9 cups for $5 each.", "45"),
    ("He paid $12 for renting 2 bikes.", "12"),
    ("After giving 7 apples away she has 5 left.", "5"),
    ("He had 20, and after giving away 5 he has 15 left.", "15"),
    ("She gets 45 by adding 20 and 25.", "45"),
    ("She makes 18 dollars a day because she sells 9 eggs at 2 dollars.", "18"),
    ("He had 20 apples, and because he ate 5, he has 15.", "15"),
    # an intermediate value behind the answer
    ("So she earns $686, of which $126 is overtime pay.", "686"),
    ("560 + 126 = 686. So she earns $686: $560 for regular hours and $126 for overtime.", "686"),
    ("560 + 126 = 686. So she earns $686 in total, with $126 from overtime.", "686"),
    ("560 + 126 = 686. So she earns $686 \u2013 $560 regular and $126 overtime.", "686"),
    ("He has 30 pens, 12 of which are red.", "30"),
    ("20 - 8 = 12. So 12 are left, which is 60% of the 20.", "12"),
    ("She has 14 apples, which is 4 more than Tom has.", "14"),
    ("3 times 5, which is 15 dollars", "15"),
    ("He has 30 pens, of which 12 are red, so 18 are blue.", "18"),
    ("560 + 126 = 686. So for 2 people: $1,372.", "1372"),
    ("16 - 7 = 9. So she sells 9 eggs: 9 at $2 make $18.", "18"),
    ("20 - 5 = 15. From the 15 cookies he has 4 left.", "4"),
]


@pytest.mark.parametrize(("text", "number"), BEHIND)
def test_numbers_behind_the_answer_do_not_replace_it(text, number):
    assert final_number(text) == number


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
    assert is_linear(final_number, piece)
    assert is_linear(lambda text: final_number("The answer is " + text), piece)
