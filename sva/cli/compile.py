"""`sva compile`: what a training run would hold and do on a TPU pod, without one (`sva.cli.aot`)."""

import dataclasses
import sys
from pathlib import Path

from sva.cli.command_line import SETTING, Command, argument, option
from sva.cli.options import print_result, start_jax
from sva.utils.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compile:
    """Report what a training run would hold and do on a TPU pod, without one."""

    config: str = argument("a YAML file, see configs/; its model may be a directory that holds a config.json")
    overrides: tuple[str, ...] = argument("settings on top of it", (), metavar=SETTING)
    topology: str = option("of the pod, e.g. v5e:4x4 or v5p:2x2x4")
    program: tuple[str, ...] = option("update, read, rollout or two_pass; may be repeated (default: all)", ())
    prompt_tokens: int = option("of every prompt (default: %(default)s)", 255)
    hbm: float | None = option("GiB of one device (default: the kind's own)", None)
    output: Path | None = option("also write the report to this JSON file", None)
    json: bool = option("print the report as JSON", False)


def run(arguments: Compile) -> None:
    """Runs the command."""
    from sva.training import config

    settings = config.load(arguments.config, arguments.overrides)
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
        raise UserError(
            f"--topology {arguments.topology} is not known; write e.g. v5e:4x4 or v5p:2x2x4 ({', '.join(ahead.HBM)}), "
            "or give --hbm, the memory of one device in GiB"
        )
    result = ahead.report(
        settings,
        ahead.topology(arguments.topology),
        hbm_gib=arguments.hbm or ahead.HBM[kind],
        prompt_tokens=arguments.prompt_tokens,
        programs=programs,
        on_program=lambda name: print(f"sva: compiling the {name} program", file=sys.stderr, flush=True),
    )
    result |= {"topology": arguments.topology, "command": runs.command(), "versions": runs.versions()}
    if arguments.output:
        write_json(arguments.output, result)
    print_result(result, arguments.json, ahead.summary(result))


COMMAND = Command("compile", Compile, run)
