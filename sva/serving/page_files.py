"""The page of a server: the files that a browser reads, and headers that keep everything of others out of them."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FOLDER = Path(__file__).parent / "page"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_NAMES = (
    "page.css",
    "icon.svg",
    "page.js",
    "settings.js",
    "answer.js",
    "arms.js",
    "spectrum.js",
    "api.js",
    "dom.js",
)
FILES = {"/": "index.html", **{f"/page/{name}": name for name in _NAMES}}
"""{path: file}. None of them holds a secret, so they need no token; what the page then asks for does."""

HEADERS = {
    # Everything from this server alone, no script or style inside the HTML, and no other site's frame around it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def routes() -> list[Route]:
    """The routes of the page; the files are read once, now."""
    return [_route(path, _FOLDER / name) for path, name in FILES.items()]


def _route(path: str, file: Path) -> Route:
    content, kind = file.read_bytes(), _TYPES[file.suffix]

    async def answer(_: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=kind)

    return Route(path, answer, methods=["GET"])
