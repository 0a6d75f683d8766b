"""What a client asks of the worker, and what the worker tells it: plain values that pass between threads."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from sva.adaptation.label_scoring import Choice
from sva.generation.row_sampling import RowSettings
from sva.serving.cost import Cost

Likeliest = list[tuple[int, float]]  # (token id, nats), the likeliest first


class Question(NamedTuple):
    """What the first pass classifies, and how it then chooses."""

    text: str
    choice: Choice


class Mixed(NamedTuple):
    """Which experts answer; the first thing that is told of a prompt."""

    weights: Mapping[str, float]
    label: str | None = None  # the rest is of two passes
    prob: float | None = None
    probs: Mapping[str, float] | None = None
    first: Cost | None = None


class Piece(NamedTuple):
    """More of one sample."""

    sample: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    likeliest: list[Likeliest]  # one a token, or none at all


class Ended(NamedTuple):
    """A sample is finished."""

    sample: int
    reason: Literal["stop", "length"]
    cost: Cost


class Prompted(NamedTuple):
    """The scores of a prompt's tokens after the first."""

    logprobs: list[float]
    likeliest: list[Likeliest]


class Failed(NamedTuple):
    """The prompt will not be answered."""

    status: int  # of HTTP
    message: str


Event = Mixed | Piece | Ended | Prompted | Failed


@dataclasses.dataclass(eq=False)
class Ticket:
    """One prompt to answer."""

    prompt_ids: Sequence[int]
    tell: Callable[[Event], None]  # called by the worker's thread
    max_new_tokens: int  # 0: the prompt is scored, nothing is drawn
    samples: int = 1
    seed: int = 0
    line: int = 1  # numbers the prompts of one request, from 1
    settings: RowSettings | None = None
    likeliest: int = 0  # alternatives wanted beside each token
    is_rich: bool = False  # see `sva.serving.rows.Sample`
    stops: tuple[str, ...] = ()
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of experts by name
    question: Question | None = None  # for two passes, which then choose the weights
    scores_prompt: bool = False
    deadline: float = float("inf")  # on `time.monotonic`
    is_background: bool = False  # takes rows that nobody waits for
    came: float = dataclasses.field(default_factory=time.monotonic)
    is_cancelled: bool = False  # set by the client's side; the worker frees the rows at its next step
    held: Any = None  # `sva.serving.bank.Held`, while the experts are in use


def pairs(ids: np.ndarray, values: np.ndarray, count: int) -> list[Likeliest]:
    """[n] lists of the first `count` of K alternatives, given as [n, K] ids and log-probs."""
    return [
        list(zip(row[:count].tolist(), nats[:count].tolist(), strict=True))
        for row, nats in zip(ids, values, strict=True)
    ]
