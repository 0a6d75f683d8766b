"""How one key of a `config.json` is read: the kinds of entries of `sva.models.architectures`, and their readers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sva.utils.errors import UserError

REQUIRED: Any = object()
"""In the place of a default: without this key there is no model."""


class Sets(NamedTuple):
    """A key that decides these fields of `ModelConfig`."""

    sets: tuple[str, ...]  # each takes the value that `read` gives
    default: Any  # what an absent key means: that of transformers' config class
    read: Callable[["Reader", str], Any] | None  # None: another key of the same fields reads this one too


class Only(NamedTuple):
    """A key of which these values are implemented; any other would change the result and is refused."""

    values: tuple[Any, ...]  # the first is what an absent key means
    why: str


class Unused(NamedTuple):
    """A key without effect on the logits."""

    why: str


Field = Sets | Only | Unused


class Reader:
    """Typed look-ups in a config by the fields of its architecture; every complaint names the file and the key."""

    def __init__(self, config: Mapping[str, Any], fields: Mapping[str, Field], where: str):
        self.config, self.fields, self.where = config, fields, where
        for key, field in fields.items():
            if isinstance(field, Only) and key in config and config[key] not in field.values:
                raise UserError(f"{where}: {key} {config[key]!r} is not implemented: {field.why}")

    def get(self, key: str) -> Any:
        """The value, or the default of an absent key; raises UserError where a required one is missing."""
        field = self.fields[key]  # a key that the table does not have is not read, whatever the config says
        if key in self.config:
            return self.config[key]
        default = field.default if isinstance(field, Sets) else None
        if default is REQUIRED:
            raise UserError(f"{self.where}: the required key {key!r} is missing")
        return default

    def size(self, key: str) -> int:
        """A whole number above 0."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise UserError(f"{self.where}: {key} must be a positive whole number, not {value!r}")
        return value

    def number(self, key: str) -> float:
        """A number above 0."""
        return positive_number(self.get(key), self.where, key)

    def number_or_none(self, key: str) -> float | None:
        """A number above 0, or None for null."""
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """True or False."""
        value = self.get(key)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {key} must be true or false, not {value!r}")
        return value

    def tokens(self, key: str) -> tuple[int, ...]:
        """Token ids: see `token_ids`."""
        return token_ids(self.get(key), f"{self.where}: {key}")

    def token(self, key: str) -> int | None:
        """The first token id, or None."""
        return next(iter(self.tokens(key)), None)

    def choice(self, key: str, names: Mapping[str, str]) -> str:
        """What a name stands for among `names`."""
        value = self.get(key)
        if not isinstance(value, str) or value not in names:
            raise UserError(f"{self.where}: unsupported {key} {value!r}; supported: {', '.join(names)}")
        return names[value]

    def per_layer(self, key: str, allowed: Sequence[Any]) -> tuple[Any, ...] | None:
        """One of `allowed` for each layer, or None for null."""
        values = self.get(key)
        if values is None:
            return None
        num_layers = self.size("num_hidden_layers")
        is_list = isinstance(values, Sequence) and not isinstance(values, str)
        if not is_list or len(values) != num_layers or any(value not in allowed for value in values):
            names = ", ".join(map(str, allowed))
            raise UserError(f"{self.where}: {key} must hold {num_layers} entries, each one of {names}")
        return tuple(values)


def positive_number(value: Any, where: str, key: str) -> float:
    """The value of a key of the file `where`; raises UserError for anything but a positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise UserError(f"{where}: {key} must be a positive number, not {value!r}")
    return float(value)


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """The ids in a config's token entry: null, one id or a list; negative ones (old Llama 2) are none."""
    items = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in items):
        raise UserError(f"{name} must be null, a token id or a list of token ids, not {value!r}")
    return tuple(dict.fromkeys(i for i in items if i >= 0))
