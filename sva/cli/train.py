"""`sva train`: one expert, from its configuration."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from sva.cli.command_line import SETTING, Command, argument, option
from sva.cli.options import print_result, start_jax
from sva.utils.errors import UserError
from sva.utils.remote import to_path

PROMPT_TOKENS = 255  # of a dry run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train one expert, or resume where its run directory stopped."""

    config: str = argument("a YAML file, see configs/")
    overrides: tuple[str, ...] = argument("settings on top of it, e.g. train.lr=2e-3", (), metavar=SETTING)
    dry_run: bool = option("say what the run would take, fetch and hold; train nothing", False)
    topology: str | None = option("with --dry-run: on a pod, e.g. v5e:4x4 (default: on this machine)", None)
    prompt_tokens: int | None = option(f"with --dry-run: of every prompt (default: {PROMPT_TOKENS})", None)
    profile: bool = option("trace one step for TensorBoard, under RUN_DIR/profile", False)
    json: bool = option("print the result as JSON", False)


def run(arguments: Train) -> None:
    """Runs the command."""
    from sva.training import config

    for name, value in (("--topology", arguments.topology), ("--prompt-tokens", arguments.prompt_tokens)):
        if value is not None and not arguments.dry_run:
            raise UserError(f"{name} is for --dry-run, which trains nothing; add it, or leave {name} out")
    settings = config.load(arguments.config, arguments.overrides)
    start_jax()
    from sva.cli import dry_run

    if arguments.dry_run:
        result = dry_run.estimate(
            settings,
            topology=arguments.topology,
            prompt_tokens=PROMPT_TOKENS if arguments.prompt_tokens is None else arguments.prompt_tokens,
            on_program=lambda name: print(f"sva: compiling the {name} program", file=sys.stderr, flush=True),
        )
        print_result(result, arguments.json, dry_run.text(result))
        dry_run.require_fit(result["memory"], result["where"])
        return
    dry_run.check(settings)
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


COMMAND = Command("train", Train, run)
