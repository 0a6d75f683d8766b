"""Single tokens as text, for log-probs."""

from typing import Any

from sva.generation.stream import Vocabulary, bytes_of

_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a blank


class TokenText:
    """The text of each token by itself, special ones too."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._vocabulary = Vocabulary(tokenizer)

    def bytes(self, token: int) -> bytes:
        """The bytes that the token stands for."""
        piece = self._vocabulary.piece(token)
        if piece is None:
            return (self._backend.id_to_token(token) or "").encode()
        if self._vocabulary.is_byte_level:
            return bytes_of(piece)
        byte = self._vocabulary.fallback_byte(piece)
        return piece.replace(_BLANK, " ").encode() if byte is None else bytes([byte])

    def text(self, token: int) -> str:
        r"""The text; of bytes that are no whole characters `bytes:\xe2\x96`: different tokens stay different."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
