"""One process of several runs as a child, so that there is somebody left to say why it ended.

When a process of a run is lost, JAX's runtime aborts the others from a thread of its own, at once and with a stack
trace; no Python in them is asked. The parent, which has no part in the run, tells the user in one line.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

INSIDE = "SVA_SUPERVISED"  # set in the child


def supervise(command: Sequence[str]) -> int:
    """Runs the command and returns its exit code; 1, and one line, where the runtime aborted it.

    SIGTERM and SIGINT are for the child, which saves its state on them.
    """
    child = subprocess.Popen(command, env={**os.environ, INSIDE: "1"})
    kept = {
        number: signal.signal(number, lambda number, _: child.send_signal(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        code = child.wait()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    if code == -signal.SIGABRT:
        print(
            "sva: this process was ended by JAX's runtime (its report is above), most likely because another one of "
            "the run was lost; start the same command again, on as many hosts as there are: a training run goes on "
            "after its last saved step",
            file=sys.stderr,
            flush=True,
        )
        return 1
    return code if code >= 0 else 128 - code
