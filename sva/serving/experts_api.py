"""Experts of a running server through HTTP: listed, loaded from a posted file, mixed, adapted to examples, dropped."""

import asyncio
import hashlib
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sva.serving.adapting import Search
from sva.serving.bank import ADAPTIVE, Entry, check_name
from sva.serving.bodies import AdaptBody, MixBody, read
from sva.serving.config import ServerConfig
from sva.serving.errors import ApiError
from sva.serving.service import api_errors, or_gone
from sva.serving.worker import Worker
from sva.spectral.expert import Expert
from sva.utils.errors import UserError

CREATED = int(time.time())


class Experts:
    """The endpoints of /v1/models, /v1/experts and /v1/adapt."""

    def __init__(self, worker: Worker, base: str, cfg: ServerConfig, context: int) -> None:
        self._worker, self._bank, self._base, self._cfg = worker, worker.bank, base, cfg
        self._context = context

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the base, each expert, and `adaptive` where an expert carries a label."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._names()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{model}."""
        name = request.path_params["model"]
        if name not in self._names():
            raise ApiError(404, f"no model {name[:100]!r}; there is {', '.join(self._names())}", code="model_not_found")
        return JSONResponse(self._model(name))

    async def experts(self, request: Request) -> Response:
        """GET /v1/experts."""
        return JSONResponse({"object": "list", "data": [self._told(entry) for entry in self._bank.entries]})

    async def load(self, request: Request) -> Response:
        """PUT /v1/experts/{name}: the expert file that is the body; one of that name is replaced."""
        name, content = request.path_params["name"], await request.body()
        with api_errors():
            check_name(name, self._base)
            expert = await asyncio.to_thread(from_bytes, content)
            entry = await self._on_worker(lambda: load(self._worker, name, expert))
        return JSONResponse(self._told(entry))

    async def mix(self, request: Request) -> Response:
        """POST /v1/experts: a mixture of loaded experts as a new one."""
        body = read(MixBody, await request.body())
        about = {"label": body.label, "description": body.description, "mixture": body.mixture}
        with api_errors():
            entry = await self._on_worker(lambda: mix(self._worker, body.name, body.mixture, about))
        return JSONResponse(self._told(entry))

    async def drop(self, request: Request) -> Response:
        """DELETE /v1/experts/{name}; answers at work finish with it."""
        with api_errors():
            entry = await self._on_worker(lambda: drop(self._worker, request.path_params["name"]))
        return JSONResponse({"name": entry.name, "object": "expert", "deleted": True})

    async def adapt(self, request: Request) -> Response:
        """POST /v1/adapt: the mixture that suits the examples, as a new expert."""
        body = read(AdaptBody, await request.body())
        with api_errors():
            check_name(body.name, self._base)
            names = body.experts or [entry.name for entry in self._bank.entries]
            if not names:
                raise ApiError(409, "no expert is loaded, so there is nothing to mix")
            self._check_fits(body)
            deadline = time.monotonic() + self._cfg.timeout
            search = Search(self._worker, body, names, context=self._context, deadline=deadline)
            found = await or_gone(search.run(), request.receive)
            mixture = {name: weight for name, weight in found.weights.items() if weight}
            about = {"label": body.label, "description": body.description, "mixture": mixture}
            about |= {"adapted": {"shots": len(body.examples), "seed": body.seed, "history": found.history}}
            entry = await self._on_worker(lambda: mix(self._worker, body.name, found.weights, about))
        return JSONResponse(self._told(entry))

    def _check_fits(self, body: AdaptBody) -> None:
        if body.max_tokens > min(self._cfg.max_tokens, self._context):
            raise ApiError(400, f"max_tokens is {body.max_tokens}, this server draws {self._cfg.max_tokens} at most")

    async def _on_worker(self, function: Any) -> Any:
        return await asyncio.wrap_future(self._worker.call(function))

    def _names(self) -> list[str]:
        entries = self._bank.entries
        labelled = [ADAPTIVE] if any(entry.label for entry in entries) else []
        return [self._base, *(entry.name for entry in entries), *labelled]

    def _model(self, name: str) -> dict[str, Any]:
        owner = {self._base: "base", ADAPTIVE: "two passes"}.get(name, "expert")
        return {"id": name, "object": "model", "created": CREATED, "owned_by": owner, "max_model_len": self._context}

    def _told(self, entry: Entry) -> dict[str, Any]:
        told = {"name": entry.name, "object": "expert", "label": entry.label, "description": entry.description}
        return told | {"digest": entry.digest, "in_use": self._bank.uses(entry), "about": dict(entry.about)}


def from_bytes(content: bytes) -> Expert:
    """The expert in the bytes of its file.

    Raises:
      UserError: they are none.
    """
    if not content:
        raise UserError("the body is empty; send the bytes of an expert file")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "expert.safetensors"
        path.write_bytes(content)
        try:
            return Expert.load(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), "the posted file")) from None


def load(worker: Worker, name: str, expert: Expert) -> Entry:
    """Puts an expert into the bank under a name; for the thread that owns JAX.

    Raises:
      UserError: it does not fit this server.
      BankFull: there is no slot.
    """
    label, description = (expert.metadata.get(key, "") for key in ("label", "description"))
    if not isinstance(label, str) or not isinstance(description, str) or len(label) > 64 or len(description) > 500:
        raise UserError("the expert's label or description is no short text; train or import it again with one")
    about = {"label": label, "description": description}
    if isinstance(task := expert.metadata.get("task"), str):
        about["task"] = task[:200]
    entry = worker.bank.put(name, worker.bank.effective(expert), expert.digest, about)
    worker.refresh()
    return entry


def mix(worker: Worker, name: str, weights: Mapping[str, float], about: Mapping[str, Any]) -> Entry:
    """Puts a mixture of loaded experts into the bank as one more; for the thread that owns JAX."""
    z = worker.bank.mixed(weights)
    content = hashlib.sha256()
    for key in sorted(z):
        content.update(key.encode() + np.ascontiguousarray(z[key]).tobytes())
    entry = worker.bank.put(name, z, content.hexdigest(), about)
    worker.refresh()
    return entry


def drop(worker: Worker, name: str) -> Entry:
    """Takes an expert's name away; for the thread that owns JAX."""
    entry = worker.bank.drop(name)
    worker.refresh()
    return entry
