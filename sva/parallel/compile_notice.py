"""A line on stderr while a program is compiled for long, so that a first step does not look as if it hung."""

import functools
import sys
import threading
from typing import Any

import jax

SECONDS = 5.0  # of compiling, before it is said
_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"  # reported when XLA is about to compile
_COMPILED = "/jax/core/compile/backend_compile_duration"  # and when it has


@functools.cache  # one listener a process
def start() -> None:
    """Says of every program from now on that it is being compiled, where that takes longer than `SECONDS`."""
    jax.monitoring.register_event_duration_secs_listener(Notice().listen)


class Notice:
    """Listens to JAX's own reports of one process; each thread compiles one program at a time."""

    def __init__(self) -> None:
        self._running: dict[int, threading.Timer] = {}

    def listen(self, event: str, duration_secs: float, **about: Any) -> None:
        """Takes a report."""
        if event not in (_LOWERED, _COMPILED):
            return
        thread = threading.get_ident()
        timer = self._running.pop(thread, None)
        if timer is not None:
            timer.cancel()
        if event == _LOWERED:
            name = str(about.get("fun_name", "a program")).removeprefix("jit(").removesuffix(")")
            self._running[thread] = timer = threading.Timer(
                SECONDS, _say, [f"compiling {name}: the first call is slow"]
            )
            timer.daemon = True
            timer.start()
        elif duration_secs >= SECONDS:
            _say(f"compiled after {duration_secs:.0f} s; kept in the cache for the next run")


def _say(text: str) -> None:
    """A line of its own, also beside a bar."""
    if "tqdm" in sys.modules and sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(f"sva: {text}", file=sys.stderr)
    else:
        print(f"sva: {text}", file=sys.stderr, flush=True)
