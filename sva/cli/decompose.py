"""`sva decompose`: the spectra of a model's target weights, into the cache."""

import argparse
from typing import Any

from sva.cli.options import add_command, add_model, start_jax
from sva.utils.errors import UserError


def add(commands: Any) -> None:
    """Adds the command."""
    text = "Decompose the target weights of a model, and keep them in the cache."
    parser = add_command(commands, "decompose", run, text)
    add_model(parser, name="model")
    parser.add_argument("--targets", default="mlp", help="mlp, attention, attention_full, all or a regular expression")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the model they are for")
    parser.add_argument("--rank", type=int, help="components to keep, for the delta form alone (default: all)")
    parser.add_argument(
        "--share", default="0/1", metavar="I/N", help="take part I, from 0, of N: for N processes with one cache"
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    index, _, count = arguments.share.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise UserError(f"--share {arguments.share} must be I/N, as 0/4 for the first of four processes")
    start_jax()
    from sva.generation.decompose import decompose_checkpoint

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
