"""The thread that owns JAX: it takes tickets from a bounded queue into free rows, and tells what the rows draw.

Between two steps of all rows it does, in this order: what it was called for (experts that come and go), freeing the
rows of clients that left, the first pass of questions that wait for one, and reading prompts into free rows. While rows
are at work reading gets `PATIENCE` seconds before the next step.
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sva.adaptation.adaptive_lm import ROWS as FIRST_PASS_ROWS
from sva.generation import chat
from sva.generation.engine import EngineConfig
from sva.generation.lm import LM
from sva.generation.prompts import pad_eos
from sva.generation.row_sampling import row_settings
from sva.generation.stop_strings import Text
from sva.generation.weights import Weights, bank_mixture
from sva.parallel.sharding import row_shards
from sva.serving.bank import Bank, Held
from sva.serving.cost import Cost, Prices
from sva.serving.first_pass import FirstPass
from sva.serving.lines import Lines, Waiting
from sva.serving.metrics import Metrics
from sva.serving.prompt_scores import prompt_scores
from sva.serving.rows import Drawn, Rows, Sample, samples_keys
from sva.serving.tickets import Ended, Failed, Mixed, Piece, Prompted, Ticket, pairs
from sva.utils import seeds
from sva.utils.errors import UserError

PATIENCE = 2.0  # seconds of reading prompts while rows wait for their next step
STEPS = 4  # tokens of a row between two looks at the queue
_log = logging.getLogger("sva.serving")
_Result = TypeVar("_Result")


class Busy(Exception):
    """The queue is full; `seconds` is about how long until it is not."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; try again in about {seconds} seconds")
        self.seconds = seconds


class Draining(Exception):
    """The server finishes what runs and takes nothing new."""


@dataclasses.dataclass(frozen=True)
class WorkerConfig:
    """Sizes of the worker."""

    rows: int = 32  # that decode together
    queue: int = 128  # samples that wait for a row
    tier: int = 128  # slots of a row are a multiple of it


@dataclasses.dataclass
class _Answer:
    """A row at work."""

    waiting: Waiting
    sample: int
    text: Text
    tokens: int = 0


class Worker:
    """See the head of this file. `submit` and `call` are for any thread."""

    def __init__(self, lm: LM, bank: Bank, cfg: WorkerConfig, metrics: Metrics) -> None:
        self.lm, self.bank, self.cfg, self.metrics = lm, bank, cfg, metrics
        self.is_accepting = True
        self.searches = 0  # that run: their clients wait, though their tickets are of the background
        self._copies = row_shards()
        self._first_pass = FirstPass(lm, bank)
        self._prices = Prices(lm.model, bank.tree)
        ends = chat.end_tokens(lm)
        self._ends = set(ends)
        eos_ids = jnp.asarray(pad_eos(ends))
        weights = Weights(lm.model, lm.params, eos_ids, adapter_of=bank_mixture, shared=bank.tree)
        engine = EngineConfig(rows=cfg.rows, steps=STEPS, prompts=self._copies, tier=cfg.tier)
        self._rows = Rows(weights, engine, bank.size)
        self._texts: dict[tuple[str, ...], Text] = {}
        self._wake = threading.Condition()
        self._lines = Lines(cfg.queue)
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._answers: dict[int, _Answer] = {}
        self._is_ended = False
        self._mean_seconds = 1.0  # that a sample holds its row
        self._thread = threading.Thread(target=self._run, name="jax", daemon=True)

    def start(self) -> None:
        """Starts the thread, and returns when it is ready for requests.

        Raises:
          Exception: whatever keeps the model from answering.
        """
        self._thread.start()
        self.call(self._rows.warm).result()

    @property
    def is_alive(self) -> bool:
        """Whether the thread works."""
        return self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        """Whether no client waits for anything."""
        if self.searches or self._lines.has_clients():  # asked first: what leaves a line has its row already
            return False
        return all(one.waiting.ticket.is_background for one in list(self._answers.values()))

    def submit(self, *tickets: Ticket) -> None:
        """Takes the tickets of one request, all or none.

        Raises:
          Busy: so many samples wait already that these do not fit.
          Draining: nothing new is taken, except for a search that runs.
          NoExpert: an expert is not loaded.
          UserError: so many samples never fit.
        """
        asked = sum(ticket.samples for ticket in tickets if not ticket.is_background)
        if asked > self.cfg.queue:
            raise UserError(f"the request asks for {asked} answers, this server lets {self.cfg.queue} wait at most")
        with self._wake:
            if self._is_ended or not (self.is_accepting or all(ticket.is_background for ticket in tickets)):
                raise Draining
            if not self._lines.fits(tickets):
                raise Busy(max(1, round(self._lines.samples / self.cfg.rows * self._mean_seconds)))
            asking = [ticket for ticket in tickets if ticket.question is None]
            for ticket, held in zip(asking, self.bank.hold_all([x.weights for x in asking]), strict=True):
                ticket.held = held
            for ticket in tickets:
                self._lines.add(ticket)
            self._note()
            self._wake.notify()

    def call(self, function: Callable[[], _Result]) -> "Future[_Result]":
        """The result of a function that the worker's thread runs between two steps.

        Raises:
          Draining: the thread has ended, or is about to.
        """
        future: Future[_Result] = Future()
        with self._wake:
            if self._is_ended:
                raise Draining
            self._calls.append((function, future))
            self._wake.notify()
        return future

    def refresh(self) -> None:
        """Lets rows read the bank as it is now; the worker's own thread calls it after a change."""
        self._rows.weights = dataclasses.replace(self._rows.weights, shared=self.bank.tree)
        self.metrics.experts.set(len(self.bank.entries))

    def end(self) -> None:
        """Ends the thread; whoever still waits is told so."""
        with self._wake:
            self.is_accepting, self._is_ended = False, True
            self._wake.notify()
        self._thread.join(timeout=60)

    def _run(self) -> None:
        with contextlib.nullcontext() if self.lm.mesh is None else jax.set_mesh(self.lm.mesh):
            try:
                while not self._is_ended:
                    self._round()
            except Exception:
                _log.exception("the worker failed; it takes nothing more")
            with self._wake:
                self.is_accepting, self._is_ended = False, True
            self._answer_calls()
            self._fail_all(503, "the server is shutting down")

    def _round(self) -> None:
        """Waits until there is something to do, and does it, up to one step of all rows."""
        with self._wake:
            while not (self._is_ended or self._calls or self._lines or self._answers):
                self._wake.wait()
            if self._is_ended:
                return
        self._answer_calls()
        try:
            self._leave()
            self._admit()
            if self._answers:
                self._step()
        except Exception:
            _log.exception("a step failed; the rows are made anew")
            self._rows.clear()  # first, for rows of a failed step cannot be stopped
            self._fail_all(500, "the server failed at this request; its log says why", waiting=False)
        self._note()

    def _answer_calls(self) -> None:
        with self._wake:
            calls, self._calls = self._calls, deque()
        for function, future in calls:
            self._answer_call(function, future)

    def _answer_call(self, function: Callable[[], Any], future: "Future[Any]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    def _note(self) -> None:
        self.metrics.rows.set(len(self._answers))
        self.metrics.waiting.set(self._lines.samples)

    # Between two steps.

    def _leave(self) -> None:
        """Frees the rows of clients that left or whose time is over, and takes theirs out of the queue."""
        now = time.monotonic()
        gone = {id(one.waiting): one.waiting for one in self._answers.values() if one.waiting.is_over(now)}
        for one in [*gone.values(), *self._lines.take_over()]:
            self._drop(one, now)

    def _drop(self, one: Waiting, now: float) -> None:
        late = now > one.ticket.deadline
        self._fail(one, 504 if late else 499, "the request took longer than the server allows" if late else "cancelled")

    def _fail(self, one: Waiting, status: int, message: str) -> None:
        """Ends everything of one ticket."""
        rows = [row for row, answer in self._answers.items() if answer.waiting is one]
        self._rows.stop(rows)
        for row in rows:
            del self._answers[row]
        self._lines.remove(one)
        self._release(one.ticket)
        one.ticket.tell(Failed(status, message))

    def _release(self, ticket: Ticket) -> None:
        held, ticket.held = ticket.held, None
        if isinstance(held, Held):
            self.bank.release(held)

    def _fail_all(self, status: int, message: str, *, waiting: bool = True) -> None:
        everyone = {id(one.waiting): one.waiting for one in self._answers.values()}
        if waiting:
            everyone |= {id(one): one for one in self._lines.take_all()}
        for one in everyone.values():
            self._fail(one, status, message)

    def _next(self) -> Waiting | None:
        """The ticket whose next sample takes the next free row."""
        behind = sum(one.waiting.ticket.is_background for one in self._answers.values())
        return self._lines.next(background=behind < max(1, self.cfg.rows // 2))

    def _admit(self) -> None:
        began = time.monotonic()
        while self._rows.free and (one := self._next()) is not None:
            if self._answers and time.monotonic() - began > PATIENCE:
                return
            self._leave()
            if one.is_over(time.monotonic()):
                continue
            try:
                if not one.chosen:
                    self._choose(one)
                if one.prompt is None:
                    self._begin(one)
                if one.prompt is not None:
                    self._start(one)
            except UserError as error:
                self._fail(one, 400, str(error))
            except Exception:
                _log.exception("a prompt failed")
                self._fail(one, 500, "the server failed at this request; its log says why")

    def _choose(self, first: Waiting) -> None:
        """The first pass of this ticket, and of others that wait for one."""
        asking = self._lines.unchosen(FIRST_PASS_ROWS)
        questions = [one.ticket.question for one in asking if one.ticket.question is not None]
        try:
            found = self._first_pass.choose(questions)
        except UserError:  # of one of them perhaps: each finds out for itself
            if len(asking) == 1 or first.ticket.question is None:
                raise
            asking, found = [first], self._first_pass.choose([first.ticket.question])
        for one, chosen in zip(asking, found, strict=True):
            one.ticket.held = self.bank.hold(chosen.weights)
            one.chosen = True
            self.metrics.dispatched.labels(chosen.label).inc()
            one.ticket.tell(Mixed(chosen.weights, chosen.label, chosen.prob, chosen.probs, chosen.cost))

    def _begin(self, one: Waiting) -> None:
        """Reads the prompt; a ticket that draws nothing is finished then."""
        ticket, held = one.ticket, one.ticket.held
        one.started = time.monotonic()
        if ticket.question is None:
            ticket.tell(Mixed(held.weights))
        if ticket.scores_prompt:
            found = prompt_scores(
                self._rows.weights, list(ticket.prompt_ids), held.alphas, ticket.likeliest, self._copies
            )
            if not np.isfinite(found.logprobs).all():
                raise UserError(_overflow(held))
            likeliest = pairs(found.ids, found.likeliest, max(ticket.likeliest, 1))
            ticket.tell(Prompted(found.logprobs.tolist(), likeliest))
        self.metrics.tokens_read.inc(len(ticket.prompt_ids))
        if not ticket.max_new_tokens:
            self._lines.remove(one)
            cost = Cost(time.monotonic() - one.started, len(ticket.prompt_ids), 0, self._flops(ticket, 0))
            self._release(ticket)
            for sample in range(ticket.samples):
                ticket.tell(Ended(sample, "length", cost))
            return
        one.keys = samples_keys(seeds.key(ticket.seed), ticket.line, ticket.samples)
        one.prompt = self._rows.read(ticket.prompt_ids, held.alphas)

    def _flops(self, ticket: Ticket, drawn: int) -> float:
        return self._prices.flops(len(ticket.prompt_ids), drawn)

    def _start(self, one: Waiting) -> None:
        """Gives the ticket's next sample a row."""
        ticket, number = one.ticket, one.begun
        assert one.prompt is not None
        settings = row_settings() if ticket.settings is None else ticket.settings
        sample = Sample(one.keys[number], ticket.max_new_tokens, ticket.held.alphas, settings, ticket.is_rich)
        row, drawn = self._rows.start(one.prompt, sample)
        one.begun += 1
        self._answers[row] = _Answer(one, number, self._text(ticket.stops))
        if one.begun == ticket.samples:
            one.prompt = None
            self._lines.remove(one)
        self._take(row, drawn)

    def _text(self, stops: tuple[str, ...]) -> Text:
        if stops not in self._texts:
            if len(self._texts) >= 256:
                self._texts.clear()
            self._texts[stops] = Text(self.lm.tokenizer, stops)
        return self._texts[stops].another()

    # A step.

    def _step(self) -> None:
        for row, drawn in self._rows.step().items():
            if row in self._answers:  # not one of a ticket that failed in this very loop
                self._take(row, drawn)

    def _take(self, row: int, drawn: Drawn) -> None:
        """Tells what a row drew, and frees it where a stop string or the limit ends it."""
        answer = self._answers[row]
        one, ticket = answer.waiting, answer.waiting.ticket
        if not np.isfinite(drawn.logprobs).all():
            self._fail(one, 400, _overflow(ticket.held))
            return
        keep = answer.text.add(drawn.tokens.tolist())
        size = len(drawn.tokens) if keep is None else keep
        answer.tokens += size
        tokens = drawn.tokens[:size].tolist()
        done = drawn.done or keep is not None
        if done:
            answer.text.end()
        likeliest = []
        if drawn.likeliest is not None and ticket.likeliest:
            likeliest = pairs(drawn.likeliest[0][:size], drawn.likeliest[1][:size], ticket.likeliest)
        ticket.tell(Piece(answer.sample, answer.text.take(), tokens, drawn.logprobs[:size].tolist(), likeliest))
        self.metrics.tokens_drawn.inc(size)
        if done:
            if not drawn.done:
                self._rows.stop([row])
            by_limit = answer.text.stop is None and tokens[-1] not in self._ends
            self._finish(row, "length" if by_limit else "stop")

    def _finish(self, row: int, reason: Any) -> None:
        answer = self._answers.pop(row)
        one, ticket = answer.waiting, answer.waiting.ticket
        seconds = time.monotonic() - one.started
        self._mean_seconds += 0.05 * (seconds - self._mean_seconds)
        cost = Cost(seconds, len(ticket.prompt_ids), answer.tokens, self._flops(ticket, answer.tokens))
        one.ended += 1
        if one.ended == ticket.samples:
            self._release(ticket)
        ticket.tell(Ended(answer.sample, reason, cost))


def _overflow(held: Held) -> str:
    if not held.weights:
        return "the model gives NaN for this prompt: its activations overflow; serve it with --dtype float32"
    return f"the model gives NaN under the mixture {dict(held.weights)}: its weights are too large; lower them"
