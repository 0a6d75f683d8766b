"""`sva bench`: how fast a model reads prompts and decodes on this machine (`sva.cli.throughput`)."""

import argparse
from typing import Any

from sva.cli.options import add_command, add_model, add_precision, print_result, start_jax


def add(commands: Any) -> None:
    """Adds the command."""
    text = "Prefill and decode rates of a model on this machine, beside the machine's limits."
    parser = add_command(commands, "bench", run, text)
    add_model(parser)
    parser.add_argument("--random", action="store_true", help="random weights: of --model the config.json is enough")
    add_precision(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="rows decoded together (default: 1 32)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of each row (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    start_jax()
    from sva.cli.aot.report import model_config
    from sva.cli.throughput import bench, check, random_lm, table
    from sva.generation.load import load
    from sva.utils.provenance import command, versions

    numbers = {"prompt": arguments.prompt, "new_tokens": arguments.max_new_tokens}
    check(arguments.batch, **numbers)
    if arguments.random:
        lm = random_lm(model_config(arguments.model), arguments.dtype, kv_dtype=arguments.kv_dtype)
    else:
        lm = load(arguments.model, arguments.dtype, kv_dtype=arguments.kv_dtype)
    result = bench(lm, arguments.batch, **numbers)
    print_result(result | {"versions": versions(), "command": command()}, arguments.json, table(result))
