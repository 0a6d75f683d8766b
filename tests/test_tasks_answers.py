"""What counts as an answer, over completions of the kinds that small chat models write."""

import pytest

from sva.tasks.grading import amounts, answers, choices

# form, completion, the answer that a fair reader finds in it (None: no single one)
READINGS = [
    # letters of a word
    ("letter", "e", "e"),
    ("letter", "E", "e"),
    ("letter", "e.", "e"),
    ("letter", ' "e" ', "e"),
    ("letter", "**e**", "e"),
    ("letter", "'e'", "e"),
    ("letter", "(e)", "e"),
    ("letter", "`e`", "e"),
    ("letter", "“E.”", "e"),
    ("letter", "\\boxed{e}", "e"),
    ("letter", "Letter: e", "e"),
    ("letter", 'The last letter of the word "table" is "e".', "e"),
    ("letter", "The last letter of the word 'table' is 'e'.", "e"),
    ("letter", 'The last letter of "table" is "e."', "e"),
    ("letter", 'The last letter of the word "table" is the letter E.', "e"),
    ("letter", "The last letter of the word “table” is **e**.", "e"),
    ("letter", "The answer is e", "e"),
    ("letter", "It's e.", None),  # not worth a rule: "it's" links nothing else that small models write
    ("letter", "It is e.", "e"),
    ("letter", "e is the last letter of the word table.", "e"),
    ("letter", "Sure! The last letter is e.", "e"),
    ("letter", "The last letter is:\n\ne", "e"),
    ("letter", 'e (the last letter of "table")', "e"),
    ("letter", 'The last letter of the word "sofa" is a.', "a"),
    ("letter", "A", "a"),
    ("letter", "The last letter is e. The word table ends with e.", "e"),
    ("letter", "e\n\nLet me know if you need anything else!", "e"),
    ("letter", "t-a-b-l-e", None),
    ("letter", "t, a, b, l, e", None),
    ("letter", "e, l", None),
    ("letter", "e or l", None),
    ("letter", "e\nl", None),
    ("letter", "The first letter is t. The last letter is e.", None),
    ("letter", "The first letter is t. So the answer is e.", "e"),
    ("letter", "The answer is t. No, the answer is e.", None),
    ("letter", "Is it e?", None),
    ("letter", "table", None),
    ("letter", "The last letter of the word table is", None),
    ("letter", "", None),
    ("letter", "3", None),
    ("letter", "é", None),
    ("letters", "ta", "ta"),
    ("letters", "TA", "ta"),
    ("letters", "t, a", "ta"),
    ("letters", "T and A", "ta"),
    ("letters", '"t" and "a"', "ta"),
    ("letters", 'The first two letters of the word "table" are "ta".', "ta"),
    ("letters", 'The first two letters of the word "table" are "t" and "a".', "ta"),
    ("letters", "table", "table"),
    ("letters", "t a b", "tab"),
    ("letters", "2", None),
    # numbers
    ("number", "168", "168"),
    ("number", "168.", "168"),
    ("number", "1,023", "1023"),
    ("number", "168.0", "168"),
    ("number", "-7", "-7"),
    ("number", "−7", "-7"),
    ("number", "+7", "7"),
    ("number", "007", "7"),
    ("number", "**168**", "168"),
    ("number", "$168$", "168"),
    ("number", "\\(24 \\times 7 = 168\\)", "168"),
    ("number", "\\boxed{168}", "168"),
    ("number", "24 x 7 = 168", "168"),
    ("number", "24 times 7 is 168.", "168"),
    ("number", "24 times 7 equals 168.", "168"),
    ("number", "24 multiplied by 7 is equal to 168.", "168"),
    ("number", "The product of 24 and 7 is 168.", "168"),
    ("number", "The sum of 345 and 678 is 1,023.", "1023"),
    ("number", "168 is the product of 24 and 7.", "168"),
    ("number", "The answer is 168.", "168"),
    ("number", "Answer: 168", "168"),
    ("number", "20 x 7 = 140. 4 x 7 = 28. The answer is 168.", "168"),
    ("number", "168. This is because 24 x 7 = 168.", "168"),
    ("number", "168 because 24 times 7 makes 168", "168"),
    ("number", "There are 5 words in the list.", "5"),
    ("number", "five", "5"),
    ("number", "5 words", "5"),
    ("number", "The list contains five words.", "5"),
    ("number", "There are a total of 5 words in this list.", "5"),
    ("number", "The number of words in the list is 5.", "5"),
    ("number", "12.5", None),
    ("number", "168 or 170", None),
    ("number", "168, 170", None),
    ("number", "140 + 28", None),
    ("number", "20 x 7 = 140. 4 x 7 = 28.", None),
    ("number", "The answer is 168. Actually the answer is 170.", None),
    ("number", "1,02", None),
    ("number", "24 times 7", None),
    ("number", "I cannot calculate this.", None),
    ("number", "9" * 5_000, None),
    ("number", "9^{9^{9^{9}}}", None),
    ("number", "__import__('os').system('true')", None),
    ("numbers", "12, 45, 93", "12, 45, 93"),
    ("numbers", "12,45,93", "12, 45, 93"),
    ("numbers", "12 45 93", "12, 45, 93"),
    ("numbers", "12 < 45 < 93", "12, 45, 93"),
    ("numbers", "[12, 45, 93]", "12, 45, 93"),
    ("numbers", "12, 45, and 93.", "12, 45, 93"),
    ("numbers", "12\n45\n93", "12, 45, 93"),
    ("numbers", "Here are the numbers sorted from smallest to largest: 12, 45, 93", "12, 45, 93"),
    ("numbers", "The sorted numbers are 12, 45, 93.", "12, 45, 93"),
    ("numbers", "The numbers from smallest to largest are:\n12, 45, 93", "12, 45, 93"),
    ("numbers", "45, 93", "45, 93"),
    ("numbers", "12, 93, 45\n12, 45, 93", None),
    ("numbers", "93", None),
    # words
    ("word", "apple", "apple"),
    ("word", "Apple.", "apple"),
    ("word", '"apple"', "apple"),
    ("word", 'The word that comes first is "apple".', "apple"),
    ("word", '"Apple" comes first in the alphabet.', "apple"),
    ("word", 'The word "apple" comes first in the alphabet.', "apple"),
    ("word", "The last word of this list is apple.", "apple"),
    ("word", "Apple is the longest word.", "apple"),
    ("word", "apple. It is the longest word.", "apple"),
    ("word", 'The opposite of "hot" is "cold".', "cold"),
    ("word", "Cold is the opposite of hot.", "cold"),
    ("word", 'The opposite of "hot" is "cold" or "cool".', None),
    ("word", 'The plural of "mouse" is "mice."', "mice"),
    ("word", "Odd", "odd"),
    ("word", "47 is odd.", "odd"),
    ("word", "The number 47 is an odd number.", "odd"),
    ("word", "odd, because 47 cannot be divided by 2", "odd"),
    ("word", "47 is not odd.", None),
    ("word", "odd or even", None),
    ("word", "apple, table", None),
    ("word", "apple\ntable", None),
    ("word", "42", None),
    ("words", "green, river, table", "green, river, table"),
    ("words", "green river table", "green, river, table"),
    ("words", "Green, river and table.", "green, river, table"),
    ("words", '"green", "river", "table"', "green, river, table"),
    ("words", "green\nriver\ntable", "green, river, table"),
    ("words", "1. green\n2. river\n3. table", "green, river, table"),
    ("words", "The words in reverse order are: green, river, table.", "green, river, table"),
    ("words", "neerg, revir, elbat", "neerg, revir, elbat"),
    ("words", "green", None),
    # names and copies
    ("name", "Paris", "paris"),
    ("name", "Paris, France.", "paris, france"),
    ("name", "Buenos Aires", "buenos aires"),
    ("name", "The capital of Argentina is **Buenos Aires**.", "buenos aires"),
    ("name", "Buenos Aires is the capital of Argentina.", "buenos aires"),
    ("name", "The capital of Chad is N'Djamena.", "n'djamena"),
    ("name", "The capital of Haiti is Port-au-Prince.", "port-au-prince"),
    ("name", "the city of Paris", "paris"),
    ("name", "Paris and Lyon", None),
    ("name", "The capital of Qatar is known as Doha.", "doha"),
    ("name", "The capital of France is Paris, which is a large city.", "paris"),
    ("word", 'The opposite of "inside" is "outside", which refers to the space around.', "outside"),
    ("word", 'The longest word is "progress" but it is not the longest word in the list. The', None),
    ("number", "We need to add 57 and 47, which is 104.", "104"),
    ("number", "To solve this, we need to add 67 and 38.\n\nThe answer is", None),
    ("number", "18 + 58 = 76\n\nThis is a classic example of how math can be used to", "76"),
    ("number", "12 + 81 = 12 + 81 = 12 * 2 = 2", "2"),
    ("letter", 'The letter "X" is not a valid option in this context.', None),
    ("letter", 'The letter "B" is the last letter of the word "bell".', "b"),
    ("letters", 'The first two letters of the word "stool" are "st" and "o".', None),
    ("name", "The capital of France", None),
    ("text", "green river table", "green river table"),
    ("text", "Green river  table.", "green river table"),
    ("text", '"green river table"', "green river table"),
    ("text", "a*b = 1", "a*b = 1"),
    ("text", "green, river, table", "green, river, table"),
    ("text", "", None),
]


@pytest.mark.parametrize(("form", "completion", "answer"), READINGS)
def test_a_completion_is_read_as_a_fair_reader_would(form, completion, answer):
    assert answers.find(completion, form) == answer


def test_a_grade_compares_canonical_spellings():
    assert answers.grade("1,023", "number", ["1023"])[:2] == (True, "1023")
    assert answers.grade("The capital is Ndjamena.", "name", ["N'Djamena", "Ndjamena"]).correct
    assert answers.grade("elbat", "word", ["table"])[:2] == (False, "elbat")
    assert answers.grade("", "word", ["table"])[:2] == (False, None)
    accepted = ["Somalia", "Mogadishu is the capital of Somalia"]
    assert answers.grade("Mogadishu is the capital of Somalia.", "name", accepted)[:2] == (True, "somalia")
    assert not answers.grade("Mogadishu is the capital of Sudan.", "name", accepted).correct
    assert answers.grade("to: Ann", "text", ["To: Ann"])[:2] == (True, "to: ann")
    assert not answers.grade("Here it is: green river", "text", ["green river"]).correct


@pytest.mark.parametrize("form", answers.FORMS)
@pytest.mark.parametrize("text", ["\x00\x1b[31m", "=" * 1_000_000, "is " * 600, "(" * 2000, "a b\n" * 400, "¼ ½"])
def test_no_text_makes_a_reader_raise_or_linger(form, text):
    answers.grade(text, form, ["7"])


NUMBERS = [
    ("16 - 3 - 4 = 9 eggs. 9 * 2 = $<<9*2=18>>18\n#### 18", "18"),
    ("#### 1,080", "1080"),
    ("#### -5", "-5"),
    ("#### $18.00", "18"),
    ("#### 18 dollars a day", "18"),
    ("#### 18\n\nWait, let me check 20.", "18"),
    ("#### 20 - 2 = 18", "18"),
    ("The answer is 18.", "18"),
    ("The answer is $1,080.", "1080"),
    ("The answer is 18 because 20 - 2 = 18 and not 16.", "18"),
    ("The answer is 9 * 2 = 18 dollars.", "18"),
    ("The final answer is:\n18", "18"),
    ("**Answer:** 18", "18"),
    ("Answer: 18 eggs in 7 days.", "18"),
    ("So the answer to the question is 18. She has 2 dogs.", "18"),
    ("The answer is 12. No, wait: the answer is 18.", "18"),
    ("The answer is eighteen.", "18"),
    ("Let us find the answer. 9 * 2 = 18", "18"),
    ("So \\boxed{18} in 3 days", "18"),
    ("\\boxed{\\$1{,}080}", "1080"),
    ("\\boxed{x = 18}", "18"),
    ("\\boxed{18\\text{ eggs}}", "18"),
    ("Then 9 * 2 = 18.", "18"),
    ("She makes 9 * 2 = $18 every day.", "18"),
    ("She makes $1,080.50", "1080.5"),
    ("It weighs 18kg", "18"),
    ("It is 25%.", "25"),
    ("It is -5 degrees.", "-5"),
    ("It is −5 degrees.", "-5"),
    ("She owes -$5", "-5"),
    ("She owes $-5", "-5"),
    ("Between 10-15", "15"),
    ("so x-3", "3"),
    ("It is .5", "0.5"),
    ("It is 18.", "18"),
    ("It is 1/2", "0.5"),
    ("It is 1/3", "1/3"),
    ("It costs 2 million dollars", "2000000"),
    ("She comes 3rd with 18 points", "18"),
    ("1080.00", "1080"),
    ("12,34", "34"),
    ("No idea.", None),
    ("", None),
    ("9" * 100_000, None),
    ("1/0", "1"),
]


@pytest.mark.parametrize(("completion", "number"), NUMBERS)
def test_the_final_number_of_a_solution_is_found(completion, number):
    assert amounts.final_number(completion) == number


ABCD = ("A", "B", "C", "D")
PARTS = ("the roots", "a leaf", "water", "cold water")
CHOICES = [
    ("B", "B"),
    ("b", "B"),
    ("B.", "B"),
    ("(B)", "B"),
    ("**B**", "B"),
    ("B) a leaf", "B"),
    ("B. a leaf", "B"),
    ("B: a leaf", "B"),
    ("B - a leaf", "B"),
    ("(b) a leaf", "B"),
    ("B\n\nLeaves make sugar; the roots take up water.", "B"),
    ("A", "A"),
    ("A. the roots", "A"),
    ("The answer is B.", "B"),
    ("The answer is (B).", "B"),
    ("The answer is: B", "B"),
    ("the answer is b", "B"),
    ("The correct answer is B) a leaf.", "B"),
    ("The correct answer is option B.", "B"),
    ("The answer to the question is B, a leaf", "B"),
    ("The answer is B because leaves are green.", "B"),
    ("The answer is A because roots are brown.", "A"),
    ("The answer is A.", "A"),
    ("The best choice is D.", "D"),
    ("Option C is correct.", "C"),
    ("B is the correct answer.", "B"),
    ("Answer: D", "D"),
    ("\\boxed{C}", "C"),
    ("Roots are brown. Leaves are green. So the answer is B.", "B"),
    ("The answer is A. No, that is wrong: the answer is B.", "B"),
    ("I would say B.", "B"),
    ("a leaf", "B"),
    ("A leaf.", "B"),
    ("The answer is a leaf.", "B"),
    ("It is water.", "C"),
    ("It is cold water.", "D"),
    ("Plants need cold water to grow.", "D"),
    ("Plants need the roots and a leaf.", None),
    ("It is not water.", None),
    ("Because plants need light", None),
    ("The answer is because of light.", None),
    ("A plant needs light.", None),
    ("The answer is a plant.", None),
    ("The answer is B or C.", None),
    ("B and C", None),
    ("Vitamin C is good. Plan B is better.", None),
    ("E", None),
    ("ABCD", None),
    ("", None),
]


@pytest.mark.parametrize(("completion", "label"), CHOICES)
def test_the_chosen_option_is_found(completion, label):
    assert choices.choice(completion, ABCD, PARTS) == label


def test_options_may_be_numbered():
    assert choices.choice("The answer is (2).", ("1", "2", "3"), ("red", "green", "blue")) == "2"
    assert choices.choice("3", ("1", "2", "3"), ("red", "green", "blue")) == "3"
    assert choices.choice("2.5", ("1", "2", "3"), ("red", "green", "blue")) is None


@pytest.mark.parametrize(
    "text", ["\x00\x1b[31m", "=" * 1_000_000, "answer " * 5000, "(" * 9000, "1/" * 9000, "A " * 9000]
)
def test_no_solution_makes_a_reader_raise_or_linger(text):
    amounts.final_number(text)
    choices.choice(text, ABCD, PARTS)
