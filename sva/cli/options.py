"""What the commands share: options that several of them take, the start of JAX, and how a result is printed."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from sva.utils.remote import path_argument

MODEL = "smollm2-135m-instruct"
_MODEL_HELP = "path, hub id or known name (default: %(default)s)"


def add_command(commands: Any, name: str, run: Any, text: str, more: str = "", **settings: Any) -> Any:
    """The parser of a command or action, whose `run` is called with the parsed arguments.

    Args:
      text: one sentence, which the overview shows as well; `more` stands behind it in the command's own help.
    """
    sub = commands.add_parser(name, help=text, description=f"{text} {more}".strip(), **settings)
    sub.set_defaults(run=run)
    return sub


def add_model(parser: Any, *, name: str = "--model", about: str = "") -> None:
    """Adds the model, as an option or, where `name` has no dashes, as an argument; `about` opens its help."""
    settings: dict[str, Any] = {"default": MODEL, "help": about + _MODEL_HELP}
    parser.add_argument(name, **settings if name.startswith("-") else settings | {"nargs": "?"})


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype and --kv-dtype, as `sva.load` takes them."""
    dtypes = ["float32", "bfloat16", "int8"]
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="of the weights (default: %(default)s)")
    parser.add_argument("--kv-dtype", choices=dtypes, help="of keys and values (default: the activations')")


def add_experts(parser: argparse.ArgumentParser) -> None:
    """Adds --expert and --skip-foreign."""
    parser.add_argument(
        "--expert", type=path_argument, action="append", default=[], help="an expert file; may be repeated"
    )
    parser.add_argument("--skip-foreign", action="store_true", help="leave out experts of another base model")


def add_first_pass(parser: argparse.ArgumentParser) -> None:
    """Adds --classifier, --alphas and --choice: who chooses between the experts."""
    parser.add_argument(
        "--classifier", type=path_argument, help="a classification expert for the first pass (task: routing)"
    )
    parser.add_argument(
        "--alphas", type=path_argument, help="one mixture of the experts for all questions, from sva adapt"
    )
    choices = "hard: the likeliest expert; soft: all by probability; a number: as hard, but the base where less sure"
    parser.add_argument("--choice", default="hard", help=f"{choices} (default: %(default)s)")


def precision(arguments: argparse.Namespace) -> dict[str, Any]:
    """--dtype and --kv-dtype where they are not the defaults, for the settings that a file of answers is known by."""
    chosen = {"dtype": arguments.dtype} if arguments.dtype != "float32" else {}
    return chosen | ({"kv_dtype": arguments.kv_dtype} if arguments.kv_dtype else {})


def check_experts(arguments: argparse.Namespace) -> None:
    """Raises UserError for a file of --expert, --classifier or --alphas that cannot be read: before a model is."""
    classifier, alphas = getattr(arguments, "classifier", None), getattr(arguments, "alphas", None)
    if arguments.expert:
        from sva.spectral.expert import Expert

        for path in [*arguments.expert, *([classifier] if classifier else [])]:
            Expert.load(path)
    if alphas:
        from sva.adaptation.mixture_file import Alphas

        Alphas.load(alphas)


def start_jax() -> None:
    """Imports JAX, which keeps compiled programs on disk, says when compiling is long, and joins a run's processes.

    Each command calls it when nothing is left to check without JAX, and before JAX's first device.
    """
    from sva.parallel import compile_cache, compile_notice, processes

    compile_cache.start()
    compile_notice.start()
    processes.start()


def print_result(result: Mapping[str, Any], as_json: bool, text: str) -> None:
    """Prints the result as JSON, or the text."""
    print(json.dumps(result, indent=2) if as_json else text)
