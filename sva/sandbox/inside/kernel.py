"""The Linux kernel's own means of confinement, through ctypes: namespaces, a root of its own, Landlock, capabilities.

Each function does one thing to the calling process and raises OSError where the kernel will not. Manual pages:
namespaces(7), pivot_root(2), mount_setattr(2), landlock(7), capabilities(7), prctl(2).
"""

import ctypes
import os
import platform
import struct
from collections.abc import Iterable, Sequence

_libc = ctypes.CDLL(None, use_errno=True)

# These numbers are the same on every architecture, but for the last two.
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPSET = {"x86_64": 126, "aarch64": 91}

_NEW_NAMESPACES = {"mount": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "user": 0x10000000, "pid": 0x20000000}
_NEW_NAMESPACES["net"] = 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x2, 0x4, 0x1000, 0x4000, 0x40000, 0x2
_AT_FDCWD, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = -100, 0x8000, 0x1, 0x2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_SIGKILL = 9


def _checked(result: int, what: str) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def syscall(what: str, number: int, *args: int | bytes | None) -> int:
    """The result of a system call that the C library has no function for."""
    converted = [ctypes.c_long(arg) if isinstance(arg, int) else ctypes.c_char_p(arg) for arg in args]
    return _checked(_libc.syscall(ctypes.c_long(number), *converted), what)


def prctl(option: int, *args: int) -> None:
    """prctl(2)."""
    _checked(_libc.prctl(option, *(ctypes.c_ulong(arg) for arg in (*args, 0, 0, 0, 0)[:4])), f"prctl {option}")


def unshare(*names: str) -> None:
    """Leaves the named namespaces for new ones; of "pid", the children do."""
    _checked(_libc.unshare(sum(_NEW_NAMESPACES[name] for name in names)), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    args = [arg.encode() if arg is not None else None for arg in (source, target, kind)]
    _checked(_libc.mount(*args, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def mount_memory(target: str, num_bytes: int, num_files: int, mode: str) -> None:
    """Mounts an empty file system in memory, bounded in bytes and files."""
    options = f"size={num_bytes},nr_inodes={num_files},mode={mode}"
    mount("tmpfs", target, "tmpfs", _MS_NOSUID | _MS_NODEV, options)


def _read_only(path: str, flags: int) -> None:
    attributes = struct.pack("QQQQ", _ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0)
    syscall(f"mount_setattr {path}", _MOUNT_SETATTR, _AT_FDCWD, path.encode(), flags, attributes, len(attributes))


def _pivot(new: str, old: str) -> None:
    syscall("pivot_root", _PIVOT_ROOT[platform.machine()], new.encode(), old.encode())
    os.chdir("/")


def become_mapped(uid: int, gid: int) -> None:
    """In a new user namespace: this user is mapped to itself, nobody else is."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def change_root(readable: Sequence[str]) -> None:
    """In a new mount namespace: a root that holds the paths `readable`, read-only, and an empty /tmp.

    Links among them are kept as links. Built on a file system in memory over /tmp, which only this namespace sees.
    """
    mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=0755,size=1m")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    os.chdir("/tmp")
    _pivot(".", "old")
    mount("/new", "/new", None, _MS_BIND)
    for path in readable:
        source, target = "/old" + path, "/new" + path
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        if os.path.islink(source):
            os.symlink(os.readlink(source), target)
        elif not os.path.lexists(target):
            if os.path.isdir(source):
                os.mkdir(target, 0o755)
            else:
                os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
            mount(source, target, None, _MS_BIND | _MS_REC)
            _read_only(target, _AT_RECURSIVE)
    os.mkdir("/new/tmp", 0o755)
    os.chdir("/new")
    _pivot(".", ".")
    _checked(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")
    _read_only("/", 0)


_FS_EXECUTE, _FS_WRITE_FILE, _FS_READ_FILE, _FS_READ_DIR, _FS_TRUNCATE, _FS_IOCTL = (
    1,
    1 << 1,
    1 << 2,
    1 << 3,
    1 << 14,
    1 << 15,
)
_FS_OF_FILES = _FS_WRITE_FILE | _FS_READ_FILE | _FS_TRUNCATE
_FS_SPECIAL = 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11  # making devices, sockets, pipes: granted nowhere
_NET_ALL, _SCOPE_ALL = 0b11, 0b11  # binding and connecting; abstract sockets and signals outside
LANDLOCK_ENOUGH = 3  # the first version in which a file that may not be written may not be cut short either (Linux 6.2)


def landlock_version() -> int:
    """Of the running kernel; 0 where there is none."""
    try:
        return syscall("landlock", _LANDLOCK_CREATE, None, 0, 1)
    except OSError:
        return 0


def landlock(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Takes away, for good, every file but these, TCP, and signals to processes outside; after `no_new_privileges`.

    What the kernel's version knows of it: TCP from 4, signals from 6. `writable` directories may be written to;
    `writable` files too.
    """
    version = landlock_version()
    known = (1 << {3: 15, 4: 15}.get(version, 16)) - 1
    attributes = struct.pack("QQQ", known, _NET_ALL, _SCOPE_ALL)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = syscall("landlock_create_ruleset", _LANDLOCK_CREATE, attributes, size, 0)
    may_read = _FS_READ_FILE | _FS_READ_DIR
    for paths, rights in ((readable, may_read), (writable, known & ~_FS_SPECIAL & ~_FS_EXECUTE & ~_FS_IOCTL)):
        for path in paths:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = rights if os.path.isdir(path) else rights & _FS_OF_FILES
            syscall("landlock_add_rule", _LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed, place), 0)
            os.close(place)
    syscall("landlock_restrict_self", _LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def no_new_privileges() -> None:
    """No program run from here on gains rights; what Landlock and seccomp ask for first."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Gives up every capability, of this process and of what it might run."""
    header, nothing = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", 0, 0, 0, 0, 0, 0)
    for capability in range(64):
        try:
            prctl(_PR_CAPBSET_DROP, capability)
        except OSError:
            break  # the kernel's last one was the one before, or there is no right to drop any
    syscall("capset", _CAPSET[platform.machine()], header, nothing)


def become(uid: int) -> None:
    """From root to a user and group of that number, for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def die_with_parent() -> None:
    """SIGKILL when the parent ends."""
    prctl(_PR_SET_PDEATHSIG, _SIGKILL)


def set_dumpable(yes: bool) -> None:
    """Whether processes of the same user may trace this one or read its memory."""
    prctl(_PR_SET_DUMPABLE, int(yes))
