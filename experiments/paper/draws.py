"""Sampled answers to held-out prompts, for pass@k and majority at k."""

from collections.abc import Sequence
from typing import Any

import jax

from sva.evaluation.evaluate import Item, grade
from sva.generation import chat
from sva.generation.lm import LM
from sva.generation.sampling import Temperature

ITEMS, COUNT = 96, 8  # held-out prompts, and answers drawn to each at temperature 1
_SEED = 7


def drawn(lm: LM, items: Sequence[Item]) -> dict[str, Any]:
    """{"rights": [n][COUNT] of 0 and 1, "answers": [n][COUNT] as the grader read them} of the first `ITEMS` items.

    Draw d of every prompt takes the same random numbers under every model.
    """
    asked = list(items[:ITEMS])
    prompts = chat.encode(lm, [chat.render_example(lm, item.task, item.example) for item in asked])
    task = asked[0].task
    rights: list[list[int]] = [[] for _ in asked]
    answers: list[list[str | None]] = [[] for _ in asked]
    for draw in range(COUNT):
        key = jax.random.fold_in(jax.random.key(_SEED), draw)
        ends = chat.end_tokens(lm, task.stop)
        out = lm.generate(*prompts, task.max_new_tokens, ends, sampling=Temperature(1.0), key=key)
        found = chat.decode_until(lm, out.tokens, out.lengths, [task.stop] * len(asked))
        for place, record in enumerate(grade(asked, found.texts, found.lengths)):
            rights[place].append(int(record.correct))
            answers[place].append(record.answer)
    return {"rights": rights, "answers": answers}
