"""`sva report`: one HTML page about a run."""

import dataclasses
from pathlib import Path

from sva.cli.command_line import Command, argument, option
from sva.utils.remote import reading_directory, to_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Write one HTML page about a run of `sva train`, finished or not."""

    run_dir: Path = argument("its run_dir", metavar="RUN", read=to_path)
    out: Path | None = option("the page (default: RUN/report.html)", None)


def run(arguments: Report) -> None:
    """Runs the command."""
    from sva.training import report

    out = arguments.out or arguments.run_dir / "report.html"
    with reading_directory(arguments.run_dir) as run_dir:
        report.write(run_dir, out)
    print(out)


COMMAND = Command("report", Report, run)
