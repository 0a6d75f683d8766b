"""A worker: starts the process of a program and that of its tests, shut in, and ends them. It sees neither's contents.

Both are forked from here, so this process must never hold a test, an expected value or a nonce: those come to their
processes in files that pass through unread. Where there are namespaces, this is the first process of its own, and the
kernel ends everything in it when this process ends, however it does.
"""

import contextlib
import fcntl
import importlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from . import confine, kernel, program, proof, seccomp, tester
from .confine import Limits, Plan

SETUP_FAILED = 97
_FIRST_FREE_UID = 1_900_000_000  # numbers from here on belong to nobody; a worker's own is this plus its pid
_PROOF_LIMITS = Limits(
    cpu_secs=10,
    memory_bytes=512 << 20,
    file_bytes=1 << 20,
    disk_bytes=1 << 20,
    num_processes=16,
    num_open_files=64,
)
# What programs and tests import most, loaded once instead of in each of them.
_COMMON = (
    "array bisect cmath collections copy dataclasses datetime decimal enum fractions functools hashlib heapq itertools "
    "linecache math numbers operator queue random re statistics string threading time traceback typing"
)


def _in_child(action: Callable[[], Any]) -> Any:
    """What `action` returns in a child process, as JSON carries it; None where it fails."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read)
            os.write(write, json.dumps(action()).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else None


def _try_namespaces(with_user: bool) -> None:
    confine.enter_namespaces(with_user)
    kept = confine.works(
        lambda: (kernel.change_root(confine.readable_paths()), kernel.mount_memory("/tmp", 4096, 9, "1777"))
    )
    if not kept:
        raise OSError("no root of its own")


def _into_namespaces() -> bool:
    """Goes on in new namespaces, as their first process, where they can be had; says whether."""
    ways = (False, True) if os.geteuid() == 0 else (True,)
    way = next((way for way in ways if confine.works(lambda way=way: _try_namespaces(way))), None)
    if way is None:
        return False
    confine.enter_namespaces(way)
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os._exit(0)
    kernel.die_with_parent()
    return True


def _plan(allowed: Sequence[str]) -> Plan:
    """Takes up what this process must, finds out what else the kernel gives."""
    readable, uid, means = confine.readable_paths(), _FIRST_FREE_UID + os.getpid(), []
    if "namespaces" in allowed and _into_namespaces():
        kernel.change_root(readable)
        means.append("namespaces")

    def as_user() -> None:
        kernel.become(uid)
        open(os.__file__).close()

    def behind_landlock() -> None:
        kernel.no_new_privileges()
        kernel.landlock(readable, ())

    def behind_filter() -> None:
        kernel.no_new_privileges()
        seccomp.install()

    if "user" in allowed and os.geteuid() == 0 and confine.works(as_user):
        means.append("user")
    if "landlock" in allowed and kernel.landlock_version() >= kernel.LANDLOCK_ENOUGH and confine.works(behind_landlock):
        means.append("landlock")
    if "seccomp" in allowed and seccomp.is_known() and confine.works(behind_filter):
        means.append("seccomp")
    return Plan(tuple(means), readable, uid if "user" in means else None)


class Worker:
    """Processes confined by one plan."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.has_namespaces = "namespaces" in plan.means
        self.directory = "/tmp" if self.has_namespaces else tempfile.mkdtemp(prefix="sva-sandbox-")
        if not self.has_namespaces:
            os.chmod(self.directory, 0o711)

    def own_directory(self) -> str:
        """A directory for one process; with namespaces, the place of one that it makes itself."""
        if self.has_namespaces:
            return self.directory
        path = tempfile.mkdtemp(dir=self.directory)
        if self.plan.uid is not None:
            os.chown(path, self.plan.uid, self.plan.uid)
        return path

    def clear(self) -> None:
        """Removes what processes wrote."""
        if not self.has_namespaces:
            for name in os.listdir(self.directory):
                shutil.rmtree(os.path.join(self.directory, name), ignore_errors=True)

    def proof(self, home: str, outside: int) -> list[str]:
        """The facts that hold of a process confined as programs are."""

        def tried() -> list[str]:
            confine.confine(self.plan, _PROOF_LIMITS, directory)
            return proof.holds(self.plan, _PROOF_LIMITS, home, outside)

        directory = self.own_directory()
        held = _in_child(tried)
        self.clear()
        return held or []

    def start(self, limits: Limits, files: dict[int, int], main: Callable[[], None]) -> int:
        """The number of a new confined process that runs `main` and has the open `files`, by the numbers it sees."""
        directory = self.own_directory()
        child = os.fork()
        if child:
            return child
        try:
            _keep_only(files)
            confine.confine(self.plan, limits, directory)
        except BaseException:
            os._exit(SETUP_FAILED)
        main()
        os._exit(0)

    def finish(self, children: Sequence[int]) -> list[tuple[int, float]]:
        """Ends these processes and all they left; their wait statuses and CPU seconds."""
        ended = []
        for child in children:
            for end in (os.kill, os.killpg):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    end(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            ended.append((status, usage.ru_utime + usage.ru_stime))
        if self.has_namespaces:
            _end_all_others()
        self.clear()
        return ended


def _end_all_others() -> None:
    """As the first process of a namespace: ends and reaps every other in it."""
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _keep_only(files: dict[int, int]) -> None:
    """Leaves open `files` alone, under the numbers that are their keys (from 0 on, without a gap)."""
    copies = {number: fcntl.fcntl(file, fcntl.F_DUPFD, 100) for number, file in files.items()}
    for number, copy in copies.items():
        os.dup2(copy, number)
    os.closerange(len(files), os.sysconf("SC_OPEN_MAX"))


def _run_program() -> None:
    os.write(1, b"\n")  # the kernel adds this process's number, for `sva.sandbox.pool`
    program.main(4, socket.socket(fileno=3))


def _run_tests() -> None:
    tester.main(4, socket.socket(fileno=3), 5)


def serve(worker: Worker, control: socket.socket) -> None:
    """Answers requests until the other end closes.

    A request is the limits and six open files: the program's end of the calls, its source, its output; the tests' end
    of the calls, their source, their verdict. Anything sent after it asks for the end of both.
    """
    nothing = os.open("/dev/null", os.O_RDWR)
    while True:
        text, files, _, _ = socket.recv_fds(control, 1 << 16, 6)
        if not text:
            return
        limits = Limits(**json.loads(text))
        calls, source, output, answers, tests, verdict = files
        children = [
            worker.start(limits, {0: nothing, 1: output, 2: output, 3: calls, 4: source}, _run_program),
            worker.start(limits, {0: nothing, 1: nothing, 2: nothing, 3: answers, 4: tests, 5: verdict}, _run_tests),
        ]
        for file in files:
            os.close(file)
        is_asked = bool(control.recv(1))
        ended = worker.finish(children)
        if not is_asked:
            return
        control.sendall(json.dumps(ended).encode())


def main(control_file: int, allowed: Sequence[str], home: str) -> None:
    """Shuts itself in, reports means and facts, then serves; returns when the pool is gone."""
    os.environ.clear()
    sys.path.pop(0)  # where this module came from
    for name in _COMMON.split():
        importlib.import_module(name)
    outside = os.getppid()
    worker = Worker(_plan(allowed))
    kernel.set_dumpable(False)
    try:
        with socket.socket(fileno=control_file) as control:
            facts = worker.proof(home, outside)
            report = {"means": worker.plan.means, "facts": facts, "landlock": kernel.landlock_version()}
            report["directory"] = None if worker.has_namespaces else worker.directory
            control.sendall(json.dumps(report).encode())
            serve(worker, control)
    finally:
        if not worker.has_namespaces:
            shutil.rmtree(worker.directory, ignore_errors=True)
