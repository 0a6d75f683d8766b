"""`sva compile`: what a training run would hold and do on a TPU pod, without one (`sva.cli.aot`)."""

import argparse
import sys
from typing import Any

from sva.adapters import spelling
from sva.cli.options import add_command, print_result, start_jax
from sva.utils.errors import UserError
from sva.utils.remote import local_argument


def add(commands: Any) -> None:
    """Adds the command."""
    text = "Report what a training run would hold and do on a TPU pod, without one."
    parser = add_command(commands, "compile", run, text)
    parser.add_argument(
        "config", help="a YAML file, see configs/; its model may be a directory that holds a config.json"
    )
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="settings on top of it")
    parser.add_argument("--topology", required=True, help="of the pod, e.g. v5e:4x4 or v5p:2x2x4")
    parser.add_argument(
        "--program", action="append", help="update, read, rollout or two_pass; may be repeated (default: all)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=255, help="of every prompt (default: %(default)s)")
    parser.add_argument("--hbm", type=float, help="GiB of one device (default: the kind's own)")
    parser.add_argument("--unroll", action="store_true", help="unroll the layers; compiling takes many times as long")
    parser.add_argument("--output", type=local_argument, help="also write the report to this JSON file")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from sva.training import config

    settings = config.load(arguments.config, arguments.overrides)
    if spelling.parse(settings.parametrisation).name in spelling.UNDECOMPOSED:
        raise UserError(
            f"parametrisation={settings.parametrisation} has no spectra, whose size and work sva compile counts; "
            "leave it out for the figures of a z"
        )
    start_jax()
    from sva.cli.aot import report as ahead
    from sva.training import run as runs
    from sva.utils.files import write_json

    programs = tuple(arguments.program or ahead.PROGRAMS)
    for name in programs:
        if name not in ahead.PROGRAMS:
            raise UserError(f"--program {name} is not known; use {', '.join(ahead.PROGRAMS)}")
    kind = arguments.topology.partition(":")[0]
    if arguments.hbm is None and kind not in ahead.HBM:
        raise UserError(f"--topology {arguments.topology}: give --hbm, the memory of one device in GiB")
    result = ahead.report(
        settings,
        ahead.topology(arguments.topology),
        hbm_gib=arguments.hbm or ahead.HBM[kind],
        prompt_tokens=arguments.prompt_tokens,
        programs=programs,
        scan_layers=not arguments.unroll,
        on_program=lambda name: print(f"sva: compiling the {name} program", file=sys.stderr, flush=True),
    )
    result |= {"topology": arguments.topology, "command": runs.command(), "versions": runs.versions()}
    if arguments.output:
        write_json(arguments.output, result)
    print_result(result, arguments.json, ahead.summary(result))
