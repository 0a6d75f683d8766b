"""Seconds: of jitted functions without their compilation, and of the parts of a step."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax


class Stopwatch:
    """Calls jitted functions and says how long they ran; a program is compiled before the clock starts, once."""

    def __init__(self) -> None:
        self._programs: dict[Any, Any] = {}

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
        """(what the function returns, finished; seconds)."""
        leaves, tree = jax.tree.flatten(arguments)
        form = function, tree, tuple(jax.typeof(leaf) for leaf in leaves)
        if form not in self._programs:
            self._programs[form] = jax.jit(function).lower(*arguments).compile()
        started = time.perf_counter()
        result = jax.block_until_ready(self._programs[form](*arguments))
        return result, time.perf_counter() - started


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the block under `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def lap(self) -> dict[str, float]:
        """{name_seconds} since the last lap, `rest_seconds` that no name has, and all as `step_seconds`."""
        now = time.perf_counter()
        total, counted, self._started = now - self._started, self.seconds, now
        self.seconds = {}
        named = {f"{name}_seconds": value for name, value in counted.items()}
        return {**named, "rest_seconds": total - sum(counted.values()), "step_seconds": total}
