"""What tables 5 and 9 share: rights of experts on the model that was fully fine-tuned on another task."""

from collections.abc import Sequence

import numpy as np

from experiments.paper.command import Context

Rights = dict[str, dict[str, np.ndarray]]


def of(context: Context, tasks: Sequence[str]) -> Rights:
    """{system: {task: [S, n]}}: the other model alone, and with experts moved in order and shuffled.

    On a task that an expert was trained on, its own; on another, the best of all in hindsight, seed by seed.
    """
    records = context.studies("moved")
    found: Rights = {"base": {}, "ordered": {}, "shuffled": {}}
    for task in tasks if records else ():
        found["base"][task] = np.array([record["rights"][f"base/{task}"] for record in records], bool)
        for how in ("ordered", "shuffled"):
            rows = []
            for record in records:
                each = [rights for name, rights in record["rights"].items() if name.startswith(f"{how}/{task}/")]
                rows.append(max(each, key=sum))
            found[how][task] = np.array(rows, bool)
    return found
