"""llama.cpp's tokens and logits, by its C functions in any library that exports them.

The settings of a model and of a context are passed as memory of more bytes than they have, filled by llama.cpp's own
defaults: on x86-64 and aarch64 such structs are passed by address or on the stack, where the rest is not looked at.
"""

import ctypes as c
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_TOKENS = 4096  # of one text


class _Settings(c.Structure):
    _fields_ = [("memory", c.c_uint64 * 128)]  # ctypes asks for a list


class _Batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


class LlamaCpp:
    """A GGUF model in llama.cpp, on the CPU."""

    def __init__(self, library: Path, model: Path) -> None:
        self._library = c.CDLL(str(library))
        self._call("llama_backend_init", None)
        self._call("ggml_backend_load_all", None)
        self._quiet = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)(lambda *_: None)
        self._call("llama_log_set", None, self._quiet, c.c_void_p())
        settings = self._call("llama_model_default_params", _Settings)
        self._model = c.c_void_p(
            self._call("llama_model_load_from_file", c.c_void_p, c.c_char_p(bytes(model)), settings)
        )
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {model}")
        self._vocabulary = c.c_void_p(self._call("llama_model_get_vocab", c.c_void_p, self._model))
        settings = self._call("llama_context_default_params", _Settings)
        self._context = c.c_void_p(self._call("llama_init_from_model", c.c_void_p, self._model, settings))
        one = c.c_int32(1)  # its threads wait by spinning: more than there are free cores take many times as long
        self._call("llama_set_n_threads", None, self._context, one, one)
        self._batch = self._call("llama_batch_init", _Batch, c.c_int32(_TOKENS), c.c_int32(0), c.c_int32(1))
        self.vocab_size = self._call("llama_vocab_n_tokens", c.c_int32, self._vocabulary)

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(self._library, name)
        function.restype, function.argtypes = result, [type(argument) for argument in arguments]
        return function(*arguments)

    def tokenize(self, text: str, *, bos: bool) -> list[int]:
        """The ids of a text; control tokens in it are text."""
        data, out = text.encode(), (c.c_int32 * _TOKENS)()
        length, room = c.c_int32(len(data)), c.c_int32(_TOKENS)
        number = self._call(
            "llama_tokenize", c.c_int32, self._vocabulary, c.c_char_p(data), length, out, room, c.c_bool(bos),
            c.c_bool(False),
        )  # fmt: skip
        return list(out[:number])

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """[T, V] float32 logits after each token of one text."""
        batch = self._batch
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, at, 1
            batch.seq_id[at][0], batch.logits[at] = 0, 1
        memory = c.c_void_p(self._call("llama_get_memory", c.c_void_p, self._context))
        self._call("llama_memory_clear", None, memory, c.c_bool(True))
        if self._call("llama_decode", c.c_int32, self._context, batch):
            raise SystemExit("llama.cpp could not read a text")
        found = self._call("llama_get_logits", c.POINTER(c.c_float), self._context)
        return np.ctypeslib.as_array(found, (len(ids), self.vocab_size)).copy()
