"""The labels that a first pass chooses from, and the words of its question."""

from collections.abc import Sequence
from typing import NamedTuple

OTHER = "other"


class Label(NamedTuple):
    """An answer to the classification question."""

    name: str  # one lower-case word
    description: str  # a short phrase


def instruction(labels: Sequence[Label], question: str) -> str:
    """The classification question around one prompt.

    After the prompt of Transformer-Squared (arXiv 2501.06252, appendix D): a list of categories, then the question,
    answered with a category's name. Deviation: the names and their descriptions come from the experts that are
    loaded, and everything before `question` is the same for all prompts, so that it is computed once.
    """
    described = "\n".join(f"- {label.name}: {label.description}" for label in labels)
    names = ", ".join(label.name for label in labels)
    return (
        f"Which category does the question below belong to?\n{described}\n"
        f"Answer with the category only, one of: {names}.\n\nQuestion: {question}\nCategory:"
    )
