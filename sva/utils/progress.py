"""How far a long job is, on stderr: a bar on a terminal, elsewhere (SLURM, pod logs, CI) a line every half minute."""

import sys
import time
from typing import Any

LINE_SECONDS = 30.0
_PLURALS = {"matrix": "matrices", "B": "B"}


def progress_bar(
    title: str | None,
    total: int,
    unit: str,
    *,
    initial: int = 0,
    scale: bool = False,
    leave: bool = True,
    hidden: bool = False,
) -> Any:
    """A tqdm bar, or where stderr is not a terminal a `Lines`, which has those of a bar's methods that sva uses.

    Args:
      unit: what is counted; `scale` writes thousands as k, M, G.
      initial: of `total`, what was done before.
      leave: keep the bar, and say with a line that it is done.
      hidden: show nothing.
    """
    if hidden or not sys.stderr.isatty():
        return Lines(title or "", total, unit, initial=initial, scale=scale, leave=leave, hidden=hidden)
    from tqdm import tqdm

    return tqdm(total=total, desc=title, unit=unit, initial=initial, unit_scale=scale, leave=leave, file=sys.stderr)


class Lines:
    """A bar's methods, for a log: a plain line at most every `LINE_SECONDS`, and one at the end."""

    def __init__(
        self, title: str, total: int, unit: str, *, initial: int, scale: bool, leave: bool, hidden: bool
    ) -> None:
        self.n = initial
        self._title, self._total, self._unit = title, total, unit
        self._initial, self._is_scaled, self._is_left, self._is_hidden = initial, scale, leave, hidden
        self._postfix, self._started = "", time.monotonic()
        self._last = self._started

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Counts n more."""
        self.n += n
        if time.monotonic() - self._last >= LINE_SECONDS:
            self._print()

    def set_postfix_str(self, text: str = "", refresh: bool = True) -> None:
        """What stands at the end of the next line."""
        del refresh
        self._postfix = text

    def write(self, text: str, **_: Any) -> None:
        """A line of its own."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends with a line, unless that would repeat the last one or nothing was done."""
        if self._is_left and self.n > self._initial:
            self._print()
            self._is_left = False

    def _print(self) -> None:
        self._last = time.monotonic()
        if self._is_hidden:
            return
        done, total = (_short(n) if self._is_scaled else str(n) for n in (self.n, self._total))
        seconds, units = time.monotonic() - self._started, _PLURALS.get(self._unit, f"{self._unit}s")
        left = (self._total - self.n) * seconds / max(self.n - self._initial, 1)
        end = f", about {_clock(left)} left" if self.n < self._total else ""
        told = f", {self._postfix}" if self._postfix else ""
        line = f"sva: {self._title}: {done} of {total} {units} after {_clock(seconds)}{end}{told}"
        print(line, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """Minutes and seconds, and hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _short(n: float) -> str:
    """A number of bytes or the like in three or four digits."""
    for letter in ("", "k", "M"):
        if n < 1000:
            return f"{n:.3g}{letter}"
        n /= 1000
    return f"{n:.3g}G"
