"""`sva report`: one HTML page about a run."""

import argparse
from typing import Any

from sva.cli.options import add_command
from sva.utils.remote import local_argument, path_argument, reading_directory


def add(commands: Any) -> None:
    """Adds the command."""
    text = "Write one HTML page about a run of `sva train`, finished or not."
    parser = add_command(commands, "report", run, text)
    parser.add_argument("run_dir", metavar="RUN", type=path_argument, help="its run_dir")
    parser.add_argument("--out", type=local_argument, help="the page (default: RUN/report.html)")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from sva.training import report

    out = arguments.out or arguments.run_dir / "report.html"
    with reading_directory(arguments.run_dir) as run_dir:
        report.write(run_dir, out)
    print(out)
