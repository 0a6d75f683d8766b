"""A task's verdicts on many texts, of which each process of a run judges its own share."""

from collections.abc import Sequence

from sva.parallel import exchange
from sva.tasks.base import Example, Grade, Task


def grade_many(task: Task, texts: Sequence[str], examples: Sequence[Example]) -> list[Grade]:
    """`task.grade_many` of all, the same on every process: one verdict counts, also one that hit a time limit.

    Raises:
      UserError: what the task raises, here or on another process.
    """

    def own(places: Sequence[int]) -> list[list[object]]:
        found = task.grade_many([texts[i] for i in places], [examples[i] for i in places])
        return [[bool(grade.correct), grade.answer, grade.reason] for grade in found]

    return [Grade(*each) for each in exchange.divided(len(texts), own)]
