"""`sva serve`: a model and its experts behind OpenAI's API."""

import dataclasses
from pathlib import Path
from typing import Any

from sva.cli.command_line import Command, option
from sva.cli.options import LoadingOptions, loading, start_jax
from sva.utils.errors import UserError, at_least
from sva.utils.remote import to_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(LoadingOptions):
    """Serve a model and its experts to every client of OpenAI's API.

    Clients name the base, an expert or `adaptive` as the model, or mix experts by weight. Experts are
    loaded, mixed, adapted and dropped while the server runs. Needs the extra serve. SIGTERM finishes what runs.
    """

    expert: tuple[Path, ...] = option(
        "an expert file, served by its name, or its run's; may be repeated", (), read=to_path
    )
    host: str = option("address to listen on (default: %(default)s, this machine alone)", "127.0.0.1")
    port: int = option("port to listen on; 0: any free one (default: %(default)s)", 8000)
    allow_host: tuple[str, ...] = option("another name by which clients may call this server; may be repeated", ())
    token_file: Path | None = option("a file, of yours alone, with the token that clients must send", None)
    targets: str | None = option(
        "weights that experts may adapt, as targets in training (default: those of --expert, or mlp)", None
    )
    slots: int = option("experts at a time (default: %(default)s)", 15)
    rows: int = option("answers drawn at once (default: %(default)s)", 32)
    context: int = option("tokens of a prompt and its answer at most (default: %(default)s, or the model's)", 4096)
    max_tokens: int = option("tokens of an answer at most (default: %(default)s)", 1024)
    queue: int = option("answers that may wait for a row (default: %(default)s)", 128)
    timeout: float = option("seconds that a request may take (default: %(default)s)", 600.0)
    log_prompts: bool = option("write prompts into the log", False)


def run(arguments: Serve) -> None:
    """Runs the command."""
    from sva.serving.config import ServerConfig, read_token

    for name in ("slots", "rows", "queue"):
        at_least(f"--{name}", getattr(arguments, name), 1)
    cfg = ServerConfig(
        host=arguments.host,
        port=arguments.port,
        allowed_hosts=arguments.allow_host,
        token=read_token(arguments.token_file) if arguments.token_file else None,
        context=arguments.context,
        max_tokens=arguments.max_tokens,
        timeout=arguments.timeout,
        logs_prompts=arguments.log_prompts,
    )
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"sva serve needs the package {error.name}: pip install 'sva[serve]'") from None
    start_jax()
    from sva.serving import run as serving

    if serving.processes() > 1:
        raise UserError("sva serve runs in one process; start it on one host, with --mesh over its devices")
    with serving.bind(cfg) as sock:
        experts = serving.read_experts(arguments.expert)
        _serve(arguments, cfg, sock, experts)


def _serve(arguments: Serve, cfg: Any, sock: Any, experts: Any) -> None:
    """Loads the model and serves it on the socket."""
    from sva.serving import run as serving

    with loading(arguments, "--rows", arguments.rows) as how:
        from sva.generation.load import load
        from sva.serving.worker import WorkerConfig

        lm = load(arguments.model, **how)
        base = serving.base_name(arguments.model)
        sizes = WorkerConfig(rows=arguments.rows, queue=arguments.queue)
        worker = serving.make_worker(lm, base, experts, arguments.targets, arguments.slots, sizes)
        serving.serve(worker, cfg, base, sock)


COMMAND = Command("serve", Serve, run)
