"""The tickets that wait for rows: those of clients in the order they came, and behind them those of the background."""

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from sva.serving.rows import ReadPrompt
from sva.serving.tickets import Ticket


@dataclasses.dataclass(eq=False)
class Waiting:
    """A ticket, and how far its samples have come."""

    ticket: Ticket
    chosen: bool  # its experts are known
    keys: list[np.ndarray] = dataclasses.field(default_factory=list)  # of its samples
    prompt: ReadPrompt | None = None
    begun: int = 0  # samples that have a row, or had one
    ended: int = 0
    started: float = 0.0

    def is_over(self, now: float) -> bool:
        """Whether its client has left, or its time is up."""
        return self.ticket.is_cancelled or now > self.ticket.deadline


class Lines:
    """Both lines, for any thread."""

    def __init__(self, limit: int) -> None:
        """`limit`: clients' samples that may wait."""
        self._limit = limit
        self._lock = threading.Lock()
        self._clients: deque[Waiting] = deque()
        self._background: deque[Waiting] = deque()

    def __bool__(self) -> bool:
        return bool(self._clients or self._background)

    @property
    def samples(self) -> int:
        """Clients' samples that wait."""
        with self._lock:
            return sum(one.ticket.samples - one.begun for one in self._clients)

    def fits(self, tickets: Sequence[Ticket]) -> bool:
        """Whether so many more may wait."""
        new = sum(ticket.samples for ticket in tickets if not ticket.is_background)
        return not new or self.samples + new <= self._limit

    def add(self, ticket: Ticket) -> None:
        """Puts a ticket last."""
        with self._lock:
            self._line(ticket).append(Waiting(ticket, chosen=ticket.question is None))

    def next(self, *, background: bool) -> Waiting | None:
        """The ticket whose next sample takes the next free row; one of the background only if that may be."""
        with self._lock:
            if self._clients:
                return self._clients[0]
            return self._background[0] if background and self._background else None

    def unchosen(self, count: int) -> list[Waiting]:
        """The first tickets that wait for a first pass."""
        with self._lock:
            return [one for one in self._clients if not one.chosen][:count]

    def remove(self, one: Waiting) -> None:
        """Takes a ticket out, if it is there."""
        with self._lock:
            line = self._line(one.ticket)
            if one in line:
                line.remove(one)

    def take_over(self) -> list[Waiting]:
        """The tickets whose client has left or whose time is up, taken out."""
        now = time.monotonic()
        return self._take(lambda one: one.is_over(now))

    def take_all(self) -> list[Waiting]:
        """Every ticket, taken out."""
        return self._take(lambda _: True)

    def has_clients(self) -> bool:
        """Whether any client waits."""
        return bool(self._clients)

    def _take(self, wanted: Callable[[Waiting], bool]) -> list[Waiting]:
        with self._lock:
            found = [one for line in (self._clients, self._background) for one in line if wanted(one)]
            for one in found:
                self._line(one.ticket).remove(one)
            return found

    def _line(self, ticket: Ticket) -> deque[Waiting]:
        return self._background if ticket.is_background else self._clients
