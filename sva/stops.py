"""Tokens to text as they come, up to a stop string."""

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of the stop strings in it."""
    return text[: min([place for place in map(text.find, stops) if place >= 0], default=len(text))]


class Text:
    """The text of one completion, special tokens left out, cut where a stop string begins.

    Stop strings are looked for after every token, across token borders, as vLLM does: the completion ends with the
    first token that completes one; of several that it completes the first in `stops` counts; the text keeps nothing
    of it, the tokens all of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self.text = ""
        self.stop: str | None = None  # the one that was found
        self._tokenizer = tokenizer.backend_tokenizer
        self._stops = stops
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, tokens: Sequence[int]) -> int | None:
        """How many of these tokens belong to the completion where a stop string ends it, otherwise None."""
        for place, token in enumerate(tokens):
            new = self._stream.step(self._tokenizer, int(token)) or ""  # nothing while a character is incomplete
            self.text += new
            for stop in self._stops:
                at = self.text.find(stop, max(0, len(self.text) - len(new) - len(stop) + 1)) if new else -1
                if at >= 0:
                    self.text, self.stop = self.text[:at], stop
                    return place + 1
        return None

    @property
    def safe(self) -> int:
        """Characters of `text` that no stop string can cut off any more."""
        ends = (n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return len(self.text) - max(ends, default=0)
