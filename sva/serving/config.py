"""What a server allows and where it listens; without JAX, so that mistakes are told before a model is loaded."""

import dataclasses
import os
import stat
from pathlib import Path

from sva.utils.errors import UserError, at_least

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Limits and addresses of a server."""

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()  # names in a request's Host besides loopback's and `host`
    token: str | None = None  # what clients must send as `Authorization: Bearer TOKEN`; None: nothing
    context: int = 4096  # tokens of prompt and answer together; the model's own limit holds as well
    max_tokens: int = 1024  # of one answer
    body_bytes: int = 2 << 20
    body_seconds: float = 30.0  # until a body must have come
    timeout: float = 600.0  # seconds of a whole request
    drain: float = 600.0  # seconds that SIGTERM waits for what runs
    logs_prompts: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port={self.port} is not a port; give a number from 0 (any free one) to 65535")
        at_least("--context", self.context, 2)
        at_least("--max-tokens", self.max_tokens, 1)
        if not self.timeout > 0:
            raise UserError(f"--timeout={self.timeout} must be above 0")

    @property
    def hosts(self) -> frozenset[str]:
        """The names by which a request may call this server, in lower case and without a port."""
        return frozenset(name.lower() for name in (*_LOOPBACK, self.host, *self.allowed_hosts))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in _LOOPBACK or self.host.startswith("127.")


def read_token(path: Path) -> str:
    """The token in a file that nobody else may read.

    Raises:
      UserError: no such file, one that others can read, or one without a token.
    """
    try:
        mode = path.stat().st_mode
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not ASCII"
        raise UserError(f"--token-file {path} cannot be read: {reason}") from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"--token-file {path} can be read by others; run chmod 600 {path}")
    if len(text) < 16 or not text.isprintable() or " " in text:
        raise UserError(f"--token-file {path} must hold one token of at least 16 characters without spaces")
    return text
