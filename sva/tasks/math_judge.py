"""The worker process that compares mathematical answers, and its limits."""

import atexit
import json
import re
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import NamedTuple

from sva.errors import UserError

CPU_SECS = 3.0
_LONGEST = 1_000  # characters of an answer; the longest right one of MATH has 159


class Verdict(NamedTuple):
    """Whether two answers are equal, and what kept them from being compared ("" where nothing did)."""

    equal: bool
    note: str


class Judge:
    """One worker at a time, started when it is first asked and again after one that had to be ended.

    Started as a fresh interpreter (never a fork of this process) that imports nothing of sva. It limits its own CPU
    seconds and memory, and ends with this process. May be shared between threads.
    """

    def __init__(self, cpu_secs: float = CPU_SECS) -> None:
        self._cpu_secs = cpu_secs
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def equal(self, policy: str, gold: str, answer: str) -> Verdict:
        """Whether `answer` equals `gold` under "strict" or "reference".

        Args:
          gold, answer: LaTeX without the dollars around it, or plain text.
        Raises:
          UserError: the worker cannot start.
        """
        if len(answer) > _LONGEST:
            return Verdict(False, "unreadable: too long")
        if policy == "strict" and re.search(r"__|[\"']\w", answer):
            return Verdict(False, "unreadable: program text")
        request = {"policy": policy, "gold": gold, "answer": answer, "cpu_secs": self._cpu_secs}
        with self._lock:
            if self._process is None:
                self._process = self._start()
            try:
                assert self._process.stdin is not None
                assert self._process.stdout is not None
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = ""
            if line:
                return Verdict(**json.loads(line))
            status = self._process.wait()
            self._process.communicate()
            self._process = None
        if status > 0:
            raise UserError("the worker that compares mathematical answers cannot start; is math-verify installed?")
        return Verdict(False, f"more than {self._cpu_secs:g} CPU seconds or too much memory")

    @staticmethod
    def _start() -> "subprocess.Popen[str]":
        program = Path(__file__).with_name("math_worker.py")
        pipe = subprocess.PIPE
        return subprocess.Popen(  # -P: the program's folder is not searched for modules
            [sys.executable, "-P", str(program)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )

    def close(self) -> None:
        """Ends the worker."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.communicate()
                self._process = None


@cache
def judge() -> Judge:
    """The one that this process's tasks share."""
    shared = Judge()
    atexit.register(shared.close)
    return shared
