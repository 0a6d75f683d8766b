"""The process that runs the tests, which are trusted, against a program in another process, which is not.

The tests' source sees `call(name, *args, **kwargs)`, which returns what that function of the program returned as plain
data or raises what it raised, `call_within(secs, name, ...)`, and `data`. Tests that run to their end pass. The verdict
goes out on a pipe of this process with a nonce that was given to it alone.
"""

import builtins
import functools
import json
import linecache
import os
import signal
import traceback
from typing import Any

from . import plain

PROGRAM_ENDED = "the program ended before its tests did"
_TESTS = "<tests>"


class ProgramEnded(Exception):
    """The program's process is gone, or no longer answers in the agreed form."""


def caller(channel: Any, load_secs: float) -> Any:
    """A function that calls the program's functions over `channel`, once the program has said that it is loaded.

    The program's top-level code may take `load_secs`, so that a module that never ends costs no more. The function's
    first argument is for how many seconds it waits for each part of the answer; None: as long as the limits let it.
    """

    def result(message: dict[str, Any] | None) -> Any:
        if message is None:
            raise ProgramEnded(PROGRAM_ENDED)
        if "raised" in message:
            raise _exception(str(message["raised"]), str(message.get("text", "")))
        return plain.decode(message["value"])

    def exchange(message: bytes | None, secs: float | None, what: str) -> Any:
        channel.settimeout(secs)
        try:
            if message is not None:
                channel.sendall(message)
            answer = plain.receive(channel.recv)
        except TimeoutError:
            raise ProgramEnded(f"time limit: {secs:g} s for {what}") from None
        except (OSError, ValueError) as error:
            raise ProgramEnded(f"{PROGRAM_ENDED}: {error}") from None
        return result(answer)

    def call_within(secs: float | None, name: str, *args: Any, **kwargs: Any) -> Any:
        message = {"call": name, "args": [plain.encode(arg) for arg in args], "kwargs": plain.encode(kwargs)}
        return exchange(plain.dumps(message), secs, "one call")

    exchange(None, load_secs, "top-level code")
    return call_within


def _exception(name: str, text: str) -> BaseException:
    kind = getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, AssertionError):
        return ProgramEnded(f"{name}: {text}" if text else name)
    try:
        return kind(text)
    except TypeError:  # UnicodeDecodeError takes five arguments
        return ProgramEnded(f"{name}: {text}")


def run(tests: dict[str, Any], channel: Any) -> tuple[bool, str]:
    """Whether the tests pass, and the reason where they do not."""
    source = tests["source"]
    linecache.cache[_TESTS] = (len(source), None, source.splitlines(keepends=True), _TESTS)
    try:
        call_within = caller(channel, tests["load_secs"])
        call = functools.partial(call_within, None)
        names = {"__name__": "tests", "call": call, "call_within": call_within, "data": plain.decode(tests["data"])}
        exec(compile(source, _TESTS, "exec"), names)
        return True, ""
    except BaseException as error:
        return False, _reason(error)


def _reason(error: BaseException) -> str:
    if isinstance(error, ProgramEnded):
        return str(error)[:300]
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, AssertionError):
        lines = [frame.line or "" for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _TESTS]
        text = str(error) if str(error) else f"wrong: {lines[-1] if lines else 'an assertion'}"
    return " ".join(text.split())[:300]


def main(tests: int, channel: Any, verdict: int) -> None:
    """Runs the tests in the open file `tests`, writes the verdict, and waits to be ended.

    It stays so that the program, which ends when its calls do, is still there to be looked at.
    """
    try:
        with open(tests, "rb") as file:
            message = json.load(file)
        passed, reason = run(message, channel)
        text = json.dumps({"nonce": message["nonce"], "passed": passed, "reason": reason})
        os.write(verdict, text.encode() + b"\n")
        signal.pause()
    finally:
        os._exit(0)
