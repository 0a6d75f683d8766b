"""`sva train`: one expert, from its configuration."""

import argparse
from collections.abc import Mapping
from typing import Any

from sva.cli.options import add_command, print_result, start_jax
from sva.utils.remote import to_path


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(commands, "train", run, "Train one expert, or resume where its run directory stopped.")
    parser.add_argument("config", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="settings on top of it, e.g. train.lr=2e-3")
    parser.add_argument("--profile", action="store_true", help="trace one step for TensorBoard, under RUN_DIR/profile")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    from sva.training import config

    settings = config.load(arguments.config, arguments.overrides)
    start_jax()
    from sva.training import run as runs

    _, result = runs.train(settings, profile=arguments.profile)
    if result:  # of several processes the first one has it
        text = f"expert: {to_path(settings.run_dir) / 'expert.safetensors'}\n{summary(result)}"
        print_result(result, arguments.json, text)


def summary(result: Mapping[str, Any]) -> str:
    """A training result in one line."""
    from sva.evaluation.stats import percent

    return (
        f"{result['task']}: {percent(result['before'])} before, {percent(result['after'])} after, "
        f"gain {percent(result['gain'])} (greedy, {result['split']}, n = {result['n']})"
    )
