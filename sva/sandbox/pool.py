"""The pool of workers, seen from the process that wants verdicts."""

import contextlib
import dataclasses
import json
import os
import queue
import secrets
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sva.sandbox.inside import confine, plain
from sva.sandbox.inside.proof import FACTS
from sva.sandbox.inside.tester import PROGRAM_ENDED
from sva.sandbox.inside.worker import SETUP_FAILED
from sva.utils.errors import UserError, above, at_least

LEVELS = ("strict", "best-effort")

_START = (
    "import sys; sys.path.insert(0, {place!r}); from inside import worker; worker.main({file}, {means!r}, {home!r})"
)
_SECONDS_TO_ANSWER = 60.0  # for a worker to start, or to end a program; takes milliseconds
_MEANING = {
    "network": "no network",
    "files": "no files outside",
    "processes": "no processes outside",
    "forks": "processes bounded",
    "memory": "memory bounded",
}


@dataclass(frozen=True)
class Limits:
    """What one program may use; its tests, in a process of their own, are held to the same.

    `cpu_secs` (whole seconds) and `memory_bytes` (address space) are a process's, `file_bytes` a file's, `disk_bytes`
    all files' together. `load_secs` is the wall time that the program's top-level code may take. Output is what is
    written to stdout and stderr. `num_processes` counts threads and needs a user or user namespace of its own; where
    the seccomp filter is in force there are no new processes at all.
    """

    cpu_secs: int = 10
    wall_secs: float = 30.0
    load_secs: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    output_bytes: int = 1 << 20
    num_processes: int = 64
    num_open_files: int = 64

    def __post_init__(self) -> None:
        at_least("sandbox.cpu_secs", self.cpu_secs, 1)
        above("sandbox.wall_secs", self.wall_secs, 0)
        above("sandbox.load_secs", self.load_secs, 0)
        at_least("sandbox.memory_bytes", self.memory_bytes, 64 << 20)
        for name in ("file_bytes", "disk_bytes", "output_bytes", "num_processes"):
            at_least(f"sandbox.{name}", getattr(self, name), 1)
        at_least("sandbox.num_open_files", self.num_open_files, 8)

    def of_process(self) -> dict[str, Any]:
        """Those that the kernel holds a process to."""
        return {own.name: getattr(self, own.name) for own in dataclasses.fields(confine.Limits)}


@dataclass(frozen=True)
class Job:
    """A program and its tests, both Python source.

    The tests see `call(name, *args, **kwargs)`, the program's function of that name; `call_within(secs, name, ...)`,
    the same with a limit of wall time; and `data`, a copy of the plain data given here. Tests that run to their end
    pass; an assertion that fails, or any exception, fails the program.
    """

    program: str
    tests: str
    data: Any = None


class Verdict(NamedTuple):
    """Whether a program passed, and why not: the failed assertion, what it raised, or the limit it ran into."""

    passed: bool
    reason: str
    cpu_secs: float

    @property
    def is_time_limit(self) -> bool:
        """Whether the program was stopped for its time, so that it might pass on a faster machine."""
        return self.reason.startswith("time limit")


class _WorkerDied(Exception):
    pass


class _Watched(NamedTuple):
    """What was seen of a program while it ran."""

    verdict: bytes  # as its tests wrote it
    stopped: str  # for which limit, "" if for none
    pid: int | None


class _Worker:
    """One worker process and the socket to it."""

    def __init__(self, means: Sequence[str]):
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        place, home = str(Path(__file__).parent), str(Path.home())
        start = _START.format(place=place, file=theirs.fileno(), means=tuple(means), home=home)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-s", "-P", "-B", "-X", "utf8", "-c", start],
                env={"PYTHONHASHSEED": "0", **{k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd="/",
                start_new_session=True,
            )
        self.control.settimeout(_SECONDS_TO_ANSWER)
        try:
            self.report = self._answer()
        except _WorkerDied:
            self.close()
            raise

    def _answer(self) -> Any:
        try:
            text = self.control.recv(1 << 16)
        except OSError:
            text = b""
        if not text:
            raise _WorkerDied
        return json.loads(text)

    def run(self, job: Job, limits: Limits) -> Verdict:
        """The verdict on one job.

        Raises:
          _WorkerDied: the worker is gone; it must be closed.
        """
        nonce = secrets.token_hex(16)
        tests = {"nonce": nonce, "source": job.tests, "data": plain.encode(job.data), "load_secs": limits.load_secs}
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            calls, answers = socket.socketpair()
            output, their_output = socket.socketpair()
            read, write = os.pipe()
            ours.enter_context(output)
            ours.callback(os.close, read)
            theirs.callback(os.close, write)
            for end in (calls, answers, their_output):
                theirs.enter_context(end)
            source = theirs.enter_context(_file(job.program.encode("utf-8", "surrogatepass")))
            told = theirs.enter_context(_file(json.dumps(tests).encode()))
            output.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            files = [calls.fileno(), source.fileno(), their_output.fileno(), answers.fileno(), told.fileno(), write]
            try:
                socket.send_fds(self.control, [json.dumps(limits.of_process()).encode()], files)
                theirs.close()
                watched = self._watch(output, read, limits)
                num_threads = _num_threads(watched.pid) if watched.pid else None
                self.control.send(b".")
            except OSError as error:
                raise _WorkerDied from error
        (status, cpu_secs), tests_end = self._answer()
        return _judge(watched, nonce, limits, num_threads, status, cpu_secs, tests_end)

    def _watch(self, output: socket.socket, verdict: int, limits: Limits) -> _Watched:
        """Waits for the verdict, the end of the tests' process or a limit."""
        deadline = time.monotonic() + limits.wall_secs
        text, num_bytes, pid = b"", 0, None
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            selector.register(verdict, selectors.EVENT_READ)
            while (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(min(left, 0.1)):
                    if key.fileobj == verdict:
                        part = os.read(verdict, 1 << 16)
                        text += part
                        if not part or text.endswith(b"\n"):
                            return _Watched(text, "", pid)
                        continue
                    if pid is None:  # the worker's own byte, with which the kernel says whose it is
                        part, credentials, _, _ = output.recvmsg(1, socket.CMSG_SPACE(12))
                        pid = struct.unpack("3i", credentials[0][2])[0] if part else None
                    else:  # open files that a program might send along are dropped
                        part = output.recv(1 << 16)
                        num_bytes += len(part)
                    if not part:
                        selector.unregister(output)
                    elif num_bytes > limits.output_bytes:
                        return _Watched(b"", f"output limit: more than {limits.output_bytes} bytes", pid)
                if self.report["directory"] and _disk_bytes(self.report["directory"]) > limits.disk_bytes:
                    return _Watched(b"", f"disk limit: more than {limits.disk_bytes} bytes", pid)
        return _Watched(b"", f"time limit: {limits.wall_secs:g} s of wall time", pid)

    def close(self) -> None:
        """Ends the worker and whatever it runs."""
        self.control.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        directory = getattr(self, "report", {}).get("directory")
        if directory:
            shutil.rmtree(directory, ignore_errors=True)


def _file(content: bytes) -> Any:
    """An open file in memory that can only be read."""
    with open(os.memfd_create("sva-sandbox", os.MFD_CLOEXEC), "wb") as file:
        file.write(content)
        file.flush()
        return open(f"/proc/self/fd/{file.fileno()}", "rb", buffering=0)


def _num_threads(pid: int) -> int | None:
    """Of a process; None if it is no more."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return None if fields["State"].strip().startswith(("Z", "X")) else int(fields["Threads"])


def _disk_bytes(directory: str) -> int:
    """What the files below a directory take up."""
    total = 0
    for place, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


def _judge(
    watched: _Watched,
    nonce: str,
    limits: Limits,
    num_threads: int | None,
    status: int,
    cpu_secs: float,
    tests_end: tuple[int, float],
) -> Verdict:
    def failed(reason: str) -> Verdict:
        return Verdict(False, reason, cpu_secs)

    if SETUP_FAILED << 8 in (status if watched.pid is None else 0, tests_end[0] if not watched.verdict else 0):
        raise UserError("the sandbox could not be set up for a program; is the machine out of memory or processes?")
    if watched.stopped:
        return failed(watched.stopped)
    if not watched.verdict:
        return failed(f"its tests ended without a verdict ({_end(*tests_end, limits)})")
    verdict = json.loads(watched.verdict)
    assert verdict["nonce"] == nonce, "a verdict that is not this job's"
    passed, reason = verdict["passed"], verdict["reason"]
    if num_threads is None or reason.startswith(PROGRAM_ENDED):  # in the latter case it may be just about to
        end = _end(status, cpu_secs, limits)
        return failed(end if end.startswith("time limit") else f"{reason or PROGRAM_ENDED} ({end})")
    if passed and num_threads > 1:
        return failed(f"it left {num_threads - 1} threads running")
    return Verdict(passed, reason, cpu_secs)


def _end(status: int, cpu_secs: float, limits: Limits) -> str:
    """How a process ended, in words."""
    if not os.WIFSIGNALED(status):
        return f"exit status {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    # The kernel counts this limit in ticks, which on a busy machine are more than the time that was used.
    if number == signal.SIGXCPU or (number == signal.SIGKILL and cpu_secs > 0.7 * limits.cpu_secs):
        return f"time limit: {limits.cpu_secs} s of CPU time"
    return f"killed by {signal.Signals(number).name}"


def _close_all(workers: "queue.SimpleQueue[_Worker]") -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            workers.get_nowait().close()


@dataclass
class Sandbox:
    """A pool of workers at a level of confinement; also a context manager that closes it.

    Args:
      level: "strict" refuses to run unless all of `FACTS` are proved to hold; "best-effort" runs with what there is.
      num_workers: how many programs run at once; default the number of forms.
      means: which of the kernel's means (`MEANS`) may be used.
    Raises:
      UserError: no such level, or it cannot be had on this machine (what is missing is named).
    """

    level: str = "strict"
    num_workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    means: Sequence[str] = confine.MEANS

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise UserError(f"sandbox={self.level!r}: there are {' and '.join(LEVELS)}")
        if sys.platform != "linux":
            raise UserError(f"the sandbox needs Linux; on {sys.platform}, run sva in a Linux virtual machine")
        at_least("sandbox.num_workers", self.num_workers, 1)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._finalizer = weakref.finalize(self, _close_all, self._idle)
        first = self._started()
        self.in_force: tuple[str, ...] = tuple(first.report["means"])
        self.facts: tuple[str, ...] = tuple(first.report["facts"])
        missing = [_MEANING[fact] for fact in FACTS if fact not in self.facts]
        said = f"in force: {', '.join((*self.in_force, 'limits'))}; not ensured: {', '.join(missing) or 'nothing'}"
        if missing and self.level == "strict":
            first.close()
            raise UserError(
                f"sandbox=strict cannot be had here ({said}); allow user namespaces, use Linux 6.2 or later, "
                "or say sandbox=best-effort"
            )
        print(f"sandbox: {self.level}, {said}", file=sys.stderr)
        self._idle.put(first)

    def _started(self) -> _Worker:
        try:
            return _Worker(self.means)
        except _WorkerDied:
            raise UserError("the sandbox's worker did not start; is the machine out of memory or processes?") from None

    def run(self, jobs: Sequence[Job], limits: Limits = Limits()) -> list[Verdict]:
        """A verdict for each job, in order; as many at once as there are workers."""
        assert self._finalizer.alive, "this sandbox is closed"
        with ThreadPoolExecutor(self.num_workers) as threads:
            return list(threads.map(lambda job: self._one(job, limits), jobs))

    def _one(self, job: Job, limits: Limits) -> Verdict:
        for _ in range(2):
            try:
                worker = self._idle.get_nowait()
            except queue.Empty:
                worker = self._started()
            try:
                verdict = worker.run(job, limits)
            except BaseException as error:
                worker.close()
                if not isinstance(error, _WorkerDied):
                    raise
            else:
                self._idle.put(worker)
                return verdict
        return Verdict(False, "the sandbox's worker died of it, twice", 0.0)

    def close(self) -> None:
        """Ends all workers."""
        self._finalizer()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
