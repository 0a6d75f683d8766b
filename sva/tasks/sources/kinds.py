"""Rows made from seeds: letters, arithmetic, ordering, lists, capitals, and a few that nobody trains for.

Every word, and every tuple of operands in whatever order, belongs to one split for ever (`owner`), whatever
the kind and the seed; so no word and no operand pair of the test split is ever trained on. A kind is one
generator and one entry in `KINDS`.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import NamedTuple, TypeVar

from sva.tasks.base import SPLITS, Example

T = TypeVar("T")

ROWS = {"train": 2000, "validation": 300, "test": 600}
"""The most rows of each split; a kind with few words or pairs has fewer."""

LABELS = {
    "letters": "the letters of a word",
    "arithmetic": "calculating with numbers",
    "numbers": "comparing numbers",
    "ordering": "comparing or sorting words, or sorting numbers",
    "lists": "counting, picking or turning round the words of a list",
    "countries": "countries and their capitals",
    "other": "anything else",
}
"""Descriptions, for a dispatcher, of kinds that have none of their own."""


class Item(NamedTuple):
    """A question and its answer; `operands` are the words or numbers it is about; `also` is right as well."""

    question: str
    answer: str
    operands: tuple[str, ...]
    also: tuple[str, ...] = ()


def owner(*operands: str | int) -> str:
    """The split that a word, a number or a tuple belongs to: half train, 15 % validation, 35 % test."""
    key = " ".join(sorted(map(str, operands)))
    share = int.from_bytes(hashlib.blake2s(key.encode(), digest_size=4).digest(), "big") % 100
    return SPLITS[0] if share < 50 else SPLITS[1] if share < 65 else SPLITS[2]


@cache
def _lines(name: str) -> tuple[str, ...]:
    return tuple((resources.files("sva.tasks.sources") / f"{name}.txt").read_text(encoding="utf-8").splitlines())


@dataclass(frozen=True)
class Deck:
    """The words, numbers and pairs of one split, in an order that `rng` decides."""

    split: str
    rng: random.Random

    def words(self) -> list[str]:
        return self.shuffled([word for word in _lines("words") if owner(word) == self.split])

    def numbers(self, low: int, high: int) -> list[int]:
        return self.shuffled([n for n in range(low, high + 1) if owner(n) == self.split])

    def pairs(self, first: range, second: range) -> list[tuple[int, int]]:
        return self.shuffled([ab for ab in itertools.product(first, second) if owner(*ab) == self.split])

    def entries(self, name: str) -> list[tuple[list[str], list[str]]]:
        """Lines "a/b|c/d" of a list as (["a", "b"], ["c", "d"]); a line belongs where its first word does."""
        sides = [[side.split("/") for side in line.split("|")] for line in _lines(name)]
        return self.shuffled([(left, right) for left, right in sides if owner(left[0]) == self.split])

    def shuffled(self, things: list[T]) -> list[T]:
        return self.rng.sample(things, len(things))

    def hands(self, things: list[T], size: int | range) -> Iterator[list[T]]:
        """Endless draws of `size` different things (a range: of a size within it)."""
        while True:
            yield self.rng.sample(things, size if isinstance(size, int) else self.rng.choice(size))


def _listed(things: Sequence[object]) -> str:
    return ", ".join(map(str, things))


def _strings(things: Sequence[object]) -> tuple[str, ...]:
    return tuple(map(str, things))


def _last_letter(deck: Deck) -> Iterator[Item]:
    for word in deck.words():
        yield Item(f'What is the last letter of the word "{word}"? Answer with the letter only.', word[-1], (word,))


def _second_letter(deck: Deck) -> Iterator[Item]:
    for word in deck.words():
        yield Item(f'What is the second letter of the word "{word}"? Answer with the letter only.', word[1], (word,))


def _first_letters(deck: Deck) -> Iterator[Item]:
    for word in deck.words():
        question = f'What are the first two letters of the word "{word}"? Answer with the two letters only.'
        yield Item(question, word[:2], (word,))


def _product(deck: Deck) -> Iterator[Item]:
    for a, b in deck.pairs(range(11, 100), range(2, 10)):
        yield Item(f"What is {a} times {b}? Answer with the number only.", str(a * b), _strings((a, b)))


def _sum(low: int, high: int) -> Callable[[Deck], Iterator[Item]]:
    def items(deck: Deck) -> Iterator[Item]:
        while True:
            a, b = deck.rng.randint(low, high), deck.rng.randint(low, high)
            if owner(a, b) == deck.split:
                yield Item(f"What is {a} + {b}? Answer with the number only.", str(a + b), _strings((a, b)))

    return items


def _parity(deck: Deck) -> Iterator[Item]:
    for n in deck.numbers(10, 9999):
        question = f"Is the number {n} odd or even? Answer with one word, odd or even."
        yield Item(question, "odd" if n % 2 else "even", (str(n),))


def _next_number(deck: Deck) -> Iterator[Item]:
    for start, step in deck.pairs(range(1, 100), range(2, 13)):
        shown = [start + step * i for i in range(5)]
        question = f"Which number comes next: {_listed(shown[:4])}? Answer with the number only."
        yield Item(question, str(shown[4]), _strings((start, step)))


def _largest(deck: Deck) -> Iterator[Item]:
    for hand in deck.hands(deck.numbers(10, 99), 4):
        question = f"Which of these numbers is the largest: {_listed(hand)}? Answer with the number only."
        yield Item(question, str(max(hand)), _strings(hand))


def _smallest(deck: Deck) -> Iterator[Item]:
    for hand in deck.hands(deck.numbers(10, 99), 4):
        question = f"Which of these numbers is the smallest: {_listed(hand)}? Answer with the number only."
        yield Item(question, str(min(hand)), _strings(hand))


def _sort3(deck: Deck) -> Iterator[Item]:
    for hand in deck.hands(deck.numbers(10, 99), 3):
        question = (
            f"Sort these numbers from smallest to largest: {_listed(hand)}. "
            "Answer with the numbers only, separated by commas."
        )
        if hand != sorted(hand):
            yield Item(question, _listed(sorted(hand)), _strings(hand))


def _alphabetical(deck: Deck) -> Iterator[Item]:
    for hand in deck.hands(deck.words(), 3):
        question = f"Which of these words comes first in the alphabet: {_listed(hand)}? Answer with the word only."
        yield Item(question, min(hand), tuple(hand))


def _longest_word(deck: Deck) -> Iterator[Item]:
    for hand in deck.hands(deck.words(), 3):
        longest, second = sorted(map(len, hand), reverse=True)[:2]
        if longest > second:
            question = f"Which of these words is the longest: {_listed(hand)}? Answer with the word only."
            yield Item(question, max(hand, key=len), tuple(hand))


def _count(deck: Deck) -> Iterator[Item]:
    for hand in deck.hands(deck.words(), range(2, 10)):
        question = f"How many words are in this list: {_listed(hand)}? Answer with the number only."
        yield Item(question, str(len(hand)), tuple(hand))


def _list_last(deck: Deck) -> Iterator[Item]:
    for hand in deck.hands(deck.words(), range(3, 7)):
        question = f"What is the last word of this list: {_listed(hand)}? Answer with the word only."
        yield Item(question, hand[-1], tuple(hand))


def _reverse_words(deck: Deck) -> Iterator[Item]:
    for hand in deck.hands(deck.words(), 3):
        question = (
            f"Write these words in reverse order: {_listed(hand)}. Answer with the words only, separated by commas."
        )
        yield Item(question, _listed(hand[::-1]), tuple(hand))


def _opposites(deck: Deck) -> Iterator[Item]:
    for left, right in deck.entries("opposites"):
        for (word, *_), (answer, *also) in ((left, right), (right, left)):
            question = f"What is the antonym of {word}? Answer with one word."
            yield Item(question, answer, (word, answer), tuple(also))


def _capitals(deck: Deck) -> Iterator[Item]:
    for (country,), cities in deck.entries("capitals"):
        named = (*cities[1:], *(f"{city}, {country}" for city in cities))
        yield Item(
            f"What is the capital of {country}? Answer with the city only.",
            cities[0],
            (country, cities[0]),
            named,
        )
        question = f"{cities[0]} is the capital of which country? Answer with the country only."
        sentences = (f"{cities[0]} is the capital of {country}", f"The capital of {country} is {cities[0]}")
        yield Item(question, country, (country, cities[0]), sentences)


def _plurals(deck: Deck) -> Iterator[Item]:
    for (noun,), (plural,) in deck.entries("plurals"):
        yield Item(f'What is the plural of "{noun}"? Answer with one word.', plural, (noun, plural))


def _copy(deck: Deck) -> Iterator[Item]:
    for hand in deck.hands(deck.words(), range(1, 5)):
        sentence = " ".join(hand)
        yield Item(f"Repeat exactly, with nothing else: {sentence}", sentence, tuple(hand))


@dataclass(frozen=True)
class Kind:
    """One kind of question: its dispatch label, its answers' form (`sva.tasks.grading.answers.FORMS`), its generator.

    A small model tells concrete phrases apart far better than general ones, so a kind may describe itself.
    """

    label: str
    form: str
    items: Callable[[Deck], Iterator[Item]]
    description: str = ""


KINDS = {
    "last_letter": Kind("letters", "letter", _last_letter),
    "second_letter": Kind("letters", "letter", _second_letter),
    "first_letters": Kind("letters", "letters", _first_letters),
    "product": Kind("arithmetic", "number", _product),
    "sum2": Kind("arithmetic", "number", _sum(10, 99)),
    "sum3": Kind("arithmetic", "number", _sum(100, 999)),
    "parity": Kind("arithmetic", "word", _parity),
    "next_number": Kind("arithmetic", "number", _next_number),
    "largest": Kind("numbers", "number", _largest, "which number is the largest"),
    "smallest": Kind("numbers", "number", _smallest),
    "sort3": Kind("ordering", "numbers", _sort3),
    "alphabetical": Kind("ordering", "word", _alphabetical),
    "longest_word": Kind("ordering", "word", _longest_word),
    "count": Kind("lists", "number", _count),
    "list_last": Kind("lists", "word", _list_last, "which word is last in a list"),
    "reverse_words": Kind("lists", "words", _reverse_words),
    "opposites": Kind("other", "word", _opposites),
    "capitals": Kind("countries", "name", _capitals),
    "plurals": Kind("other", "word", _plurals),
    "copy": Kind("other", "text", _copy),
}

MIXTURES = {"other": ("opposites", "plurals")}
"""Tasks that take turns between kinds, until the smallest has no more."""

NAMES = (*KINDS, *MIXTURES)


def rows(name: str, split: str, seed: int = 0) -> list[Example]:
    """Examples of a kind or mixture: question, answer, also, operands, kind.

    A pure function of its arguments and of this package's word lists. No two rows share operands and answer.
    """
    if name in MIXTURES:
        parts = [rows(kind, split, seed) for kind in MIXTURES[name]]
        return [row for turn in zip(*parts, strict=False) for row in turn][: ROWS[split]]
    deck = Deck(split, random.Random(f"{name} {split} {seed}"))
    found: dict[tuple[str, ...], Example] = {}
    for item in KINDS[name].items(deck):
        row = dict(item._asdict(), operands=list(item.operands), also=list(item.also), kind=name)
        found.setdefault((item.answer, *sorted(item.operands)), row)
        if len(found) == ROWS[split]:
            break
    return list(found.values())


def fingerprint() -> str:
    """Changes whenever the rows could: a hash of this file and the word lists."""
    content = hashlib.blake2s(digest_size=6)
    for entry in sorted(resources.files("sva.tasks.sources").iterdir(), key=lambda entry: entry.name):
        if entry.name == "kinds.py" or entry.name.endswith(".txt"):
            content.update(entry.read_bytes())
    return content.hexdigest()
