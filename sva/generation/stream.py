"""Tokens to text as they come: what has been given so far always begins the decode of the whole row."""

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}
"""GPT-2's letter for each byte, by which byte-level vocabularies write their tokens."""


class Vocabulary:
    """The text of a tokenizer's tokens, special tokens left out."""

    def __init__(self, tokenizer: Any):
        self._backend = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        kinds = _kinds(self._backend.decoder)
        self.is_byte_level = kinds == ["ByteLevel"]
        self.has_byte_level = "ByteLevel" in kinds
        self._falls_back = "ByteFallback" in kinds

    def piece(self, token: int) -> str | None:
        """The token as the vocabulary writes it; None for one that has no text: special, or beyond the vocabulary."""
        piece = self._backend.id_to_token(token)
        return None if piece in self._special else piece

    def fallback_byte(self, piece: str) -> int | None:
        """The byte that a token such as <0x0A> stands for, where the decoder reads it so."""
        return int(piece[3:5], 16) if self._falls_back and _BYTE.fullmatch(piece) else None

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a whole row."""
        return self._backend.decode(tokens, skip_special_tokens=True)


class Stream:
    """The text of one row, token by token; nothing that a later token could change is given before it is settled.

    - Byte-level vocabularies: bytes wait until their character is complete or cannot become one (then it is U+FFFD).
    - Byte fallback: a decoder reads a run of byte tokens as a whole, U+FFFD for each where one of them is wrong, so a
      run waits for its end. `open` is its text if it ended here, while that is valid.
    - All others: a token's text depends on the token before it at most, and on whether it is the row's first.

    A token costs two or three decodes of a few tokens, whatever the length of the row.
    """

    def __init__(self, vocabulary: Vocabulary):
        self.open = ""
        self._vocabulary = vocabulary
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = codecs.getincrementaldecoder("utf-8")("strict")
        self._run_is_valid = True
        self._waiting: list[int] = []
        self._before: list[int] = []  # stand for every token that is settled,
        self._before_size = 0  # and decode to so many characters

    def add(self, token: int) -> str:
        """The text that this token settles, "" where there is none."""
        vocabulary = self._vocabulary
        piece = vocabulary.piece(token)
        if piece is None:
            return ""
        if vocabulary.is_byte_level:
            return self._bytes.decode(bytes_of(piece))
        self._waiting.append(token)
        byte = vocabulary.fallback_byte(piece)
        if byte is not None:
            self._open(byte)
            return ""
        new = self.peek()
        return "" if vocabulary.has_byte_level and new.endswith("\N{REPLACEMENT CHARACTER}") else self._settle(new)

    def peek(self) -> str:
        """The text that waits, as if the row ended here."""
        if self._vocabulary.is_byte_level:
            return self._bytes.getstate()[0].decode(errors="replace")
        if not self._waiting:
            return ""
        return self._vocabulary.decode([*self._before, *self._waiting])[self._before_size :]

    def end(self) -> str:
        """The text that still waited when the row ended."""
        return self._bytes.decode(b"", final=True) if self._vocabulary.is_byte_level else self._settle(self.peek())

    def _open(self, byte: int) -> None:
        if self._run_is_valid:
            try:
                self.open += self._run.decode(bytes([byte]))
            except UnicodeDecodeError:
                self._run_is_valid, self.open = False, ""

    def _settle(self, new: str) -> str:
        """`new`, after which the shortest tail that has a text stands for all tokens.

        Decoders treat a row's first token or its leading blanks differently, which a tail that has a text keeps from
        the tokens after it.
        """
        tokens = [*self._before, *self._waiting]
        for tail in (tokens[-1:], tokens[-2:], tokens):
            self._before, self._before_size = tail, len(self._vocabulary.decode(tail))
            if self._before_size:
                break
        self._waiting, self.open, self._run_is_valid = [], "", True
        self._run.reset()
        return new


def bytes_of(piece: str) -> bytes:
    """The bytes of a byte-level token; one with a letter that no byte has is an added token, written as it is."""
    try:
        return bytes(_BYTE_OF[letter] for letter in piece)
    except KeyError:
        return piece.encode()


def _kinds(decoder: Any) -> list[str]:
    """The decoder's kinds, those inside a sequence in their order."""

    def kinds(state: dict[str, Any]) -> list[str]:
        inner = state.get("decoders")
        return [state["type"]] if inner is None else [kind for part in inner for kind in kinds(part)]

    return [] if decoder is None else kinds(json.loads(decoder.__getstate__()))
