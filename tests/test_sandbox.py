"""Programs that attack: none passes, none reaches the host, the pool serves on and nothing is left."""

import collections
import dataclasses
import functools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from sva.sandbox import FACTS, MEANS, Job, Limits, Sandbox, Verdict
from sva.sandbox.inside import confine, kernel, plain, seccomp
from sva.utils.errors import UserError

LIMITS = Limits(
    cpu_secs=1,
    wall_secs=8,
    memory_bytes=256 << 20,
    file_bytes=4 << 20,
    disk_bytes=8 << 20,
    output_bytes=1 << 20,
    num_processes=16,
)
TESTS = "assert call('f', 3) == 9\nassert call('f', -4) == 16"
RIGHT = "def f(x): return x * x"
HOME = str(Path.home())

# What a program may try so as to be believed. The kernel has no part in it: none may pass at any level.
FORGERIES = {
    "os._exit(0)": ("import os\ndef f(x): os._exit(0)", "ended before its tests did"),
    "os._exit(0) while loading": ("import os\nos._exit(0)", "ended before its tests did"),
    "sys.exit": ("import sys\ndef f(x): sys.exit(0)", "SystemExit"),
    "always equal": (
        "class Any:\n  def __eq__(self, _): return True\n  def __ne__(self, _): return False\ndef f(x): return Any()",
        "wrong: assert call",
    ),
    "an int that is always equal": (
        "class Any(int):\n  def __eq__(self, other): return True\n  __hash__ = int.__hash__\ndef f(x): return Any(7)",
        "wrong: assert call",
    ),
    "patched assert": (
        """
        import builtins, sys
        class Never(BaseException): pass
        builtins.AssertionError = Never
        builtins.isinstance = lambda *_: True
        sys.excepthook = lambda *_: None
        def f(x): return None
        """,
        ".",
    ),
    "patched encoder": (
        """
        import sys
        class Any:
            def __eq__(self, other): return True
        sys.modules["inside.plain"].encode = lambda value: {"opaque": "Any"}
        def f(x): return Any()
        """,
        "wrong: assert call",
    ),
    "verdict on every open file": (
        r"""
        import os
        def f(x):
            for text in (b'{"nonce": "", "passed": true, "reason": ""}\n', b"passed\n", b"OK\n"):
                for file in range(3, 64):
                    try: os.write(file, text)
                    except OSError: pass
            print("1 passed"); print('{"passed": true}', flush=True)
            return 0
        """,
        ".",
    ),
    "verdict as an answer": (
        """
        import os, json
        def f(x):
            text = json.dumps({"value": True, "passed": True}).encode()
            os.write(3, len(text).to_bytes(4, "big") + text)
            os._exit(0)
        """,
        ".",
    ),
    "search for nonce and tests": (
        """
        import gc, sys
        def f(x):
            def look(value, depth=0):
                if isinstance(value, (str, bytes)):
                    return "call('f'" in str(value) and "__name__" not in str(value)
                return False
            frame, found = sys._getframe(), []
            while frame:
                found += [v for v in [*frame.f_locals.values(), *frame.f_globals.values()] if look(v)]
                frame = frame.f_back
            found += [o for o in gc.get_objects() if isinstance(o, dict) and "nonce" in o]
            return 9 if found else None
        """,
        "wrong: assert call",
    ),
    "an answer of another length": (
        "import os\ndef f(x):\n  os.write(3, b'\\xff' * 64)\n  return 9",
        "ended before its tests did",
    ),
    "open files sent along": (
        """
        import array, os, socket
        def f(x):
            for number in (1, 3):
                end = socket.socket(fileno=os.dup(number))
                files = array.array("i", [os.open("/dev/null", os.O_RDONLY) for _ in range(20)])
                end.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
            return 9
        """,
        "ended before its tests did",
    ),
    "closed files": ("import os\nos.closerange(0, 256)\ndef f(x): return 9", "ended before its tests did"),
    "exception with a hostile text": (
        "class E(Exception):\n  def __str__(self): raise SystemExit\ndef f(x): raise E",
        "Exception",
    ),
    "AssertionError of its own": ("def f(x): raise AssertionError('passed')", "passed"),
    "endless answer": ("import itertools\ndef f(x): return itertools.count()", "."),
    "deep answer": ("def f(x):\n  v = []\n  for _ in range(100000): v = [v]\n  return v", "RecursionError"),
    "circular answer": ("def f(x):\n  v = []\n  v.append(v)\n  return v", "RecursionError"),
    "long answer": ("def f(x): return 'x' * (17 << 20)", "at most 16777216"),
    "recursion": ("def f(x): return f(x)", "RecursionError"),
    "recursion without limit": ("import sys\nsys.setrecursionlimit(1 << 30)\ndef f(x): return f(x) + 1", "."),
    "not UTF-8": ("def f(x): return '\\ud800'", "wrong: assert call"),
    "no such function": ("def g(x): return 9", "the program has no f"),
    "syntax": ("def f(x) return", "SyntaxError"),
    "null bytes": ("def f(x): return 9\0", "."),
    "empty": ("", "the program has no f"),
}

# What a program may try against the machine. Bounded everywhere:
EXCESSES = {
    "endless loop": ("def f(x):\n  while True: pass", "time limit"),
    "endless loop while loading": ("while True: pass", "time limit"),
    "endless sleep": ("import time\ndef f(x): time.sleep(1000)", "time limit: 8 s of wall"),
    "one slow call in C": ("def f(x): return 9 ** (9 ** 8) % 10", "time limit"),
    "8 GB allocation": ("def f(x): return len(bytearray(8 << 30))", "MemoryError"),
    "8 GB bit by bit": ("def f(x):\n  v = []\n  while True: v.append(bytearray(16 << 20))", "MemoryError"),
    "1 GB file": (
        "def f(x):\n  big = open('big', 'wb')\n  for _ in range(99): big.write(bytes(1 << 24))\n  return x * x",
        "SIGXFSZ",
    ),
    "1 GB of output": ("def f(x):\n  for _ in range(1024): print('x' * (1 << 20))\n  return x * x", "output limit"),
    "1 GB of errors": (
        "import os\ndef f(x):\n  for _ in range(1024): os.write(2, bytes(1 << 20))\n  return x * x",
        "output limit",
    ),
    "open files": ("def f(x):\n  v = [open('/dev/null') for _ in range(1000)]\n  return x * x", "Too many open files"),
    "signals ignored": (
        """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
        def f(x):
            while True: pass
        """,
        "time limit",
    ),
    "threads left behind": (
        "import threading, time\ndef f(x):\n  threading.Thread(target=time.sleep, args=(99,)).start()\n  return x * x",
        "left 2 threads running",
    ),
    "a thread that ends the process": (
        """
        import os, threading, time
        threading.Thread(target=lambda: (time.sleep(0.3), os._exit(0)), daemon=True).start()
        def f(x):
            time.sleep(1)
            return x * x
        """,
        "ended",
    ),
}

# Kept off by the kernel: with what "strict" asks for.
BREAKOUTS = {
    "fork bomb": ("import os\ndef f(x):\n  while True: os.fork()", "PermissionError|BlockingIOError"),
    "fork bomb of processes that leave": (
        "import os\ndef f(x):\n  while True:\n    if not os.fork(): os.setsid()",
        "PermissionError|BlockingIOError",
    ),
    "reading the home directory": (
        f"import os\ndef f(x): return [open(p) for p in os.listdir({HOME!r})] and x * x",
        ".",
    ),
    "reading a secret in the home directory": ("def f(x): return open(SECRET).read() and x * x", "Permission|No such"),
    "through a link": (
        "import os\ndef f(x):\n  os.symlink(SECRET, 'link')\n  return open('link').read() and x * x",
        "Permission|No such",
    ),
    "reading /etc": ("def f(x): return open('/etc/passwd').read() and x * x", "Permission|No such"),
    "writing beside the secret": ("def f(x): return open(SECRET + '2', 'w') and x * x", "Permission|No such|Read-only"),
    "changing the library": ("import os\ndef f(x): return os.chmod(os.__file__, 0o777) or x * x", "Error"),
    "cutting the library short": ("import os\ndef f(x): return os.truncate(os.__file__, 0) or x * x", "Error"),
    "opening a socket": (
        "import socket\ndef f(x):\n  socket.create_connection(('127.0.0.1', PORT), 1)\n  return x * x",
        "PermissionError|unreachable|ConnectionRefused",
    ),
    "opening an abstract socket": (
        "import socket\ndef f(x):\n  socket.socket(socket.AF_UNIX).connect('\\0sva-test-PORT')\n  return x * x",
        "PermissionError|Refused",
    ),
    "running a program": ("import subprocess\ndef f(x): return subprocess.run(['/bin/true']) and x * x", "Error"),
    "killing the pool": ("import os\ndef f(x): return os.kill(HOST, 9) or x * x", "PermissionError|ProcessLookupError"),
    "killing the parent": (
        "import os\ndef f(x):\n  os.kill(os.getppid(), 9)\n  return -1",
        "PermissionError|wrong",
    ),
    "killing everything": ("import os\ndef f(x):\n  os.kill(-1, 9)\n  return -1", "."),
    "slowing the parent": ("import os\ndef f(x): return os.setpriority(os.PRIO_PROCESS, HOST, 19) or x * x", "Error"),
    "memory of the parent": (
        "import os\ndef f(x): return open(f'/proc/{os.getppid()}/mem', 'rb') and x * x",
        "Permission|No such",
    ),
    "tracing the parent": (
        """
        import ctypes, os
        def f(x):
            libc = ctypes.CDLL(None, use_errno=True)
            seized = libc.ptrace(0x4206, os.getppid(), None, None)  # PTRACE_SEIZE
            return x * x if seized == 0 else os.strerror(ctypes.get_errno())
        """,
        "wrong",
    ),
    "other namespaces": (
        """
        import ctypes
        def f(x):
            libc = ctypes.CDLL(None, use_errno=True)
            return x * x if libc.unshare(0x10000000) == 0 or libc.mount(b"none", b"/", None, 0x44000, None) == 0 else 0
        """,
        "wrong",
    ),
    "becoming root": ("import os\ndef f(x): return os.setuid(0) or os.chown('.', 0, 0) or x * x", "Error"),
    "shared memory left": (
        """
        import ctypes
        def f(x):
            libc = ctypes.CDLL(None)
            return x * x if libc.shmget(0x5EED, 4096, 0o1666) != -1 and HAS_SHM else 0
        """,
        "wrong",
    ),
}
ATTACKS = {**FORGERIES, **EXCESSES, **BREAKOUTS}
WAYS = {"all": MEANS, "namespaces": ("namespaces", "user"), "landlock": ("landlock", "seccomp"), "limits": ()}


def descendants(pid: int) -> list[int]:
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def is_worker(pid: int) -> bool:
    return b"inside import worker" in Path(f"/proc/{pid}/cmdline").read_bytes()


def own_directories() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("sva-sandbox-*"))


def attacks_on(way: str) -> dict[str, tuple[str, str]]:
    """All at the full level; elsewhere those that its means, or none, must stand, and that end at once."""
    fast = {name: attack for name, attack in EXCESSES.items() if not attack[1].startswith("time limit")}
    return {"all": ATTACKS, "limits": FORGERIES | fast}.get(way, fast | BREAKOUTS)


class Aftermath(NamedTuple):
    """The verdicts on all attacks of one level, and what was found after them."""

    verdicts: dict[str, Verdict]
    next_verdicts: list[bool]
    num_processes_left: int
    num_files_opened: int  # by this process
    files_left: list[str]


@functools.cache
def attacked(way: str) -> Aftermath | None:
    """None where the level cannot be had."""
    means, attacks = WAYS[way], attacks_on(way)
    try:
        pool = Sandbox("strict" if means else "best-effort", num_workers=2, means=means)
    except UserError:
        return None
    with (
        tempfile.TemporaryDirectory() as directory,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
        pool,
    ):
        secret = Path(directory) / "secret"
        secret.write_text("s")
        port = server.getsockname()[1]
        abstract.bind(f"\0sva-test-{port}")
        abstract.listen()
        names = f"SECRET, HOST, PORT, HAS_SHM = {str(secret)!r}, {os.getpid()}, {port}, {'namespaces' not in means}\n"
        programs = [textwrap.dedent(code).replace("sva-test-PORT", f"sva-test-{port}") for code, _ in attacks.values()]
        num_open = len(os.listdir("/proc/self/fd"))
        verdicts = pool.run([Job(names + program, TESTS) for program in programs], LIMITS)
        after = pool.run([Job(RIGHT, TESTS), Job("def f(x): return x", TESTS)], LIMITS)
        workers = {pid for pid in descendants(os.getpid()) if is_worker(pid)}
        left = {pid for worker in workers for pid in descendants(worker)} - workers
        num_opened = len(os.listdir("/proc/self/fd")) - num_open
        files = [name for place in own_directories() for name in os.listdir(place)] + os.listdir(directory)
    return Aftermath(dict(zip(attacks, verdicts, strict=True)), [v.passed for v in after], len(left), num_opened, files)


CASES = [(way, attack) for way in WAYS for attack in attacks_on(way)]


@pytest.mark.parametrize(("way", "attack"), CASES)
def test_an_attack_fails_its_program(way, attack):
    if (aftermath := attacked(way)) is None:
        pytest.skip("the kernel here offers too little for this level")
    verdict = aftermath.verdicts[attack]
    assert not verdict.passed
    assert re.search(ATTACKS[attack][1], verdict.reason), verdict.reason


@pytest.mark.parametrize("way", WAYS)
def test_after_the_attacks_the_pool_serves_on_and_nothing_is_left(way):
    if (aftermath := attacked(way)) is None:
        pytest.skip("the kernel here offers too little for this level")
    assert aftermath.next_verdicts == [True, False]
    assert aftermath.num_processes_left == 0
    assert aftermath.num_files_opened <= 1  # the second worker's socket, if only the attacks had it started
    assert aftermath.files_left == ["secret"]


def test_closing_ends_every_process_and_removes_every_file():
    processes, directories = set(descendants(os.getpid())), own_directories()
    pool = Sandbox("best-effort", num_workers=2, means=("landlock", "seccomp"))
    pool.run([Job(RIGHT, TESTS)] * 4)
    assert set(descendants(os.getpid())) > processes
    assert own_directories() > directories
    pool.close()
    assert set(descendants(os.getpid())) <= processes
    assert own_directories() <= directories


def test_when_the_process_is_killed_its_workers_and_programs_end():
    code = (
        "import sys; from sva.sandbox import *\n"
        "pool = Sandbox('best-effort', num_workers=1); print('ready', flush=True)\n"
        "pool.run([Job('import time\\ndef f(x): time.sleep(600)', 'call(\"f\", 1)')], Limits(wall_secs=600))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 20
        while len(inside := descendants(process.pid)) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(inside) >= 3  # worker, program, tests
        process.kill()
    while any(Path(f"/proc/{pid}").exists() for pid in inside) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in inside if Path(f"/proc/{pid}").exists()]


def test_a_worker_that_is_killed_is_replaced():
    with Sandbox("best-effort", num_workers=1) as pool:
        before = set(descendants(os.getpid()))
        for pid in before:
            if is_worker(pid):
                os.kill(pid, 9)
        assert [v.passed for v in pool.run([Job(RIGHT, TESTS)] * 3)] == [True] * 3


def test_strict_refuses_and_names_what_is_missing():
    with pytest.raises(UserError, match=r"sandbox=strict cannot be had here .*not ensured: no network.*best-effort"):
        Sandbox("strict", means=())


def test_what_is_in_force_is_said_at_start(capsys):
    with Sandbox("best-effort", means=()) as pool:
        assert pool.in_force == ()
        assert "memory" in pool.facts
    said = capsys.readouterr().err
    assert said.startswith("sandbox: best-effort, in force: limits; not ensured: no network")
    assert said.count("\n") == 1


def test_each_of_the_kernels_means_that_is_here_keeps_what_it_promises():
    promised = {
        ("namespaces", "user"): FACTS,
        ("landlock", "seccomp"): FACTS,
        ("seccomp",): ("network", "forks", "memory"),
    }
    for means, facts in promised.items():
        with Sandbox("best-effort", num_workers=1, means=means) as pool:
            if set(pool.in_force) >= set(means):
                assert set(facts) <= set(pool.facts), means


def test_misspelt_levels_and_senseless_limits_are_refused():
    with pytest.raises(UserError, match="sandbox='Strict': there are strict and best-effort"):
        Sandbox("Strict")
    with pytest.raises(UserError, match="sandbox.cpu_secs=0 must be at least 1"):
        Limits(cpu_secs=0)
    with pytest.raises(UserError, match="sandbox.wall_secs=0 must be above 0"):
        Limits(wall_secs=0)
    with pytest.raises(UserError, match="sandbox.load_secs=0 must be above 0"):
        Limits(load_secs=0)


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox("best-effort", num_workers=2) as pool:
        yield pool


def test_verdicts_come_in_the_order_of_the_jobs(sandbox):
    jobs = [
        Job(f"import time\ndef f(): time.sleep({0.01 * (9 - i)}); return {i}", f"assert call('f') == {i}, {i}")
        for i in range(10)
    ]
    wrong = [Job(job.program, f"assert call('f') == -1, 'job {i}'") for i, job in enumerate(jobs)]
    assert all(v.passed for v in sandbox.run(jobs))
    assert [v.reason for v in sandbox.run(wrong)] == [f"job {i}" for i in range(10)]


def test_time_limits_are_told_from_wrong_answers(sandbox):
    slow, wrong = sandbox.run([Job("def f(x):\n  while 1: 0", TESTS), Job("def f(x): 0", TESTS)], LIMITS)
    assert (slow.is_time_limit, wrong.is_time_limit) == (True, False)


def test_what_top_level_code_may_cost_is_bounded(sandbox):
    limits = dataclasses.replace(LIMITS, cpu_secs=30, wall_secs=60, load_secs=0.5)
    right = "import time\ntime.sleep(0.01)\nTABLE = []\nfor n in range(9): TABLE.append(n * n)\n"
    programs = {
        "loop": "while True: pass\n" + RIGHT,
        "sleep": f"{RIGHT}\nimport time\ntime.sleep(50)",
        "table": right + "def f(x): return TABLE[abs(x)]",
        "slow call": right + "def f(x):\n  time.sleep(0.8)\n  return x * x",
        "memory": "TABLE = bytearray(1 << 40)\n" + RIGHT,
        "output": "for _ in range(1 << 20): print('x' * 99)\n" + RIGHT,
        "exit": f"{RIGHT}\nraise SystemExit",
    }
    started = time.monotonic()
    verdicts = dict(zip(programs, sandbox.run([Job(p, TESTS) for p in programs.values()], limits), strict=True))
    assert time.monotonic() - started < 30
    assert {name for name, v in verdicts.items() if v.passed} == {"table", "slow call"}
    assert {name for name, v in verdicts.items() if v.is_time_limit} == {"loop", "sleep"}
    assert verdicts["loop"].reason == "time limit: 0.5 s for top-level code"
    assert verdicts["memory"].reason.startswith("MemoryError")


def test_tests_have_limits_too(sandbox):
    (verdict,) = sandbox.run([Job(RIGHT, "while True: call('f', 1)")], LIMITS)
    assert not verdict.passed
    assert "time limit" in verdict.reason


def test_programs_start_from_nothing(sandbox):
    program = """
import os, sys
def f(): return [dict(os.environ), sys.argv[1:], os.listdir(".")]
def leave(): open("left", "w").write("x"); return os.listdir(".")
"""
    jobs = [Job(program, "assert call('f')[0] == {} and call('f')[2] == []\nassert call('leave') == ['left']")] * 5
    assert [v.reason for v in sandbox.run(jobs)] == [""] * 5
    (verdict,) = sandbox.run([Job("def f(): return input()", "call('f')")])
    assert verdict.reason.startswith("EOFError")


def test_the_same_program_gets_the_same_answers(sandbox):
    job = Job("def f(): return ' '.join({'a', 'b', 'c', 'd', 'e'})", "assert False, call('f')")
    assert len({v.reason for v in sandbox.run([job] * 8)}) == 1


VALUES = [
    None, True, 0, -(10**40), 1.5, float("inf"), "text \ud800 \n", b"\x00\xff", [1, [2]], (1, (2,)), {1, 2},
    frozenset({1}), {"a": 1, (1, 2): [3]}, 1 + 2j, range(3), [], (), {}, set(), {"int": "ff"},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_plain_data_arrives_as_it_was(sandbox, value):
    back = plain.decode(plain.encode(value))
    assert back == value
    assert type(back) is type(value)
    (verdict,) = sandbox.run([Job("def f(x): return x", "assert call('f', data) == data", value)])
    assert verdict.passed, verdict.reason


def test_subclasses_arrive_as_builtins_and_iterators_as_iterators():
    assert type(plain.decode(plain.encode(collections.Counter("aab")))) is dict
    assert type(plain.decode(plain.encode(collections.namedtuple("P", "x y")(1, 2)))) is tuple
    assert list(plain.decode(plain.encode(x for x in (1, 2)))) == [1, 2]
    assert plain.decode(plain.encode({1: 2}.keys())) == {1}
    assert plain.decode(plain.encode(object())) != plain.decode(plain.encode(object()))
    assert repr(plain.decode(plain.encode(lambda: 0))) == "<function>"


@pytest.mark.parametrize(
    "message", ['{"tuple": [1], "set": []}', '{"nothing": 1}', '{"bytes": "xy"}', '{"range": [0, 1, 0]}']
)
def test_malformed_messages_are_refused(message):
    with pytest.raises((ValueError, KeyError, TypeError)):
        plain.decode(json.loads(message))


def test_the_filter_has_a_number_for_every_call_on_both_architectures(monkeypatch):
    lengths = {}
    for machine in ("x86_64", "aarch64"):
        monkeypatch.setattr(seccomp.platform, "machine", lambda machine=machine: machine)
        lengths[machine] = len(seccomp._program(7)) // 8
    assert 256 < lengths["aarch64"] < lengths["x86_64"] < 4096  # the kernel's bound


def test_the_library_may_be_read_and_the_home_directory_may_not():
    readable = confine.readable_paths()
    assert any(os.path.realpath(os.__file__).startswith(path + "/") for path in readable)
    assert not any(path == HOME or HOME.startswith(path + "/") for path in readable)
    assert kernel.landlock_version() >= 0
