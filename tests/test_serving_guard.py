"""What every request passes before anything reads it; no model."""

import json
import logging

import anyio
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from sva.serving.config import ServerConfig
from sva.serving.errors import ApiError
from sva.serving.guard import Guard
from sva.serving.metrics import Metrics

TOKEN = "0123456789abcdef"


async def _echo(request: Request) -> PlainTextResponse:
    request.state.log["model"] = "toy"
    return PlainTextResponse(str(len(await request.body())))


async def _broken(request: Request) -> PlainTextResponse:
    raise RuntimeError("secret")


async def _told(request, error):
    return error.response()


def ask(path="/v1/models", method="GET", body=b"", cfg=None, chunks=1, **headers):
    """(status, headers, body) of one request through the guard."""
    methods = ["GET", "POST", "PUT"]
    routes = [Route(x, _echo, methods=methods) for x in ("/v1/models", "/healthz", "/readyz")]
    app = Starlette(routes=[*routes, Route("/broken", _broken)], exception_handlers={ApiError: _told})
    guard = Guard(app, cfg or ServerConfig(body_bytes=1000), Metrics(), upload_bytes=5000)
    size = len(body) // chunks
    parts = [body[i * size : (i + 1) * size] for i in range(chunks)]
    sent = []

    async def receive():
        part = parts.pop(0) if parts else b""
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    raw = [
        (name.replace("_", "-").encode(), value.encode())
        for name, value in {"host": "localhost:8000", **headers}.items()
    ]
    scope = {"type": "http", "method": method, "path": path, "headers": raw, "query_string": b"", "raw_path": b""}
    anyio.run(guard, scope, receive, send)
    if not sent:
        return None, {}, b""
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(x.get("body", b"") for x in sent[1:])


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST", "named:80"])
def test_its_own_names_are_answered(host):
    assert ask(host=host, cfg=ServerConfig(allowed_hosts=("named",)))[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.com", "localhost.evil.com", "", "127.0.0.1.nip.io:8000", "0.0.0.0:8000", "a:b:c"]
)
def test_foreign_hosts_are_refused(host):
    status, _, body = ask(host=host)
    assert status == 403
    assert "--allow-host" in json.loads(body)["error"]["message"]


def test_pages_of_another_origin_are_refused_and_its_own_are_not():
    assert ask(origin="http://localhost:8000")[0] == 200
    for origin in ("http://evil.com", "null", "http://localhost:9000", "file://"):
        assert ask(origin=origin)[0] == 403


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe9"]
)
def test_a_token_that_is_missing_or_wrong_is_refused(header):
    cfg = ServerConfig(token=TOKEN)
    status, headers, body = ask(cfg=cfg, **({} if header is None else {"authorization": header}))
    assert (status, headers[b"www-authenticate"]) == (401, b"Bearer")
    assert TOKEN not in body.decode()


def test_the_token_opens_and_health_needs_none():
    cfg = ServerConfig(token=TOKEN)
    assert ask(cfg=cfg, authorization=f"Bearer {TOKEN}")[0] == 200
    assert ask(cfg=cfg, authorization=f"bearer {TOKEN}")[0] == 200
    assert [ask(path, cfg=cfg)[0] for path in ("/healthz", "/readyz")] == [200, 200]


@pytest.mark.parametrize(("size", "status"), [(0, 200), (1000, 200), (1010, 413), (100_000, 413)])
@pytest.mark.parametrize("told", [True, False])
def test_bodies_have_a_limit_told_or_not(size, status, told):
    headers = {"content_length": str(size)} if told else {}
    found, _, body = ask(method="POST", body=b"x" * size, chunks=10 if size >= 1000 else 1, **headers)
    assert found == status
    assert "1000 bytes" in body.decode() if status == 413 else body == str(size // 10 * 10).encode()


def test_files_have_a_limit_of_their_own_and_a_length_that_is_none_is_refused():
    assert ask(method="PUT", body=b"x" * 5000)[0] == 200
    assert ask(method="PUT", body=b"x" * 5001)[0] == 413
    assert ask(method="POST", content_length="-1")[0] == 413


def test_a_line_is_logged_without_what_was_asked(caplog):
    caplog.set_level(logging.INFO, logger="sva.serving")
    _, headers, _ = ask(method="POST", body=b"a secret prompt")
    (line,) = [json.loads(record.message) for record in caplog.records]
    assert line["id"].encode() == headers[b"x-request-id"]
    assert (line["path"], line["status"], line["model"]) == ("/v1/models", 200, "toy")
    assert "secret" not in json.dumps(line)


def test_an_unknown_path_does_not_make_a_label_of_its_own(caplog):
    caplog.set_level(logging.INFO, logger="sva.serving")
    assert ask("/v1/anything/at/all")[0] == 404
    assert json.loads(caplog.records[-1].message)["path"] == "other"
