"""`sva lm-eval`: lm-evaluation-harness' own command line, with sva among its models."""

import dataclasses
import sys

from sva.cli.command_line import Command, argument
from sva.cli.options import start_jax
from sva.utils.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmEval:
    """Run lm-evaluation-harness with `--model sva` among its models: base, expert, mixture or two passes.

    Everything behind the command is the harness's own, which `sva lm-eval run --help` lists.
    """

    words: tuple[str, ...] = argument("the harness's own arguments", ())


def run(arguments: LmEval) -> None:
    """Runs the command."""
    try:
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UserError("lm-evaluation-harness is not installed; install it with: pip install 'sva[bench]'") from None
    start_jax()
    from sva.serving import lm_eval  # registers the model

    del lm_eval
    sys.argv = ["lm-eval", *arguments.words]
    cli_evaluate()


COMMAND = Command(
    "lm-eval",
    LmEval,
    run,
    epilog="""\
--model sva takes, with commas between them, as --model_args:
  pretrained=MODEL           a path, hub id or known name
  expert=A.safetensors       one expert, or several with a plus sign between them
  alphas=FILE                one mixture of the experts, from sva adapt
  adaptive=true              two passes: the likeliest expert for each context; or a probability as the threshold
  dtype=bfloat16             of the weights (default: float32)

  sva lm-eval --model sva --model_args pretrained=smollm2-135m-instruct,expert=E.safetensors --tasks arc_easy""",
    rest="words",
)
