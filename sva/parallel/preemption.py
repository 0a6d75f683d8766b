"""SIGTERM, by which schedulers announce that a machine is taken away."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


class Terminated(SystemExit):
    """Raised where the program is when SIGTERM comes; the exit code is the usual 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Shield:
    """Lets a save finish before the process ends."""

    def __init__(self) -> None:
        self._is_up = False
        self._is_due = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._is_due = True
        if not self._is_up:
            self._end()

    def _end(self) -> None:
        print("\nsva: received SIGTERM; run the same command to resume from the last saved step", file=sys.stderr)
        raise Terminated

    @contextlib.contextmanager
    def up(self) -> Iterator[None]:
        """Inside, SIGTERM waits for the end of the block."""
        self._is_up = True
        try:
            yield
        finally:
            self._is_up = False
        if self._is_due:
            self._end()


@contextlib.contextmanager
def shielded() -> Iterator[Shield]:
    """Inside, SIGTERM raises `Terminated`, but while the shield is up; the handler before it is put back.

    Signals belong to the main thread: in any other nothing is changed. A program that runs on a device is waited for.
    """
    shield = Shield()
    if threading.current_thread() is not threading.main_thread():
        yield shield
        return
    before = signal.signal(signal.SIGTERM, shield._on_signal)
    try:
        yield shield
    finally:
        signal.signal(signal.SIGTERM, before)
