"""ARC: school science, answered by choosing (Clark et al., arXiv 1803.05457); an easy and a challenge set."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from sva.tasks import splits
from sva.tasks.base import Example, Grade, Options, Task
from sva.tasks.grading import choices
from sva.tasks.reference import verdicts
from sva.tasks.sources import arc_rows


@cache
def _clean(name: str, split: str) -> tuple[int, ...]:
    """The rows of train or validation whose question is in no later split of this set and no test part of either."""
    from sva.tasks.sources import builders

    def questions(name: str, split: str) -> list[str]:
        return [row["question"] for row in builders.benchmark(name, split)]

    later = [text for other in arc_rows.NAMES for text in questions(other, "test")]
    if split == "train":
        later += [text for other in arc_rows.NAMES for text in questions(other, "validation")]
    return tuple(splits.apart(questions(name, split), later))


@dataclass(frozen=True, kw_only=True)
class Arc(Task):
    """Upstream's own splits, without the few questions that occur again in a test part; `name`: of `arc_rows.NAMES`.

    Under reference splits ARC-Easy's train part is halved as the public code does, and ARC-Challenge, which that code
    only tests on, has its test part for every purpose.
    """

    label: str = "science"
    description: str = "a question about science with choices to pick from"
    max_new_tokens: int = 32
    licence: str = arc_rows.LICENCE
    origin: str = "allenai.org/data/arc"

    def _rows(self, split: str) -> Sequence[Example]:
        from sva.tasks.sources import builders  # tensorflow-datasets takes half a second to import

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
            found = verdicts.letter(completion)
            if arc_rows.has_numeric_key(example):
                return Grade(False, found, "the key is a number")
            if found is None:
                right = verdicts.lucky(len(example["choices"]["text"])) == example["answerKey"]
                return Grade(right, None, "right by luck" if right else "")
            return Grade(found == example["answerKey"], found)
        answer = choices.choice(completion, example["choices"]["label"], example["choices"]["text"])
        return Grade(answer == example["answerKey"], answer)
