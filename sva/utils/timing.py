"""Seconds of jitted functions, without what compiling takes."""

import time
from collections.abc import Callable
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
