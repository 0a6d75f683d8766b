"""10,000 mixed programs through one sandbox: right, wrong and hostile ones; memory, processes and files as they go.

    nice -n 10 python experiments/studies/sandbox/soak.py          # writes result.json beside this file

Programs are drawn with a fixed seed; each kind has one right verdict, and any other is counted as a mistake. Memory is
the resident set of this process and, apart, of its workers (whose programs end with each verdict), in MiB.
"""

import collections
import os
import random
import tempfile
import time
from pathlib import Path

from sva.sandbox import Job, Limits, Sandbox
from sva.utils.files import write_json
from sva.utils.provenance import command, versions

NUM_PROGRAMS, EVERY = 10_000, 500
LIMITS = Limits(cpu_secs=1, wall_secs=20, memory_bytes=256 << 20, file_bytes=4 << 20, disk_bytes=8 << 20)
TESTS = "assert call('f', 3) == 9\nassert call('f', -4) == 16\nassert call('f', 10**30) == 10**60"
# name: (weight, whether it passes, program)
KINDS = {
    "right": (400, True, "def f(x): return x * x"),
    "right, with a file": (60, True, "def f(x):\n  open('a', 'w').write(str(x * x))\n  return int(open('a').read())"),
    "right, with 50 MB": (20, True, "v = bytearray(50 << 20)\ndef f(x): return x * x"),
    "wrong": (200, False, "def f(x): return x + x"),
    "raises": (60, False, "def f(x): return x / 0"),
    "no Python": (60, False, "def f(x) return x"),
    "exit": (40, False, "import os\ndef f(x): os._exit(0)"),
    "always equal": (40, False, "class A(int):\n  def __eq__(self, _): return True\ndef f(x): return A()"),
    "recursion": (20, False, "def f(x): return f(x) + 1"),
    "fork": (20, False, "import os\ndef f(x):\n  while True: os.fork()"),
    "socket": (20, False, "import socket\ndef f(x): return socket.create_connection(('127.0.0.1', 80)) and x * x"),
    "kill": (20, False, "import os\ndef f(x): return os.kill(os.getppid(), 9) or x * x"),
    "threads": (20, False, "import threading as t\ndef f(x): return t.Thread(target=t.Event().wait).start() or x * x"),
    "sleeping threads": (
        10,
        False,
        "import threading, time\nthreading.Timer(99, print).start()\ndef f(x): return x * x",
    ),
    "8 GB": (20, False, "def f(x): return len(bytearray(8 << 30))"),
    "1 GB file": (10, False, "def f(x):\n  with open('a', 'wb') as a:\n    while a.write(bytes(1 << 20)): pass"),
    "full disk": (
        10,
        False,
        "def f(x):\n  for i in range(999): open(str(i), 'wb').write(bytes(1 << 20))\n  return x * x",
    ),
    "1 GB of output": (10, False, "def f(x):\n  while True: print('x' * (1 << 20))"),
    "endless loop": (4, False, "def f(x):\n  while True: pass"),
}


def resident_mib(pid: int) -> float:
    """Of one process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def descendants() -> list[int]:
    """The processes below this one."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(place.parent.name)] = int(place.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = [], [os.getpid()]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def main() -> None:
    """Runs them all and writes what was seen."""
    draws = random.Random(5)
    names = draws.choices(list(KINDS), [weight for weight, _, _ in KINDS.values()], k=NUM_PROGRAMS)
    counts: collections.Counter[str] = collections.Counter()
    mistakes, seen = [], []
    started = time.monotonic()
    with Sandbox("strict", num_workers=2) as sandbox:
        for start in range(0, NUM_PROGRAMS, EVERY):
            part = names[start : start + EVERY]
            verdicts = sandbox.run([Job(KINDS[name][2], TESTS) for name in part], LIMITS)
            for name, verdict in zip(part, verdicts, strict=True):
                counts[name] += 1
                if verdict.passed != KINDS[name][1]:
                    mistakes.append([name, verdict.reason])
            workers = descendants()
            seen.append(
                {
                    "programs": start + EVERY,
                    "own_mib": round(resident_mib(os.getpid()), 1),
                    "workers_mib": round(sum(map(resident_mib, workers)), 1),
                    "processes": len(workers),
                    "open_files": len(os.listdir("/proc/self/fd")),
                }
            )
            print(seen[-1], f"{time.monotonic() - started:.0f} s", flush=True)
        in_force, facts = sandbox.in_force, sandbox.facts
    left = [path.name for path in Path(tempfile.gettempdir()).glob("sva-sandbox-*")]
    result = {
        "command": command(),
        "versions": versions(),
        "in_force": in_force,
        "facts": facts,
        "programs": NUM_PROGRAMS,
        "of_each_kind": dict(sorted(counts.items())),
        "seconds": round(time.monotonic() - started, 1),
        "wrong_verdicts": mistakes,
        "seen": seen,
        "processes_left": len(descendants()),
        "files_left": left,
    }
    write_json(Path(__file__).parent / "result.json", result)


if __name__ == "__main__":
    main()
