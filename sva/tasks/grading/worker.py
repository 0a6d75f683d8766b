"""A worker process for what may take for ever, and its limits.

Its program is started as a fresh interpreter (never a fork of this process, which runs JAX), imports nothing by way of
sva, and limits its own CPU seconds and memory. CPU seconds, so that a verdict does not depend on what else the machine
does.
"""

import atexit
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sva.utils.errors import UserError

CPU_SECS = 3.0


class Verdict(NamedTuple):
    """Whether an answer is right, and what kept it from being compared ("" where nothing did)."""

    equal: bool
    note: str


class Worker:
    """One process at a time, started when it is first asked and again after one that went beyond its limits.

    It ends with this process. May be shared between threads.
    """

    def __init__(self, program: str, cpu_secs: float = CPU_SECS) -> None:
        self._program = Path(__file__).with_name(program)
        self._cpu_secs = cpu_secs
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: Mapping[str, Any]) -> Verdict:
        """The program's verdict on a request; of one beyond the limits, that it was.

        Raises:
          UserError: the program cannot start; a package that it needs is not installed.
        """
        with self._lock:
            if self._process is None:
                self._process = self._start()
            try:
                assert self._process.stdin is not None
                assert self._process.stdout is not None
                self._process.stdin.write(json.dumps({**request, "cpu_secs": self._cpu_secs}) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if line:
                return Verdict(**json.loads(line))
            process, self._process = self._process, None
            _, said = process.communicate()
        if process.returncode > 0:
            last = (said.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{self._program.name} cannot run ({last}); is everything that sva needs installed?")
        return Verdict(False, f"gave up after {self._cpu_secs:g} CPU seconds or too much memory")

    def _start(self) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        command = [sys.executable, "-P", str(self._program)]  # -P: no module is looked for beside the program
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.communicate()
                self._process = None


@cache
def shared(program: str) -> Worker:
    """The one that this process's tasks share."""
    worker = Worker(program)
    atexit.register(worker.close)
    return worker
