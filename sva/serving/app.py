"""The ASGI application of a server: its paths, and what answers them."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sva.serving import openapi, page_files
from sva.serving.config import ServerConfig
from sva.serving.errors import ApiError
from sva.serving.experts_api import Experts
from sva.serving.guard import App, ClientGone, Guard
from sva.serving.service import Service
from sva.serving.spectra_api import Spectra
from sva.serving.worker import Worker


def make_app(worker: Worker, service: Service, experts: Experts, cfg: ServerConfig, base: str) -> App:
    """The application, behind its guard."""
    spectra = Spectra(worker.bank)
    page = openapi.page(base, needs_token=cfg.token is not None)

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok" if worker.is_alive else "failed"}, 200 if worker.is_alive else 500)

    async def ready(_: Request) -> Response:
        is_ready = worker.is_alive and worker.is_accepting
        if not is_ready:
            raise ApiError(503, "the server is not ready for requests", retry=5)
        return JSONResponse({"status": "ready"})

    async def metrics(_: Request) -> Response:
        return Response(worker.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def spec(_: Request) -> Response:
        return JSONResponse(page)

    routes: list[tuple[str, str, Callable[[Request], Any]]] = [
        ("POST", "/v1/chat/completions", service.chat),
        ("POST", "/v1/completions", service.completions),
        ("GET", "/v1/models", experts.models),
        ("GET", "/v1/models/{model}", experts.model),
        ("GET", "/v1/experts", experts.experts),
        ("POST", "/v1/experts", experts.mix),
        ("PUT", "/v1/experts/{name}", experts.load),
        ("DELETE", "/v1/experts/{name}", experts.drop),
        ("POST", "/v1/adapt", experts.adapt),
        ("GET", "/v1/spectra", spectra.weights),
        ("GET", "/v1/spectra/{weight}", spectra.spectrum),
        ("GET", "/healthz", health),
        ("GET", "/readyz", ready),
        ("GET", "/metrics", metrics),
        ("GET", "/openapi.json", spec),
    ]
    handlers: dict[Any, Any] = {ApiError: _told, HTTPException: _http, ClientGone: _gone, Exception: _failed}
    api = [Route(path, call, methods=[method]) for method, path, call in routes]
    app = Starlette(routes=[*api, *page_files.routes()], exception_handlers=handlers)
    return Guard(app, cfg, worker.metrics, upload_bytes=(1 << 20) + 8 * worker.bank.numbers)


async def _told(_: Request, error: ApiError) -> Response:
    return error.response()


async def _gone(_: Request, error: ClientGone) -> Response:
    """Nobody reads it."""
    return Response(status_code=499)


async def _http(request: Request, error: HTTPException) -> Response:
    sentence = {404: "there is nothing at this path; see /openapi.json", 405: "this path has other methods"}
    answer = ApiError(error.status_code, sentence.get(error.status_code, str(error.detail))).response()
    answer.headers.update(error.headers or {})
    return answer


async def _failed(_: Request, error: Exception) -> Response:
    return ApiError(500, "the server failed at this request; its log says why").response()
