"""`sva decompose`: the spectra of a model's target weights, into the cache."""

import dataclasses
from typing import Literal

from sva.cli.command_line import Command, argument, option
from sva.cli.options import MODEL, MODEL_HELP, start_jax
from sva.utils.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decompose:
    """Decompose the target weights of a model, and keep them in the cache."""

    model: str = argument(MODEL_HELP, MODEL)
    targets: str = option("mlp, attention, attention_full, all, moe, router, ia3 or a regular expression", "mlp")
    layers: str | None = option("of these alone, e.g. 0-39 or 0-3,8 (default: all)", None)
    dtype: Literal["float32", "bfloat16"] = option("of the model they are for", "float32")
    rank: int | None = option("components to keep, for the delta form alone (default: all)", None)
    share: str = option("take part I, from 0, of N: for N processes with one cache", "0/1", metavar="I/N")


def run(arguments: Decompose) -> None:
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
        layers=arguments.layers,
        rank=arguments.rank,
        share=(int(index), int(count)),
    )
    worst = max((record.relative_error for record in records), default=0.0)
    total = sum(record.rank for record in records)
    print(f"{len(records)} weights, {total} singular values, relative error at most {worst:.1e}, in {directory}")


COMMAND = Command("decompose", Decompose, run)
