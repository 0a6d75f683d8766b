"""Plain values between the processes of a run, as JSON over JAX's own collectives; a process alone sends nothing."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sva.parallel.processes import is_writer
from sva.utils.errors import UserError, differing

_FEWEST = 1024  # bytes; messages come in powers of two, so that few programs send them all


def gather(make: Callable[[], Any]) -> list[Any]:
    """What `make` returns on each process, a JSON value, in their order, on every process.

    Every process must call it. What `make` raises on one, all raise: the others a UserError that names the process.
    """
    if jax.process_count() == 1:
        return [make()]
    failure, told = None, {}
    try:
        told["value"] = make()
    except Exception as error:
        failure = error
        told["error"] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    found = _exchanged(told)
    if failure is not None:
        raise failure
    for index, each in enumerate(found):
        if "error" in each:
            raise UserError(f"process {index}: {each['error']}")
    return [each["value"] for each in found]


def from_process_0(make: Callable[[], Any]) -> Any:
    """What `make` returns on process 0, a JSON value, on every process; the others do not call it.

    Raises as `gather`.
    """
    return gather(lambda: make() if is_writer() else None)[0]


def divided(count: int, work: Callable[[Sequence[int]], Sequence[Any]]) -> list[Any]:
    """What `work` makes of the places 0 to `count` - 1, one JSON value each, in order, on every process.

    Each process does its own share of the places, which may be none. Raises as `gather`.
    """
    processes = jax.process_count()
    found: list[Any] = [None] * count
    parts = gather(lambda: list(work(range(jax.process_index(), count, processes))))
    for index, part in enumerate(parts):
        found[index::processes] = part
    return found


def require_same(settings: Mapping[str, Any]) -> None:
    """Raises UserError, on every process, where one has other settings (JSON values) than process 0."""
    first, *others = gather(lambda: dict(settings))
    for index, other in enumerate(others, start=1):
        if told := differing(first, other):
            raise UserError(
                f"process {index} does other work than process 0 ({told.replace('asked for', f'on process {index}')}); "
                "start the same command on all, with the same files"
            )


def _exchanged(value: Any) -> list[Any]:
    """The JSON value of every process, in their order."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray(len(data), np.int32)))
    size = max(_FEWEST, 1 << int(sizes.max() - 1).bit_length())
    rows = np.asarray(multihost_utils.process_allgather(np.pad(data, (0, size - len(data)))))
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, sizes, strict=True)]
