"""Records of an older grading, graded anew: a cell's record holds every held-out answer, so nothing is trained again.

For a change of the graders that raises GRADING alone (`revisions.py`). Studies hold no texts and are measured anew;
sampled answers are left out, of which a record holds what the grader read alone.
"""

from collections.abc import Mapping
from typing import Any

from experiments.paper.records import ANSWER, CURRENT, Store, answers, read, write_record
from experiments.paper.tasks import task, telling_apart
from sva.evaluation import evaluate as evaluation
from sva.training.run import compare


def regrade(store: Store) -> tuple[int, int]:
    """(cells graded anew and filed under the current grading, records that need their run or measurement again)."""
    left = 0
    moved = store.of_other_gradings()
    for old, new in moved.items():
        record = read(old)
        if "held_out" not in record or record["scale"] == "paper":  # whose datasets may not be here
            left += 1
            continue
        write_record(new, _graded(record) | {"key": new.name.removesuffix(".json.gz")})
        old.unlink()
        experts = [store.directory / "experts" / path.name.replace(".json.gz", ".safetensors") for path in (old, new)]
        if experts[0].exists():
            experts[0].rename(experts[1])
    store.look()
    return len(moved) - left, left


def _graded(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the current graders' verdicts."""
    routes = record["config"].get("routes")
    of = telling_apart(routes) if routes else task(record["task"])
    items = evaluation.items(of, record["split"], record["n"])
    found = {}
    for when, rows in record["held_out"].items():
        named = [dict(zip(ANSWER, row, strict=True)) for row in rows]
        found[when] = evaluation.grade(items, [x["completion"] for x in named], [x["tokens"] for x in named])
    kept = {name: value for name, value in record.items() if name != "sampled"}
    verdicts = {"held_out": {when: answers(rows) for when, rows in found.items()}}
    return {**kept, **compare(found["before"], found["after"]), **verdicts, "revisions": CURRENT._asdict()}
