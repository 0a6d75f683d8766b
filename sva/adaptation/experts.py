"""Experts for two passes: loaded for their base model, each with its label and its slot in the bank."""

import sys
from collections.abc import Sequence
from pathlib import Path

from sva.generation.lm import LM
from sva.spectral.expert import Expert
from sva.tasks.labels import OTHER, Label
from sva.utils.errors import UserError

OTHER_LABEL = Label(OTHER, "anything else")


def load_experts(
    lm: LM, paths: Sequence[Path], classifier: Path | None = None, *, skip_foreign: bool = False
) -> tuple[list[Expert], Expert | None]:
    """(the experts of these files, the classification expert) for `lm`.

    Args:
      skip_foreign: leave out experts of another base, naming them on stderr; never the classification expert.
    Raises:
      UserError: a file that is not an expert, experts of another base (all are named), or none left.
    """
    found = [Expert.load(path) for path in paths]
    of = [expert.metadata.get("fingerprint") for expert in found]
    foreign = [
        f"{path} ({expert.metadata.get('base')})"
        for path, expert, known in zip(paths, found, of, strict=True)
        if known != lm.fingerprint
    ]
    if foreign and (not skip_foreign or len(foreign) == len(found)):
        rest = "; leave them out, or pass --skip-foreign" if len(foreign) < len(found) else ""
        raise UserError(
            f"{len(foreign)} of {len(found)} experts were not trained on {lm.name} ({lm.fingerprint[:12]}): "
            f"{', '.join(foreign)}{rest}"
        )
    if foreign:
        print(f"sva: left out, for they were not trained on {lm.name}: {', '.join(foreign)}", file=sys.stderr)
    judge = Expert.load(classifier, fingerprint=lm.fingerprint, base=lm.name) if classifier else None
    return [expert for expert, known in zip(found, of, strict=True) if known == lm.fingerprint], judge


def labels_and_slots(experts: Sequence[Expert], classifier: Expert | None) -> tuple[tuple[Label, ...], list[int]]:
    """(C labels, the bank's slot of each): the experts' in order and then "other", or as the classifier learnt them.

    A classification expert was trained on one question, so its labels keep their order and their descriptions.
    """
    labels = [Label(expert.metadata.get("label", ""), expert.metadata.get("description", "")) for expert in experts]
    if not all(label.name for label in labels):
        raise UserError("an expert carries no label; give it one: sva expert relabel FILE --label WORD -o NEW")
    labels = (*labels, OTHER_LABEL)
    slots = [*range(1, len(labels)), 0]
    if classifier is None:
        return labels, slots
    learnt = tuple(Label(*pair) for pair in classifier.metadata.get("labels", {}).items())
    place = {label.name: slot for label, slot in zip(labels, slots, strict=True)}
    if sorted(label.name for label in learnt) != sorted(label.name for label in labels):
        told, needed = (", ".join(label.name for label in group) or "nothing" for group in (learnt, labels))
        raise UserError(
            f"the classification expert tells apart {told}; these experts need {needed}: load experts of its labels, "
            "or train a classification expert with task: routing"
        )
    return learnt, [place[label.name] for label in learnt]
