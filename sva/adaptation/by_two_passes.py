"""Two passes as a way to answer held-out prompts, and what a router over embeddings is fitted to."""

from collections.abc import Sequence

from sva.adaptation.adaptive_lm import AdaptiveLM
from sva.evaluation.evaluate import Answer, Item, Record, grade, items, stops_of
from sva.generation import chat
from sva.spectral.expert import Expert
from sva.tasks import task as make_task
from sva.tasks.labels import OTHER
from sva.utils.errors import UserError
from sva.utils.timing import Stopwatch


def by_two_passes(model: AdaptiveLM, max_new_tokens: int) -> Answer:
    """Greedy answers of the expert that the first pass chooses for each item by its question, asked as its task asks.

    The right label of an item is its task's, or "other" where no expert has it.
    """
    stopwatch = Stopwatch()
    names = {label.name for label in model.labels}

    def answer(batch: Sequence[Item]) -> list[Record]:
        questions = [item.question for item in batch]
        right = [item.task.label if item.task.label in names else OTHER for item in batch]
        prompts = [chat.render_example(model.lm, item.task, item.example) for item in batch]
        found = model.measured(questions, max_new_tokens, stopwatch, right, stops_of(model.lm, batch), prompts)
        answers = [each.answer for each in found]
        records = grade(batch, [a.text for a in answers], [a.tokens for a in answers], prompts)
        return [
            record._replace(
                label=each.answer.label,
                prob=each.answer.prob,
                right_label=label,
                first=each.first._asdict(),
                second=each.second._asdict(),
            )
            for record, each, label in zip(records, found, right, strict=True)
        ]

    return answer


def trained_on(expert: Expert) -> str | None:
    """The name of the task that an expert was trained on, where its file says so."""
    return (expert.metadata.get("config") or {}).get("task", expert.metadata.get("task"))


def router_examples(experts: Sequence[Expert], count: int = 100) -> list[tuple[str, str]]:
    """(question, label) of the first `count` training prompts of each expert's task, and of the task "other".

    An expert's label is the one in its file.

    Raises:
      UserError: an expert that names no task, or one that cannot be read.
    """
    found = []
    asked = [(trained_on(expert), expert.metadata.get("label")) for expert in experts]
    for name, label in [*asked, (OTHER, None)]:
        if name is None:
            raise UserError(
                "an expert does not name the task it was trained on, whose prompts an embedding is fitted to"
            )
        task = make_task(name)
        found += [(item.question, label or task.label) for item in items(task, "train", count)]
    return found
