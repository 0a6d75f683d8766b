"""Two programs compared in turn, each in a process of its own: in one process, torch makes XLA a third slower."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def started(serve: Callable[..., None], *arguments: Any) -> Connection:
    """The end of a pipe to a new process that runs `serve(pipe, *arguments)`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(theirs, *arguments), daemon=True).start()
    theirs.close()
    return ours


def answer(pipe: Connection, run: Callable[..., Any]) -> None:
    """Sends (what `run` of each message returns, seconds, seconds of processors), until the message is None."""
    while (asked := pipe.recv()) is not None:
        began, worked = time.perf_counter(), time.process_time()
        found = run(asked)
        pipe.send((found, time.perf_counter() - began, time.process_time() - worked))
