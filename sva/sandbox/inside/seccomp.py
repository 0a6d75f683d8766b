"""Which system calls a program may make: a seccomp filter that allows what Python needs to compute and no more.

Allowed: memory, time, threads, files (which ones, Landlock or the mount namespace decides), pipes and socket pairs,
signals to itself. Refused with EPERM: starting processes or programs, sockets, signals to others. Everything else,
also what later kernels bring, with ENOSYS. See seccomp(2); numbers from the kernel's unistd.h.
"""

import ctypes
import errno
import os
import platform
import struct
from typing import NamedTuple

from . import kernel

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000

# name: (number on x86_64, number on aarch64), None where that architecture lacks it
_FREE = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
preadv2 327 286, pwritev2 328 287, lseek 8 62, open 2 -, openat 257 56, creat 85 -, close 3 57, close_range 436 436,
stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48, faccessat2 439 439,
readlink 89 -, readlinkat 267 78, getdents 78 -, getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50,
mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276,
link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, ftruncate 77 46, fallocate 285 47, fsync 74 82,
fdatasync 75 83, flock 73 32, umask 95 166, statfs 137 43, fstatfs 138 44, fadvise64 221 223, sendfile 40 71,
copy_file_range 326 285, splice 275 76, tee 276 77, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59,
poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21,
epoll_wait 232 -, epoll_pwait 281 22, epoll_pwait2 441 441, eventfd 284 -, eventfd2 290 19, timerfd_create 283 85,
timerfd_settime 286 86, timerfd_gettime 287 87, signalfd 282 -, signalfd4 289 74,
sendto 44 206, recvfrom 45 207, sendmsg 46 211, recvmsg 47 212, shutdown 48 210, getsockopt 55 209, setsockopt 54 208,
getsockname 51 204, getpeername 52 205,
brk 12 214, mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, madvise 28 233, mincore 27 232, msync 26 227,
membarrier 324 283,
clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, gettimeofday 96 169,
time 201 -, times 100 153, getitimer 36 102, setitimer 38 103, alarm 37 -, timer_create 222 107,
timer_settime 223 110, timer_gettime 224 108, timer_getoverrun 225 109, timer_delete 226 111,
getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177,
getresuid 118 148, getresgid 120 150, getgroups 115 158, getpgrp 111 -, getpgid 121 155, getsid 124 156,
setsid 112 157, setpgid 109 154, uname 63 160, sysinfo 99 179, getrusage 98 165, getrlimit 97 163, getcpu 309 168,
sched_yield 24 124, sched_getaffinity 204 123, sched_getparam 143 121, sched_getscheduler 145 120,
sched_get_priority_max 146 125, sched_get_priority_min 147 126, getpriority 140 141, capget 125 90,
arch_prctl 158 -, set_tid_address 218 96, set_robust_list 273 99, get_robust_list 274 100, rseq 334 293, futex 202 98,
futex_waitv 449 449, exit 60 93, exit_group 231 94, wait4 61 260, waitid 247 95, restart_syscall 219 128, pause 34 -,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigsuspend 130 133, rt_sigtimedwait 128 137,
rt_sigpending 127 136, sigaltstack 131 132, getrandom 318 278
"""
_REFUSED = "fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, socket 41 198, tkill 200 130"


class _Check(NamedTuple):
    """Allowed only where the argument of that place, masked, is one of `values`; with `unless`, where it is none."""

    numbers: str
    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    unless: bool = False


def _checks(pid: int) -> list[_Check]:
    thread, stream = 0x10000, 1
    owner_of_signals = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: would have the kernel send signals to others
    terminal = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # is it one, its size; bytes waiting; close on exec
    return [
        _Check("clone 56 220", 0, (thread,), mask=thread),
        _Check("kill 62 129", 0, (pid,)),
        _Check("tgkill 234 131", 0, (pid,)),
        _Check("prlimit64 302 261", 0, (0,)),
        _Check("socketpair 53 199", 1, (stream,), mask=0xF),  # a datagram socket could send to others
        _Check("ioctl 16 29", 1, terminal),
        _Check("fcntl 72 25", 1, owner_of_signals, unless=True),
        _Check("prctl 157 167", 0, (1,), unless=True),  # PR_SET_PDEATHSIG
    ]


def _numbers(table: str) -> list[int]:
    column = 1 + list(_ARCHITECTURES).index(platform.machine())
    words = [entry.split()[column] for entry in table.split(",")]
    return [int(word) for word in words if word != "-"]


_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16  # in struct seccomp_data; the low word of an argument is first


def _program(pid: int) -> bytes:
    """The filter as BPF: one comparison a system call, then what to do."""
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _ARCHITECTURES[platform.machine()]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for table, action in ((_FREE, _ALLOW), (_REFUSED, _ERRNO | errno.EPERM)):
        for number in _numbers(table):
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, action)]
    for check in _checks(pid):
        matched, other = (_ERRNO | errno.EPERM, _ALLOW) if check.unless else (_ALLOW, _ERRNO | errno.EPERM)
        body = [(_LOAD, 0, 0, _ARGUMENTS_AT + 8 * check.argument), (_AND, 0, 0, check.mask)]
        for value in check.values:
            body += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, matched)]
        body += [(_RETURN, 0, 0, other)]
        code += [(_EQUAL, 0, len(body), _numbers(check.numbers)[0]), *body]
    code += [(_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def is_known() -> bool:
    """Whether the filter can be written for this architecture."""
    return platform.machine() in _ARCHITECTURES


def install() -> None:
    """Puts the filter on the calling process, for good; after `kernel.no_new_privileges`."""
    program = _program(os.getpid())
    buffer = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program) // 8, ctypes.addressof(buffer)))
    kernel.prctl(22, 2, ctypes.addressof(header))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
