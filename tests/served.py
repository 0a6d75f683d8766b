"""A server of the toy model and two experts, in this process, for the tests of serving."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import httpx2
import numpy as np
import uvicorn
from starlette.applications import Starlette

from sva.models.weights import expected
from sva.serving import run
from sva.serving.app import make_app
from sva.serving.asking import Reader
from sva.serving.config import ServerConfig
from sva.serving.experts_api import Experts
from sva.serving.service import Service
from sva.serving.worker import Worker, WorkerConfig
from sva.spectral.expert import Expert
from sva.utils.trees import select

LABELS = {"red": "colour", "boat": "thing"}


class Served(NamedTuple):
    """A running server."""

    url: str
    http: httpx2.Client
    worker: Worker
    experts: dict[str, Expert]
    app: Starlette  # without its guard

    def until(self, is_true, seconds: float = 5.0) -> float:
        """Seconds until `is_true()`; fails after too many."""
        started = time.monotonic()
        while not is_true():
            assert time.monotonic() - started < seconds
            time.sleep(0.01)
        return time.monotonic() - started


def toy_expert(lm, seed: int, **metadata) -> Expert:
    """An expert of the toy that moves its mlp matrices much."""
    rng = np.random.default_rng(seed)
    names = select(expected(lm.model.cfg), "mlp")
    raw = {name: rng.uniform(0.3, 1.7, 32).astype(np.float32) for name in names}
    return Expert(raw, "linear", {"fingerprint": lm.fingerprint, "base": lm.name, **metadata})


def toy_worker(lm, cfg: WorkerConfig = WorkerConfig(rows=4, queue=12), slots: int = 7) -> tuple[Worker, dict]:  # noqa: B008
    """(a worker that is not started, its experts by name)."""
    experts = {
        name: toy_expert(lm, seed, label=label, description=f"the name of a {label}")
        for seed, (name, label) in enumerate(LABELS.items())
    }
    return run.make_worker(lm, "toy", experts, None, slots, cfg), experts


@contextlib.contextmanager
def serving(lm, cfg: ServerConfig) -> Iterator[Served]:
    """The server, on a port of its own."""
    worker, experts = toy_worker(lm)
    reader = Reader(lm, "toy", worker.bank, cfg)
    app = make_app(worker, Service(worker, reader, cfg), Experts(worker, "toy", cfg, reader.context), cfg, "toy")
    sock = run.bind(cfg)
    server = run.Server(uvicorn.Config(app, log_config=None, lifespan="off"), worker, drain=5)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])))
    worker.start()
    thread.start()
    url = run.address(cfg, sock)
    headers = {} if cfg.token is None else {"Authorization": f"Bearer {cfg.token}"}
    try:
        with httpx2.Client(base_url=url.removesuffix("/v1"), timeout=60, headers=headers) as http:
            yield Served(url, http, worker, experts, app._app)
    finally:
        server.should_exit = True
        thread.join()
        worker.end()
