"""`sva upcycle`: a mixture-of-experts checkpoint of a base and models that were fine-tuned from it."""

import dataclasses
from pathlib import Path
from typing import Literal

from sva.cli.command_line import Command, argument, option
from sva.cli.options import MODEL, MODEL_HELP, start_jax
from sva.utils.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycle:
    """Make one mixture-of-experts checkpoint of a base and models that were fine-tuned from it.

    Each specialist's mlps are one module of every layer. The router is random: train it next.
    """

    model: str = argument(MODEL_HELP, MODEL)
    specialist: tuple[str, ...] = option("a model fine-tuned from it, path or hub id; two or more", ())
    out: Path = option("the checkpoint's directory, new or empty", short="-o")
    top_k: int | None = option("modules that each token runs through (default: 2)", None)
    shared: Literal["base", "average"] = option(
        "whose attention, norms and embeddings: the base's, or the specialists' mean (default: %(default)s)", "base"
    )
    seed: int = option("of the router's first weights (default: %(default)s)", 0)


def run(arguments: Upcycle) -> None:
    """Runs the command."""
    from sva.utils import seeds

    seeds.check("--seed", arguments.seed)
    if len(arguments.specialist) < 2:
        raise UserError("name two models or more with --specialist")
    start_jax()
    from sva.ensembles.upcycle import check, upcycle
    from sva.generation.load import load

    check(len(arguments.specialist), arguments.top_k, arguments.out)
    base = load(arguments.model)
    specialists = [load(name) for name in arguments.specialist]
    how = {"top_k": arguments.top_k, "shared": arguments.shared, "seed": arguments.seed}
    cfg = upcycle(base, specialists, arguments.out, **how)
    assert cfg.moe is not None
    print(
        f"{arguments.out}: {cfg.architecture}, {cfg.moe.modules} modules in each of {cfg.num_layers} layers, "
        f"{cfg.moe.top_k} for each token; its router is random; train it next: "
        f"sva train configs/upcycled-router.yaml model={arguments.out} task=QUESTIONS.jsonl"
    )


COMMAND = Command("upcycle", Upcycle, run)
