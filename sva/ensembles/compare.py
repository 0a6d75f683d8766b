"""How well a router's ensemble answers, beside its best member alone and a router that never errs."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sva.ensembles.ensemble import Ensemble, bytes_a_token, bytes_held, parameters_held
from sva.evaluation.evaluate import Item, Record, evaluate
from sva.evaluation.stats import accuracy, paired_difference, percent


def compare(group: Ensemble, todo: Sequence[Item], max_new_tokens: int, *, rows: int = 32) -> dict[str, Any]:
    """Accuracy of the routed ensemble, of the oracle's and of each member for all questions, with what they cost.

    Every member answers every question once, greedily; who is chosen only picks among these answers.

    Args:
      todo: items whose task's label is the right member's, or the fallback's where none has it.
      rows: questions that are answered at a time.
    Returns:
      {"n", "routed", "oracle", "single": {member: ...}, "best_single": member, "right_member": accuracy of the router,
      "parameters_held", "bytes_held", "router_seconds"}; routed, oracle and each single are {"accuracy", "by_task",
      "bytes_a_token" and "seconds" of a question at the mean}. routed also has "minus_best_single", a paired interval.
      Seconds include compiling unless the same call ran before.
    """
    answers: dict[str, list[Record]] = {}
    seconds: dict[str, float] = {}
    for name, lm in group.members.items():
        started = time.perf_counter()
        answers[name] = evaluate(lm, todo, max_new_tokens=max_new_tokens, batch_size=rows, title=name)
        seconds[name] = (time.perf_counter() - started) / len(todo)
    right = [label if (label := item.task.label) in group.members else group.fallback for item in todo]
    started = time.perf_counter()
    chosen = [name for name, _ in group.choose([item.question for item in todo], right)]
    router_seconds = (time.perf_counter() - started) / len(todo)

    reads = {name: bytes_a_token(lm) for name, lm in group.members.items()}

    def told(members: Sequence[str]) -> dict[str, Any]:
        records = [answers[name][place] for place, name in enumerate(members)]
        return _told(records) | {
            "bytes_a_token": float(np.mean([reads[name] for name in members])),
            "seconds": float(np.mean([seconds[name] for name in members])),
        }

    single = {name: told([name] * len(todo)) for name in group.members}
    best = max(single, key=lambda name: single[name]["accuracy"]["mean"])
    routed = told(chosen)
    routed["seconds"] += router_seconds
    routed["minus_best_single"] = paired_difference(
        _correct([answers[name][place] for place, name in enumerate(chosen)]), _correct(answers[best])
    )._asdict()
    return {
        "n": len(todo),
        "routed": routed,
        "oracle": told(right),
        "single": single,
        "best_single": best,
        "right_member": accuracy(np.array([a == b for a, b in zip(chosen, right, strict=True)]))._asdict(),
        "parameters_held": parameters_held(group),
        "bytes_held": bytes_held(group),
        "router_seconds": router_seconds,
    }


def _told(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy of all, and by task."""
    right = _correct(records)
    tasks = np.array([record.task for record in records])
    by_task = {str(name): accuracy(right[tasks == name])._asdict() for name in dict.fromkeys(tasks.tolist())}
    return {"accuracy": accuracy(right)._asdict(), "by_task": by_task}


def _correct(records: Sequence[Record]) -> np.ndarray:
    return np.array([record.correct for record in records])


def as_text(found: Mapping[str, Any]) -> str:
    """`compare` as a few lines."""
    rows = [("routed", found["routed"]), ("oracle", found["oracle"]), *found["single"].items()]
    width = max(len(name) for name, _ in rows)
    lines = [
        f"{name:{width}}  {percent(row['accuracy'])}  {row['bytes_a_token'] / 1e6:.0f} MB a token"
        f"  {row['seconds']:.3f} s a question"
        for name, row in rows
    ]
    held = f"{found['parameters_held'] / 1e6:.0f}M parameters held, {found['bytes_held'] / 1e6:.0f} MB"
    return "\n".join([*lines, f"router right {percent(found['right_member'])}; {held}; n = {found['n']}"])
