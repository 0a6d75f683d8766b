"""The options of commands that answer with a model: what its weights, activations, keys and values are held in."""

import argparse
from typing import Any


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype and --kv-dtype, as `sva.load` takes them."""
    dtypes = ["float32", "bfloat16", "int8"]
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="of the weights (default: %(default)s)")
    parser.add_argument("--kv-dtype", choices=dtypes, help="of keys and values (default: the activations')")


def precision(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that are not the default, for the settings that a file of answers is known by."""
    chosen = {"dtype": arguments.dtype} if arguments.dtype != "float32" else {}
    return chosen | ({"kv_dtype": arguments.kv_dtype} if arguments.kv_dtype else {})
