"""Values as plain data: what a program's answers are turned into before anybody looks at them.

`encode` runs beside the program and may be made to lie; `decode` runs beside the tests and makes only exact builtin
types, so that no comparison there runs a line of the program's: an object whose `__eq__` is always true arrives as
`Opaque`, which equals nothing.
"""

import collections
import collections.abc
import json
from decimal import Decimal
from fractions import Fraction
from typing import Any

LONGEST = 16 << 20  # bytes of one message
_MOST_ITEMS = 1_000_000  # of an iterator, which may be endless; of a value that is sent item by item
_JSON_INTEGERS = 1 << 63


class Opaque:
    """A value that is no plain data, by the name of its type."""

    def __init__(self, kind: str):
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind}>"


class Digest:
    """A list or tuple of very many items that can be hashed, by its type, length and hash: equal to such a one."""

    def __init__(self, kind: str, length: int, number: int):
        self.parts = (kind, length, number)

    @classmethod
    def of(cls, value: Any) -> "Digest":
        """Raises TypeError where an item cannot be hashed. A worker's hashes are the same in all its processes."""
        return cls(type(value).__name__, len(value), hash(tuple(value)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (list, tuple)) or self.parts[:2] != (type(other).__name__, len(other)):
            return False
        return self.parts == Digest.of(other).parts

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self.parts[0]} of {self.parts[1]} items>"


def _is_very_large(value: Any) -> bool:
    if type(value) not in (list, tuple) or not value:
        return False
    each = len(value[0]) if isinstance(value[0], (list, tuple)) else 1
    return len(value) * max(each, 1) > _MOST_ITEMS


def _items(values: Any) -> list[Any]:
    out = []
    for value in values:
        if len(out) == _MOST_ITEMS:
            raise ValueError(f"an iterator of more than {_MOST_ITEMS} items")
        out.append(encode(value))
    return out


def encode(value: Any) -> Any:
    """`value` as JSON can hold it: lists and scalars as they are, the rest as {type: contents}.

    Subclasses count as the builtin type below them (a Counter is a dict), iterators are read to their end. Of more than
    a million items only a digest is sent.
    """
    if _is_very_large(value):
        return {"digest": list(Digest.of(value).parts)}
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        exact = int(value)
        return exact if -_JSON_INTEGERS <= exact < _JSON_INTEGERS else {"int": f"{exact:x}"}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return _items(value)
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    for kind, base in _SEQUENCES.items():
        if isinstance(value, base):
            return {kind: _items(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__name__: value.hex()}
    if isinstance(value, range):
        return {"range": [encode(part) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, Decimal):
        return {"Decimal": str(value)}
    if isinstance(value, Fraction):
        return {"Fraction": [encode(value.numerator), encode(value.denominator)]}
    if isinstance(value, collections.abc.Iterator):
        return {"iterator": _items(value)}
    return {"opaque": str(getattr(type(value), "__name__", "object"))[:100]}


_SEQUENCES: dict[str, Any] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
    "keys": collections.abc.KeysView,
    "iterator": (collections.abc.ValuesView, collections.abc.ItemsView),
}
_MADE_FROM: dict[str, Any] = {
    "int": lambda text: int(text, 16),
    "dict": lambda pairs: {decode(key): decode(item) for key, item in pairs},
    "tuple": lambda items: tuple(map(decode, items)),
    "set": lambda items: set(map(decode, items)),
    "frozenset": lambda items: frozenset(map(decode, items)),
    "deque": lambda items: collections.deque(map(decode, items)),
    "keys": lambda items: dict.fromkeys(map(decode, items)).keys(),
    "iterator": lambda items: iter([decode(item) for item in items]),
    "complex": lambda parts: complex(*parts),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "range": lambda parts: range(*map(decode, parts)),
    "Decimal": Decimal,
    "Fraction": lambda parts: Fraction(*map(decode, parts)),
    "digest": lambda parts: Digest(*parts),
    "opaque": Opaque,
}


def decode(value: Any) -> Any:
    """The value that `encode` was given, made of exact builtin types; raises on anything malformed."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if isinstance(value, dict):
        ((kind, contents),) = value.items()
        return _MADE_FROM[kind](contents)
    return value


def dumps(message: dict[str, Any]) -> bytes:
    """A message, framed: four bytes of length, then JSON."""
    text = json.dumps(message).encode()
    if len(text) > LONGEST:
        raise ValueError(f"an answer of {len(text)} bytes; at most {LONGEST} are read")
    return len(text).to_bytes(4, "big") + text


def receive(read: Any) -> dict[str, Any] | None:
    """The next message from `read(num_bytes)`; None at the end of the stream.

    Raises:
      ValueError: too long, cut short or no JSON object.
    """
    head = _exactly(read, 4)
    if not head:
        return None
    length = int.from_bytes(head, "big")
    if length > LONGEST:
        raise ValueError(f"a message of {length} bytes; at most {LONGEST} are read")
    message = json.loads(_exactly(read, length))
    if not isinstance(message, dict):
        raise ValueError("a message that is no object")
    return message


def _exactly(read: Any, size: int) -> bytes:
    parts = []
    while size:
        part = read(min(size, 1 << 16))
        if not part:
            if parts:
                raise ValueError("a message cut short")
            return b""
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
