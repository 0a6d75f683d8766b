"""The `sva` command. Exit codes: 0 done, 2 the user's mistake (one line says which), 1 anything else."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sva.cli import adapt as adapt_command
from sva.cli import evaluate as evaluate_command
from sva.cli import expert as expert_commands
from sva.cli import generate as generate_command
from sva.cli import sweep as sweep_command
from sva.cli.options import add_precision
from sva.utils.errors import UserError
from sva.utils.remote import local_argument, path_argument, reading_directory, to_path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        arguments = _parser().parse_args(argv)
        from sva.parallel import compile_cache as runtime
        from sva.parallel import processes as distributed
        from sva.parallel.supervise import INSIDE, supervise

        if distributed.is_one_of_several() and INSIDE not in os.environ:
            return supervise([sys.executable, *sys.orig_argv[1:]])
        runtime.start()
        distributed.start()
        arguments.run(arguments)
    except UserError as error:
        print(f"sva: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # training met a number that is none, or an alarm
        print(f"sva: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        from sva.parallel import processes as distributed

        if not distributed.is_loss(error):
            raise
        distributed.lost(error)
    except KeyboardInterrupt:
        print("\nsva: interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sva", description="Train, mix and serve singular-value experts for language models."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    model: dict[str, Any] = {
        "default": "smollm2-135m-instruct",
        "help": "path, hub id or known name (default: %(default)s)",
    }
    sub = command("demo", _demo, "Train one expert live, load others, answer a mixed set in two passes.")
    sub.add_argument(
        "--dir", type=local_argument, default=Path("runs/demo"), help="where results go (default: %(default)s)"
    )
    sub = command("fetch", _fetch, "Find or download a model and print where it is.")
    sub.add_argument("model", nargs="?", **model)
    sub = command("decompose", _decompose, "Decompose the target weights of a model, and keep them in the cache.")
    sub.add_argument("model", nargs="?", **model)
    sub.add_argument("--targets", default="mlp", help="mlp, attention, attention_full, all or a regular expression")
    sub.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the model they are for")
    sub.add_argument("--rank", type=int, help="components to keep, for the delta form alone (default: all)")
    sub.add_argument("--share", default="0/1", metavar="I/N", help="of N processes with one cache, this is number I")
    sub = command("train", _train, "Train one expert, or go on where its run directory stopped.")
    sub.add_argument("config", help="a YAML file, see configs/")
    sub.add_argument("overrides", nargs="*", metavar="name=value", help="settings on top of it, e.g. train.lr=2e-3")
    sub.add_argument("--profile", action="store_true", help="trace one step for TensorBoard, under RUN_DIR/profile")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    sub = command("compile", _compile, "What a training run would hold and do on a TPU pod, without one.")
    sub.add_argument("config", help="a YAML file, see configs/; its model may be a directory that holds a config.json")
    sub.add_argument("overrides", nargs="*", metavar="name=value", help="settings on top of it")
    sub.add_argument("--topology", required=True, help="of the pod, e.g. v5e:4x4 or v5p:2x2x4")
    sub.add_argument("--program", action="append", help="update, rollout or two_pass; may be repeated (default: all)")
    sub.add_argument("--prompt-tokens", type=int, default=255, help="of every prompt (default: %(default)s)")
    sub.add_argument("--hbm", type=float, help="GiB of one device (default: the kind's own)")
    sub.add_argument("--unroll", action="store_true", help="unroll the layers; compiling takes many times as long")
    sub.add_argument("--output", type=local_argument, help="also write the report to this JSON file")
    sub.add_argument("--json", action="store_true", help="print the report as JSON")
    adapt_command.add(commands, model)
    evaluate_command.add(commands, model)
    generate_command.add(commands, model)
    sub = command("report", _report, "Write one HTML page about a run of `sva train`, finished or not.")
    sub.add_argument("run_dir", metavar="RUN", type=path_argument, help="its run_dir")
    sub.add_argument("--out", type=local_argument, help="the page (default: RUN/report.html)")
    sub = command("bench", _bench, "Prefill and decode rates of a model on this machine, beside the machine's limits.")
    sub.add_argument("--model", **model)
    sub.add_argument("--random", action="store_true", help="random weights: of --model the config.json is enough")
    add_precision(sub)
    sub.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="rows decoded together (default: 1 32)")
    sub.add_argument("--prompt", type=int, default=32, help="tokens of each prompt (default: %(default)s)")
    sub.add_argument("--max-new-tokens", type=int, default=64, help="of each row (default: %(default)s)")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    sweep_command.add(commands)
    expert_commands.add(commands, model)
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from sva.cli.demo import demo

    demo(arguments.dir)


def _fetch(arguments: argparse.Namespace) -> None:
    from sva.models.hub import resolve

    print(resolve(arguments.model))


def _decompose(arguments: argparse.Namespace) -> None:
    from sva.generation.decompose import decompose_checkpoint

    index, _, count = arguments.share.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise UserError(f"--share {arguments.share} must be I/N, as 0/4 for the first of four processes")
    directory, records = decompose_checkpoint(
        arguments.model,
        arguments.targets,
        arguments.dtype,
        rank=arguments.rank,
        share=(int(index), int(count)),
    )
    worst = max((record.relative_error for record in records), default=0.0)
    total = sum(record.rank for record in records)
    print(f"{len(records)} weights, {total} singular values, relative error at most {worst:.1e}, in {directory}")


def _train(arguments: argparse.Namespace) -> None:
    from sva.training import config
    from sva.training import run as runs

    settings = config.load(arguments.config, arguments.overrides)
    _, result = runs.train(settings, profile=arguments.profile)
    _print(result, arguments.json, f"expert: {to_path(settings.run_dir) / 'expert.safetensors'}\n{summary(result)}")


def _compile(arguments: argparse.Namespace) -> None:
    from sva.cli.aot import report as ahead
    from sva.training import config
    from sva.utils import provenance
    from sva.utils.files import write_json

    programs = tuple(arguments.program or ahead.PROGRAMS)
    for name in programs:
        if name not in ahead.PROGRAMS:
            raise UserError(f"--program {name} is not known; use {', '.join(ahead.PROGRAMS)}")
    kind = arguments.topology.partition(":")[0]
    if arguments.hbm is None and kind not in ahead.HBM:
        raise UserError(f"--topology {arguments.topology}: give --hbm, the memory of one device in GiB")
    settings = config.load(arguments.config, arguments.overrides)
    result = ahead.report(
        settings,
        ahead.topology(arguments.topology),
        hbm_gib=arguments.hbm or ahead.HBM[kind],
        prompt_tokens=arguments.prompt_tokens,
        programs=programs,
        scan_layers=not arguments.unroll,
        on_program=lambda name: print(f"sva: compiling the {name} program", file=sys.stderr, flush=True),
    )
    result |= {"topology": arguments.topology, "command": provenance.command(), "versions": provenance.versions()}
    if arguments.output:
        write_json(arguments.output, result)
    _print(result, arguments.json, ahead.summary(result))


def _report(arguments: argparse.Namespace) -> None:
    from sva.training import report

    out = arguments.out or arguments.run_dir / "report.html"
    with reading_directory(arguments.run_dir) as run_dir:
        report.write(run_dir, out)
    print(out)


def _bench(arguments: argparse.Namespace) -> None:
    from sva.cli.aot.report import model_config
    from sva.cli.bench import bench, check, random_lm, table
    from sva.generation.load import load
    from sva.utils.provenance import command, versions

    numbers = {"prompt": arguments.prompt, "new_tokens": arguments.max_new_tokens}
    check(arguments.batch, **numbers)
    if arguments.random:
        lm = random_lm(model_config(arguments.model), arguments.dtype, kv_dtype=arguments.kv_dtype)
    else:
        lm = load(arguments.model, arguments.dtype, kv_dtype=arguments.kv_dtype)
    result = bench(lm, arguments.batch, **numbers)
    _print(result | {"versions": versions(), "command": command()}, arguments.json, table(result))


def summary(result: dict[str, Any]) -> str:
    """A training result in one line."""
    from sva.evaluation.stats import percent

    return (
        f"{result['task']}: {percent(result['before'])} before, {percent(result['after'])} after, "
        f"gain {percent(result['gain'])} (greedy, {result['split']}, n = {result['n']})"
    )


def _print(result: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(result, indent=2) if as_json else text)


if __name__ == "__main__":
    sys.exit(main())
