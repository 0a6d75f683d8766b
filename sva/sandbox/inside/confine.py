"""How one process is shut in, and which of the kernel's means a worker has for it."""

import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass

from . import kernel, seccomp

MEANS = ("namespaces", "user", "landlock", "seccomp")
"""In the order in which they are taken up: new namespaces (mount with a root of its own, pid, net, ipc, uts, and user
where the worker is not root), a user of its own (where it is), Landlock, a seccomp filter. Limits are always set."""


@dataclass(frozen=True)
class Limits:
    """What the kernel holds one process to; `sva.sandbox.Limits` says what each is."""

    cpu_secs: int
    memory_bytes: int
    file_bytes: int
    disk_bytes: int
    num_processes: int
    num_open_files: int


@dataclass(frozen=True)
class Plan:
    """The means in force in a worker; the paths that programs may read; their user, None to stay who it is."""

    means: tuple[str, ...]
    readable: tuple[str, ...]
    uid: int | None


def readable_paths() -> tuple[str, ...]:
    """What Python itself needs to run: its library, the system's libraries, time zones and three devices.

    Links come with what they point to.
    """
    library = os.path.dirname(os.path.realpath(os.__file__))
    beside = os.path.dirname(library)  # Python's own shared libraries
    wanted = [library, beside if os.path.basename(beside).startswith("lib") else library]
    wanted += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    wanted += ["/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom"]
    found = {end for path in wanted if os.path.exists(path) for end in (path, os.path.realpath(path))}
    links = {path for path in found if os.path.islink(path)}
    places = found - links
    return tuple(sorted(links | {p for p in places if not any(p.startswith(o + os.sep) for o in places)}))


def works(step: Callable[[], object]) -> bool:
    """Whether `step` runs through, tried in a child process."""
    child = os.fork()
    if not child:
        try:
            step()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def enter_namespaces(with_user: bool) -> None:
    """New namespaces for this process; of pids, for its children. `with_user`: of users too, which anybody may."""
    uid, gid = os.getuid(), os.getgid()
    kernel.unshare("mount", "pid", "net", "ipc", "uts", *(("user",) if with_user else ()))
    if with_user:
        kernel.become_mapped(uid, gid)


def private_directory(path: str, limits: Limits) -> None:
    """In a mount namespace of its own: an empty directory in memory at `path`, which vanishes with the process."""
    kernel.unshare("mount", "ipc")
    kernel.mount_memory(path, limits.disk_bytes, num_files=4096, mode="1777")


def limit(limits: Limits, plan: Plan) -> None:
    """Sets the resource limits, which can only be lowered from then on."""
    bounds = {
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: limits.num_open_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    if plan.uid is not None or "namespaces" in plan.means or "seccomp" not in plan.means:
        bounds[resource.RLIMIT_NPROC] = limits.num_processes  # else it would count all that this user runs
    for which, bound in bounds.items():
        _, hard = resource.getrlimit(which)
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(which, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_secs, limits.cpu_secs + 1))


def confine(plan: Plan, limits: Limits, directory: str) -> None:
    """Shuts the calling process in, for good: its own session, `directory` the one place that it can write to.

    At the CPU limit the kernel sends SIGXCPU and a second later SIGKILL, which nothing can ignore.

    Raises:
      OSError: a means of the plan is not to be had; nothing untrusted may run then.
    """
    kernel.die_with_parent()
    os.setsid()
    if "namespaces" in plan.means:
        private_directory(directory, limits)
    os.chdir(directory)
    limit(limits, plan)
    if plan.uid is not None:
        kernel.become(plan.uid)
        kernel.die_with_parent()  # a change of user forgets it
    kernel.no_new_privileges()
    kernel.drop_capabilities()
    if "landlock" in plan.means:
        kernel.landlock(plan.readable, (directory, "/dev/null"))
    if "seccomp" in plan.means:
        seccomp.install()
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # one kill signal more is one error less to catch
