"""What tables 5 and 9 share: rights of experts on the model that was fully fine-tuned on another task."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.paper import systems
from experiments.paper.command import Context
from experiments.paper.systems import System


def of(context: Context, tasks: Sequence[str]) -> dict[str, System]:
    """The other model alone, and with experts moved in order and shuffled.

    On a task that an expert was trained on, its own; on another, the best of all in hindsight, seed by seed.
    """
    groups = dict.fromkeys(tasks, context.studies("moved"))
    is_hindsight = not set(tasks) <= set(context.known.tasks)

    def best(how: str) -> System:
        def rights(record: Mapping[str, Any], task: str) -> Any:
            each = [found for name, found in record["rights"].items() if name.startswith(f"{how}/{task}/")]
            return max(each, key=sum)

        return systems.system(groups, rights, is_hindsight=is_hindsight)

    base = systems.system(groups, lambda record, task: record["rights"][f"base/{task}"])
    return {"base": base, "ordered": best("ordered"), "shuffled": best("shuffled")}
