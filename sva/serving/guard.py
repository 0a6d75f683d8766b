"""What every request passes before anything reads it: who it is from, how large it is, and that it is logged."""

import asyncio
import contextlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from sva.serving import page_files
from sva.serving.config import ServerConfig
from sva.serving.errors import ApiError
from sva.serving.metrics import Metrics

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/healthz", "/readyz", *page_files.FILES)  # need no token: orchestrators and browsers ask without one
_log = logging.getLogger("sva.serving")


class ClientGone(Exception):
    """Nobody waits for the answer."""


async def _discard(receive: Receive) -> None:
    """Reads what is left of a refused body, so that its client gets to read the answer; not for long."""
    until, size, more = time.monotonic() + 2, 0, True
    with contextlib.suppress(TimeoutError, ApiError):
        while more and size < 64 << 20:
            message = await asyncio.wait_for(receive(), until - time.monotonic())
            size += len(message.get("body", b""))
            more = message.get("more_body", False)


class Guard:
    """ASGI middleware: refuses foreign hosts and origins, wrong tokens and large or slow bodies; logs and counts."""

    def __init__(self, app: App, cfg: ServerConfig, metrics: Metrics, upload_bytes: int) -> None:
        """`upload_bytes`: what an expert file may have, instead of `cfg.body_bytes`."""
        self._app, self._cfg, self._metrics, self._upload_bytes = app, cfg, metrics, upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request, or lets the app do so."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # of a client that left before there was one
        scope["state"] = {**scope.get("state", {}), "id": uuid.uuid4().hex, "log": {}}

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", scope["state"]["id"].encode())]
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check(scope, headers)
            limited = self._limited(scope, headers, receive)
            await self._app(scope, limited, noting)
        except ApiError as error:
            await _discard(receive)
            await error.response()(scope, receive, noting)
        except ClientGone:
            status = 499
        except Exception:
            _log.exception("a request failed")
        finally:
            self._note(scope, status, time.monotonic() - started)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if name not in self._cfg.hosts:
            raise ApiError(403, f"this server is not called {name[:100]!r}; start it with --allow-host for that name")
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower() not in (f"http://{host}", f"https://{host}"):
            raise ApiError(403, "pages of another origin may not use this server")
        if self._cfg.token is None or scope["path"] in OPEN_PATHS:
            return
        kind, _, token = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._cfg.token.encode()):
            raise ApiError(401, "the token is missing or wrong; send it as Authorization: Bearer TOKEN")

    def _limited(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """`receive` that refuses a body over its limit, whether its length was told or not, and one that is slow."""
        limit = self._upload_bytes if scope["method"] == "PUT" else self._cfg.body_bytes
        refusal = ApiError(413, f"the body is over {limit} bytes, the most that this server takes")
        told = headers.get(b"content-length", b"0")
        if not told.isdigit() or int(told) > limit:
            raise refusal
        size, is_whole, until = 0, False, time.monotonic() + self._cfg.body_seconds

        async def limited() -> Message:
            nonlocal size, is_whole
            if is_whole:
                return await receive()  # waits for the client to leave
            try:
                message = await asyncio.wait_for(receive(), until - time.monotonic())
            except TimeoutError:
                raise ApiError(408, f"the body did not come within {self._cfg.body_seconds:.0f} seconds") from None
            size += len(message.get("body", b""))
            if size > limit:
                raise refusal
            is_whole = not message.get("more_body", False)
            return message

        return limited

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(path, str(status)).inc()
        self._metrics.seconds.labels(path).observe(seconds)
        line = {"event": "request", "id": scope["state"]["id"], "method": scope["method"], "path": path}
        line |= {"status": status, "seconds": round(seconds, 4), **scope["state"]["log"]}
        level = logging.DEBUG if path in ("/healthz", "/readyz", "/metrics") else logging.INFO
        _log.log(level, json.dumps(line))
