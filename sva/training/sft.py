"""Next-token prediction on given answers, in the batch that policy gradients use."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from sva.generation import chat
from sva.generation.lm import LM
from sva.generation.prompts import check_prompts
from sva.tasks.base import Example, Task
from sva.tasks.routing import Routing
from sva.training.reinforce import Batch
from sva.utils.errors import UserError
from sva.utils.padding import budget_bucket, pad_tokens

_FIELDS = ("answer", "label", "answerKey")  # of a solution, a procedural task or a user's lines; of routing; of ARC


def solution(task: Task, example: Example) -> str:
    """The text of a right answer: the first of an example's answer fields that the task's own grader calls right.

    Of a task that has longer solutions (`Task.is_solved`: MATH, MBPP, HumanEval) it is the solution as the task answers
    with it. That one is upstream's own and is not graded here, where a program would run for every row.

    Raises:
      UserError: there is none.
    """
    if task.is_solved:
        return task.answer(example)
    for field in _FIELDS:
        text = example.get(field)
        if isinstance(text, str) and task.grade(text, example).correct:
            return text
    boxed = task.answer(example) if isinstance(task, Routing) else ""
    if boxed and task.grade(boxed, example).correct:
        return boxed
    raise UserError(
        f"task {task.name}: an example has no answer in {', '.join(_FIELDS)} that its own grader calls right; "
        "train.method=next_token needs one, policy_gradient and evolution do not"
    )


def solution_tokens(lm: LM, task: Task, examples: Sequence[Example]) -> list[list[int]]:
    """The token ids of each example's solution, and the end token."""
    end = chat.answer_end(lm)
    texts = [solution(task, example) for example in examples]
    return [[*tokens, *end] for tokens in chat.tokenize(lm, texts, follows=True, kind="answer")]


def solution_width(lm: LM, task: Task, source: Sequence[Example]) -> int:
    """The bucket that holds every solution of a split."""
    return budget_bucket(max(map(len, solution_tokens(lm, task, [source[i] for i in range(len(source))]))))


def solved(
    lm: LM, task: Task, examples: Sequence[Example], prompts: tuple[np.ndarray, np.ndarray], width: int
) -> Batch:
    """The batch whose loss is the mean over all its answer tokens of -log p.

    Every row's "advantage" is rows / tokens, so that sums over the tokens of a row, averaged over rows, are the mean
    over the tokens of the whole batch, in whatever micro-batches it is read.

    Args:
      prompts: (ids, mask) [P, T], padded on the left.
      width: N, from `solution_width`.
    Raises:
      UserError: a prompt and its answer are longer than the model reads.
    """
    tokens = solution_tokens(lm, task, examples)
    check_prompts(np.asarray(prompts[1]).sum(axis=1), np.array([len(row) for row in tokens]), lm.model.cfg)
    ids, mask = pad_tokens(tokens, width, side="right")
    weights = np.full(len(tokens), len(tokens) / mask.sum(), np.float32)
    return Batch(*map(jnp.asarray, (*prompts, ids, mask, weights)))
