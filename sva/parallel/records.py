"""Files of results of a run of several processes: process 0 reads and writes them, the others know what they held."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sva.parallel import exchange
from sva.parallel.processes import is_writer
from sva.utils import jsonl
from sva.utils.jsonl import Records


@contextlib.contextmanager
def resumed(path: Path, settings: Mapping[str, Any], made_with: Mapping[str, Any] | None = None) -> Iterator[Records]:
    """`sva.utils.jsonl.resumed` on process 0; on the others the same records, and nothing is written.

    Raises:
      UserError: as there, on every process; or one of them has other settings than process 0.
    """
    exchange.require_same(settings)
    with contextlib.ExitStack() as stack:
        opened: list[Records] = []

        def records() -> list[dict[str, Any]]:
            opened.append(stack.enter_context(jsonl.resumed(path, settings, made_with)))
            return opened[0].records

        found = exchange.from_process_0(records)
        yield opened[0] if is_writer() else Records(found)
