"""Seconds of the steps of a process, and its peak of memory. Plain Python: both sides' interpreters import it."""

import resource
import time
from typing import Any


class Meter:
    """Counts from when it is made; `step` ends a step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.rewards: list[float] = []
        self._last = time.perf_counter(), time.process_time()

    def step(self, reward: float) -> None:
        """Ends a step whose completions had this mean reward, from -1 to 1."""
        now = time.perf_counter(), time.process_time()
        self.seconds.append(round(now[0] - self._last[0], 3))
        self.cpu_seconds.append(round(now[1] - self._last[1], 3))
        self.rewards.append(reward)
        self._last = now

    def result(self) -> dict[str, Any]:
        """`seconds`, `cpu_seconds` and `rewards` of each step, the largest resident set of the process in GB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # KiB on Linux
        found = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "rewards": self.rewards}
        return found | {"peak_gb": round(peak, 3)}
