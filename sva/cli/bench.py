"""`sva bench`: how fast a model reads prompts and decodes on this machine (`sva.cli.throughput`)."""

import dataclasses

from sva.cli.command_line import Command, option
from sva.cli.options import ModelOption, PrecisionOptions, print_result, start_jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench(PrecisionOptions, ModelOption):
    """Prefill and decode rates of a model on this machine, beside the machine's limits."""

    random: bool = option("random weights: of --model the config.json is enough", False)
    batch: tuple[int, ...] = option("rows decoded together (default: 1 32)", (1, 32), nargs="+")
    prompt: int = option("tokens of each prompt (default: %(default)s)", 32)
    max_new_tokens: int = option("of each row (default: %(default)s)", 64)
    json: bool = option("print the result as JSON", False)


def run(arguments: Bench) -> None:
    """Runs the command."""
    start_jax()
    from sva.cli.throughput import bench, check, random_lm, table
    from sva.generation.load import load
    from sva.models.shape import model_config
    from sva.utils.provenance import command, versions

    numbers = {"prompt": arguments.prompt, "new_tokens": arguments.max_new_tokens}
    check(arguments.batch, **numbers)
    if arguments.random:
        lm = random_lm(model_config(arguments.model), arguments.dtype, kv_dtype=arguments.kv_dtype)
    else:
        lm = load(arguments.model, arguments.dtype, kv_dtype=arguments.kv_dtype)
    result = bench(lm, arguments.batch, **numbers)
    print_result(result | {"versions": versions(), "command": command()}, arguments.json, table(result))


COMMAND = Command("bench", Bench, run)
