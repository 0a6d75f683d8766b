"""Few-shot search on posted examples, through the server's own rows: members of the search are mixtures like any other.

As `sva adapt` does it (`sva.adaptation.few_shot`), except that the rows which answer the examples are those that no
client waits for. So the answers run serving's own programs; what compiles is the arithmetic of the members' weights, a
few numbers each, at the first search of that many members and experts.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sva.adaptation.few_shot import Scores, Shots, fitness, is_found, shot_tokens
from sva.serving.bodies import AdaptBody
from sva.serving.errors import ApiError
from sva.serving.tickets import Ended, Event, Failed, Piece, Ticket
from sva.serving.worker import Draining, Worker
from sva.tasks import jsonl
from sva.training.search import CEM
from sva.utils import seeds


class Found(NamedTuple):
    """The result of a search."""

    weights: Mapping[str, float]
    history: list[dict[str, float]]  # best and mean accuracy of each generation's members


@dataclasses.dataclass
class _Answer:
    """One member's answer to one shot, as it comes."""

    done: "asyncio.Future[None]"
    text: str = ""
    nats: list[float] = dataclasses.field(default_factory=list)

    def add(self, event: Event) -> None:
        """Takes an event; `done` has a result at the last one."""
        if isinstance(event, Piece):
            self.text += event.text
            self.nats += event.logprobs
        elif isinstance(event, Ended) and not self.done.done():
            self.done.set_result(None)
        elif isinstance(event, Failed) and not self.done.done():
            self.done.set_exception(ApiError(event.status, event.message))


def shots_of(body: AdaptBody) -> Shots:
    """The posted examples as shots.

    Raises:
      UserError: one that its grader cannot read.
    """
    task = jsonl.Jsonl(
        name="examples",
        label="own",
        description=body.description,
        max_new_tokens=body.max_tokens,
        licence="the user's own",
        origin="posted",
        path="",
        form=body.grader,
    )
    rows = [x.model_dump(exclude_none=True) for x in body.examples]
    checked = [jsonl.checked(row, body.grader, f"example {number}") for number, row in enumerate(rows)]
    return Shots(task, tuple(checked))


class Search:
    """One search, whose answers are tickets in the background."""

    def __init__(self, worker: Worker, body: AdaptBody, names: Sequence[str], *, context: int, deadline: float) -> None:
        """The search among these experts; `shots_of` the body raises where the examples make no sense."""
        self._worker, self._shots, self._names, self._body = worker, shots_of(body), list(names), body
        self._context, self._deadline = context, deadline
        self._tickets: list[Ticket] = []

    async def run(self) -> Found:
        """The mixture that answers the shots best; the base where no member answers any.

        Raises:
          Draining: nothing new is taken.
          ApiError: a member's answer failed, or time is up.
        """
        if not self._worker.is_accepting:
            raise Draining
        self._worker.searches += 1  # by the event loop's thread alone
        try:
            return await self._found()
        finally:
            self._worker.searches -= 1

    async def _found(self) -> Found:
        prompts = await asyncio.to_thread(shot_tokens, self._worker.lm, self._shots)
        self._check_fits(prompts)
        method = CEM(population=self._body.population, low=0.0, high=1.0)
        history: list[dict[str, float]] = []
        held = self._worker.bank.hold(dict.fromkeys(self._names, 1.0))
        try:
            state = await self._on_worker(lambda: method.init(_uniform(len(self._names))))
            for number in range(1, self._body.iterations + 1):
                asked = await self._on_worker(partial(_ask, method, state, self._body.seed, number))
                scores = await self._score(np.asarray(asked), prompts)
                if scores.right.any():
                    state = await self._on_worker(partial(_tell, method, state, asked, scores))
                accuracy = scores.right.mean(axis=1)
                history.append({"best": float(accuracy.max()), "mean": float(accuracy.mean())})
            found = await self._on_worker(lambda: np.asarray(method.solution(state)))
        finally:
            for ticket in self._tickets:
                ticket.is_cancelled = True
            self._worker.bank.release(held)
        alphas = found if is_found(history) else np.zeros_like(found)
        return Found(dict(zip(self._names, alphas.tolist(), strict=True)), history)

    def _check_fits(self, prompts: Sequence[Sequence[int]]) -> None:
        longest = max(map(len, prompts)) + self._body.max_tokens
        if longest > self._context:
            raise ApiError(
                400,
                f"an example needs {longest} tokens with its answer, but this server's context is {self._context}; "
                "shorten it or lower max_tokens",
                param="examples",
            )

    async def _on_worker(self, function: Any) -> Any:
        return await asyncio.wrap_future(self._worker.call(function))

    async def _score(self, members: np.ndarray, prompts: Sequence[Sequence[int]]) -> Scores:
        """The grades of every member's answer to every shot."""
        loop = asyncio.get_running_loop()
        answers: list[_Answer] = []
        self._tickets = []
        for alphas in members.tolist():
            for prompt in prompts:
                answer = _Answer(loop.create_future())
                answers.append(answer)
                self._tickets.append(self._ticket(prompt, alphas, answer, loop))
        self._worker.submit(*self._tickets)
        await asyncio.gather(*(answer.done for answer in answers))
        size = len(prompts)
        places = list(range(size)) * len(members)
        right = await asyncio.to_thread(self._shots.right, [answer.text for answer in answers], places)
        means = np.asarray([np.mean(answer.nats) for answer in answers], np.float32)
        nobody = np.zeros(len(members), bool)
        tokens = sum(len(answer.nats) for answer in answers)
        return Scores(right.reshape(-1, size), means.reshape(-1, size), tokens, nobody)

    def _ticket(self, prompt: Sequence[int], alphas: list[float], answer: _Answer, loop: Any) -> Ticket:
        if time.monotonic() > self._deadline:
            raise ApiError(504, "the search took longer than the server allows; ask for fewer iterations")

        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, so that nobody waits
                loop.call_soon_threadsafe(answer.add, event)

        return Ticket(
            prompt_ids=prompt,
            tell=tell,
            max_new_tokens=self._body.max_tokens,
            weights=dict(zip(self._names, alphas, strict=True)),
            deadline=self._deadline,
            is_background=True,
        )


# What the worker's thread computes.


def _uniform(size: int) -> jax.Array:
    return jnp.full((size,), 1 / size, jnp.float32)


def _ask(method: CEM, state: Any, seed: int, number: int) -> Any:
    """The members of generation `number`, as `few_shot.adapt` draws them."""
    asked, _ = jax.random.split(jax.random.fold_in(seeds.key(seed), number))
    return method.ask(state, asked)


def _tell(method: CEM, state: Any, asked: Any, scores: Scores) -> Any:
    return method.tell(state, asked, *fitness(scores))
