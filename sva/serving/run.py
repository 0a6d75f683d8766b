"""A server from its socket to its last answer: bound before the model is loaded, drained when it is told to end."""

import asyncio
import json
import logging
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import uvicorn

from sva.generation.lm import LM
from sva.generation.loaded_model import require_weights
from sva.models.hub import EXPERT_FILE
from sva.models.weights import expected
from sva.serving.app import make_app
from sva.serving.asking import Reader
from sva.serving.bank import Bank
from sva.serving.config import ServerConfig
from sva.serving.experts_api import Experts, load
from sva.serving.metrics import Metrics
from sva.serving.service import Service
from sva.serving.worker import Worker, WorkerConfig
from sva.spectral.expert import Expert
from sva.utils.errors import UserError
from sva.utils.trees import select


def bind(cfg: ServerConfig) -> socket.socket:
    """The socket that the server will listen on.

    Raises:
      UserError: the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((cfg.host.strip("[]"), cfg.port))
        found.listen(1)  # so that a second server finds the port in use at once
    except OSError as error:
        found.close()
        raise UserError(
            f"cannot listen on {cfg.host}:{cfg.port}: {error.strerror or error}; choose another --port or --host"
        ) from error
    return found


def make_worker(
    lm: LM, base: str, experts: Mapping[str, Expert], targets: str | None, slots: int, cfg: WorkerConfig
) -> Worker:
    """The worker of a model with these experts loaded, not started yet.

    Args:
      targets: the weights that experts may adapt; None for those that these experts do, or "mlp".
      slots: experts at a time.
    Raises:
      UserError: an expert that does not fit, more experts than slots, or a model without a tokenizer.
    """
    from sva.generation import chat

    require_weights(lm, "a server of experts")
    chat.need_tokenizer(lm)
    chosen = select(expected(lm.model.cfg), targets or "mlp") if targets or not experts else []
    names = dict.fromkeys([*chosen, *(name for expert in experts.values() for name in expert.names)])
    worker = Worker(lm, Bank(lm, base, tuple(names), slots), cfg, Metrics())
    for name, expert in experts.items():
        load(worker, name, expert)
    return worker


class Server(uvicorn.Server):
    """uvicorn's server; a first SIGTERM or SIGINT finishes what runs and refuses what comes, a second ends it."""

    def __init__(self, config: uvicorn.Config, worker: Worker, drain: float) -> None:
        super().__init__(config)
        self._worker, self._drain = worker, drain

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Takes a signal."""
        if not self._worker.is_accepting:
            super().handle_exit(sig, frame)
            return
        self._worker.is_accepting = False
        print(
            f"sva: {signal.Signals(sig).name}: finishing what runs; again to end at once", file=sys.stderr, flush=True
        )
        threading.Thread(target=self._end, args=(sig,), daemon=True).start()

    def _end(self, sig: int) -> None:
        until = time.monotonic() + self._drain
        while not self._worker.is_idle and time.monotonic() < until:
            time.sleep(0.05)
        self.should_exit = True


def serve(worker: Worker, cfg: ServerConfig, base: str, sock: socket.socket) -> None:
    """Serves until a signal ends it."""
    _log_to_stderr()
    reader = Reader(worker.lm, base, worker.bank, cfg)
    service = Service(worker, reader, cfg)
    app = make_app(worker, service, Experts(worker, base, cfg, reader.context), cfg, base)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=10,
        limit_concurrency=None,
    )
    _count_compilations(worker.metrics)
    try:
        worker.start()
        _say_ready(base, cfg, sock)
        asyncio.run(Server(config, worker, cfg.drain).serve(sockets=[sock]))
    finally:
        worker.end()


def address(cfg: ServerConfig, sock: socket.socket) -> str:
    """The URL that clients take as their base."""
    host = "localhost" if cfg.is_loopback else cfg.host
    return f"http://{host}:{sock.getsockname()[1]}/v1"


def _say_ready(base: str, cfg: ServerConfig, sock: socket.socket) -> None:
    if not cfg.is_loopback and cfg.token is None:
        print(f"sva: anyone who reaches {cfg.host} may use this server; give --token-file", file=sys.stderr)
    print(f"serving {base} at {address(cfg, sock)}", flush=True)


def _count_compilations(metrics: Metrics) -> None:
    """Counts what XLA is asked for: a server that has met every shape compiles nothing more."""

    def listen(event: str, duration_secs: float, **about: Any) -> None:
        del duration_secs, about
        if event == "/jax/core/compile/backend_compile_duration":
            metrics.compiled.inc()

    jax.monitoring.register_event_duration_secs_listener(listen)


class _Lines(logging.Formatter):
    """A JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record whose message may be JSON already."""
        text = record.getMessage()
        told = json.loads(text) if text.startswith("{") else {"event": "message", "text": text}
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return json.dumps({"time": f"{stamp}.{int(record.msecs):03d}Z", "level": record.levelname.lower(), **told})


def _log_to_stderr() -> None:
    """sva's and uvicorn's records go to stderr as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    for name, level in (("sva.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def processes() -> int:
    """How many processes work together here."""
    return jax.process_count()


def read_experts(paths: Sequence[Path]) -> dict[str, Expert]:
    """The experts of these files, by the files' names; of those that training wrote by their directories'.

    Raises:
      UserError: a file that is no expert, or two of one name.
    """
    found: dict[str, Expert] = {}
    for path in paths:
        name = path.stem
        if path.name == EXPERT_FILE:
            name = re.sub(r"[^\w.-]", "_", path.parent.resolve().name, flags=re.ASCII)[:64] or name
        if name in found:
            raise UserError(f"two experts would be called {name!r}; rename one of the files")
        found[name] = Expert.load(path)
    return found


def base_name(model: str) -> str:
    """What clients call the model: a known name or hub id as it is, of a path the last part."""
    path = Path(model)
    return path.name.removesuffix(".gguf") if path.exists() else model
