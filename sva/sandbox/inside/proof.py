"""What holds of a confined process, found out by trying to break it from inside."""

import os
import signal
import socket
import sys
from collections.abc import Callable

from .confine import Limits, Plan

FACTS = ("network", "files", "processes", "forks", "memory")
"""No network; no file outside read or changed; no process outside reached; new ones bounded in number; memory too."""


def holds(plan: Plan, limits: Limits, home: str, outside: int) -> list[str]:
    """Those of `FACTS` that hold here; `outside` is the number of a process that must be out of reach."""
    tries = {
        "network": _network,
        "files": lambda: _files(plan, home),
        "processes": lambda: _processes(plan, outside),
        "forks": lambda: _forks(limits.num_processes),
        "memory": lambda: _fails(lambda: bytearray(limits.memory_bytes), MemoryError),
    }
    return [fact for fact in FACTS if tries[fact]()]


def _fails(action: Callable[[], object], error: type[BaseException] = OSError) -> bool:
    try:
        action()
    except error:
        return True
    return False


def _network() -> bool:
    def reach(family: int, kind: int) -> None:
        with socket.socket(family, kind) as own:
            own.settimeout(0.2)
            own.connect(("127.0.0.1", 9))  # over UDP this succeeds wherever there is a loopback

    return _fails(lambda: reach(socket.AF_INET, socket.SOCK_DGRAM))


def _files(plan: Plan, home: str) -> bool:
    def write(directory: str) -> None:
        path = os.path.join(directory, f".sva-sandbox-{os.getpid()}")
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        os.unlink(path)  # reached in the own directory, and where the sandbox does not hold

    def is_hidden(directory: str) -> bool:
        names = {name for path in plan.readable for name in path.split("/")}  # the way to what may be read
        return _fails(lambda: os.listdir(directory)) or set(os.listdir(directory)) <= names

    library = os.path.dirname(os.__file__)
    shut = ("/", home, "/var/tmp", "/dev/shm", "/etc", library, sys.base_prefix)
    return (
        all(_fails(lambda place=place: write(place)) for place in shut)
        and all(is_hidden(place) for place in (home, "/etc", "/proc", "/var"))
        and _fails(lambda: os.utime(os.__file__))
        and not _fails(lambda: write("."))
    )


def _processes(plan: Plan, outside: int) -> bool:
    if "namespaces" in plan.means:  # numbers mean something else in here; the parent is the first process there is
        return os.getppid() == 1 and _fails(lambda: os.listdir("/proc"))
    return _fails(lambda: os.kill(outside, 0)) and _fails(lambda: os.listdir(f"/proc/{outside}"))


def _forks(most: int) -> bool:
    children = []
    try:
        while len(children) <= most:
            child = os.fork()
            if not child:
                signal.pause()
                os._exit(0)
            children.append(child)
    except OSError:
        return True
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return False
