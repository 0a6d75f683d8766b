"""Stop strings: a row's text as its tokens come, up to the first of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from sva.generation.stream import Stream, Vocabulary
from sva.utils.errors import UserError


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of the stop strings in it."""
    return text[: min([place for place in map(text.find, stops) if place >= 0], default=len(text))]


def stop_tokens(tokenizer: Any, stops: Sequence[str]) -> dict[int, str]:
    """{id: stop string} of those that are one added token, which ends a row although the text leaves it out.

    Raises:
      UserError: an empty stop string, or one with a special token inside, which no text can ever hold.
    """
    if "" in stops:
        raise UserError("a stop string is empty; it would end every answer before it begins")
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder() if stops else {}
    found = {number: token.content for number, token in added.items() if token.content in stops}
    special = {token.content for token in added.values() if token.special and token.content}
    for stop in stops:
        inside = [token for token in special if token in stop]
        if inside and stop not in special:
            longest = max(inside, key=len)
            raise UserError(
                f"the stop string {stop!r} holds the special token {longest!r} and more, which no answer's text ever "
                f"holds, as special tokens are left out of it; stop at {longest!r} alone"
            )
    return found


class Text:
    """The text of one completion, special tokens left out, cut where a stop string begins.

    Stop strings are looked for after every token, across token borders, as vLLM does: the completion ends with the
    first token that completes one, or that is one; of several that it completes the one that begins first counts. The
    text keeps nothing of it, the tokens all of it. So the text is `cut` of the decode of the completion's tokens.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
        self._start(Vocabulary(tokenizer), stops, stop_tokens(tokenizer, stops))

    def _start(self, vocabulary: Vocabulary, stops: Sequence[str], ids: Mapping[int, str]) -> None:
        self.text = ""
        self.stop: str | None = None  # the one that was found
        self._vocabulary, self._stops, self._ids = vocabulary, stops, ids
        self._longest = max(map(len, stops), default=0)
        self._stream = Stream(vocabulary)
        self._ended = False
        self._taken = 0

    def another(self) -> "Text":
        """The text of another completion with the same stop strings, still empty."""
        text = object.__new__(Text)
        text._start(self._vocabulary, self._stops, self._ids)
        return text

    def add(self, tokens: Sequence[int]) -> int | None:
        """The number of these tokens that belong to the completion where a stop string ends it, otherwise None."""
        for place, token in enumerate(tokens):
            if not self._grow(self._stream.add(int(token))):
                self._look_ahead()
            if self.stop is None and token in self._ids:
                self.end()
                self.stop = self.stop or self._ids[token]
            if self.stop is not None:
                self._ended = True
                return place + 1
        return None

    def end(self) -> None:
        """The completion ends here by something else; what waited for more tokens joins the text."""
        if not self._ended:
            self._ended = True
            self._grow(self._stream.end())

    def take(self) -> str:
        """The text that no stop string can cut off any more and that was not taken yet."""
        start, self._taken = self._taken, len(self.text) if self._ended else self.safe
        return self.text[start : self._taken]

    @property
    def safe(self) -> int:
        """Characters of `text` that no stop string can cut off any more."""
        ends = (n for stop in self._stops for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
        return len(self.text) - max(ends, default=0)

    def _grow(self, new: str) -> bool:
        """Adds settled text, up to a stop string that it completes; whether there was any."""
        before = len(self.text)
        self.text += new
        if new:
            places = {stop: self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self._stops}
            found = {stop: place for stop, place in places.items() if place >= 0}
            if found:
                self.stop = min(found, key=lambda stop: found[stop])
                self.text = self.text[: found[self.stop]]
        return bool(new)

    def _look_ahead(self) -> None:
        """Ends the completion where a run of byte tokens, which is still open, completes a stop string."""
        run, reach = self._stream.open, self._longest + 1
        if run and self._stops:
            tail = run[-reach:] if len(run) >= reach else self.text[-reach:] + run
            if any(stop in tail for stop in self._stops):
                settled = self.text
                self._grow(self._stream.peek())
                if self.stop is None:  # the decoder reads the row's beginning in another way
                    self.text = settled
