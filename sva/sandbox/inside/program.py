"""The process that runs the tested program: answers calls of its functions with plain data.

It holds no test, no expected value, no verdict and no nonce: all that a program can make of it is a wrong answer.
"""

import builtins
import os
import sys
import types
from typing import Any

from . import plain

NAME = "program"


def serve(source: str, channel: Any) -> None:
    """Runs `source`, then answers calls until the channel closes."""
    module = types.ModuleType(NAME)
    sys.modules[NAME] = module
    channel.sendall(plain.dumps(_outcome(lambda: exec(compile(source, f"<{NAME}>", "exec"), module.__dict__))))
    while message := plain.receive(channel.recv):
        channel.sendall(plain.dumps(_answer(module, message)))


def _answer(module: types.ModuleType, message: dict[str, Any]) -> dict[str, Any]:
    name = message["call"]
    function = getattr(module, name, None)
    if function is None:
        return {"raised": "NameError", "text": f"the program has no {name}"}
    args, kwargs = plain.decode(message["args"]), plain.decode(message["kwargs"])
    outcome = _outcome(lambda: plain.encode(function(*args, **kwargs)))
    try:
        plain.dumps(outcome)
    except (ValueError, RecursionError, MemoryError) as error:
        return _raised(error)
    return outcome


def _outcome(action: Any) -> dict[str, Any]:
    try:
        return {"value": action()}
    except BaseException as error:  # SystemExit and KeyboardInterrupt are answers like others
        return _raised(error)


def _raised(error: BaseException) -> dict[str, Any]:
    kind = next(c.__name__ for c in type(error).__mro__ if getattr(builtins, c.__name__, None) is c)
    try:
        text = str(error)[:500]
    except BaseException:
        text = ""
    return {"raised": kind, "text": text}


def main(source: int, channel: Any) -> None:
    """Serves the program in the open file `source`; ends the process."""
    try:
        with open(source, "rb") as file:
            text = file.read().decode("utf-8", "surrogatepass")
        serve(text, channel)
    finally:
        os._exit(0)
