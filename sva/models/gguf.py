"""Reading GGUF files: metadata as a model configuration, packed tensors unpacked one at a time.

The header is parsed here and the packed types by the `gguf` package: its own reader takes 2 s for the 49,152
tokens of SmolLM2 (an array object for each), this takes a tenth of a second, and every length is checked.
Format: the GGUF specification in ggml's documentation, versions 2 and 3.
"""

import functools
import mmap
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from sva.errors import UserError
from sva.models.checkpoint import Checkpoint
from sva.models.config import ModelConfig, from_hf

# llama.cpp's "llama" covers Mistral and SmolLM2 too.
ARCHITECTURES = ("llama", "qwen2", "qwen3")

# A GGUF file's names and Hugging Face's, of the model's own tensors and of each layer's.
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"
_PLAIN = ("F32", "F16", "BF16")
# Rows are unpacked in blocks of about this many numbers, so that a big matrix needs little beside its result.
_BLOCK = 1 << 21

_STRING, _ARRAY = 8, 9
_SCALARS = {
    **dict(enumerate(["<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"])),
    **dict(enumerate(["<Q", "<q", "<d"], start=10)),
}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file; `shape` is (out, in), the reverse of the file's own order."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int  # in bytes from the start of the file

    @property
    def row_bytes(self) -> int:
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return (self.shape[-1] if self.shape else 1) // block * size

    @property
    def num_rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))


@dataclass(frozen=True)
class GGUFFile:
    """The header of a GGUF file: tensors, and metadata (numbers, strings; lists of numbers as arrays)."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(key, default)

    def need(self, key: str) -> Any:
        if key not in self.metadata:
            raise UserError(f"{self.path}: the metadata key {key} is missing; fetch another conversion of the model")
        return self.metadata[key]

    def read(self, name: str) -> np.ndarray:
        """A tensor unpacked to float32, in memory of its own."""
        tensor = self.tensors[name]
        out = np.empty((tensor.num_rows, tensor.shape[-1] if tensor.shape else 1), np.float32)
        step = max(1, _BLOCK // max(1, out.shape[1]))
        try:
            with open(self.path, "rb") as stream:
                stream.seek(tensor.offset)
                for start in range(0, len(out), step):
                    block = out[start : start + step]
                    raw = np.fromfile(stream, np.uint8, len(block) * tensor.row_bytes)
                    block[:] = gguf.quants.dequantize(raw.reshape(len(block), tensor.row_bytes), tensor.kind)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise UserError(f"{self.path} has become shorter while it was read; fetch it again") from error
        return out.reshape(tensor.shape)


def read_gguf(path: Path | str) -> GGUFFile:
    """The header of a GGUF file, every length in it checked against the file's size.

    Raises:
      UserError: not a GGUF file, a version or a packed type that is not supported, truncated or corrupt.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            magic = stream.read(24)
            if magic[:4] != b"GGUF":
                hint = "it is a Git LFS pointer: run `git lfs pull`" if magic.startswith(b"version https") else ""
                raise UserError(f"{path} is not a GGUF file; {hint or 'fetch it again'}")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data, size).file()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, struct.error, MemoryError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is truncated or corrupt ({error}); fetch it again") from error


def open_gguf(path: Path | str) -> Checkpoint:
    """A GGUF file as a checkpoint under Hugging Face names; `read` gives float32.

    The row order that llama.cpp's converter gives the q and k projections of Llama models (for rotary pairs
    side by side instead of half a head apart) is undone. `rope_freqs.weight` becomes the config's rope
    factors. A file without `output.weight` ties the output head to the embedding.

    Raises:
      UserError: as `read_gguf`; also an unsupported architecture or tensor.
    """
    file = read_gguf(path)
    config = _config(file)
    named: dict[str, str] = {}
    for name in file.tensors:
        if name == ROPE_FACTORS:
            continue
        layer = _LAYER.fullmatch(name)
        if name in NAMES:
            named[NAMES[name]] = name
        elif layer and layer[2] in LAYER_NAMES:
            named[f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{layer[3]}"] = name
        else:
            raise UserError(f"{file.path}: unexpected: no weight of a {config.architecture} model takes {name}")
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    permuted = heads if file.get("general.architecture") == "llama" else {}

    def read(name: str) -> np.ndarray:
        weight = file.read(named[name])
        num_heads = permuted.get(name.split(".")[-2])
        return weight if num_heads is None else _halves(weight, num_heads)

    kinds = Counter(tensor.kind.name for tensor in file.tensors.values())
    packed = [kind for kind, _ in kinds.most_common() if kind not in _PLAIN]
    shapes = {name: file.tensors[theirs].shape for name, theirs in named.items()}
    return Checkpoint(file.path, config, shapes, read, packed[0] if packed else None)


def _halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from rotary pairs side by side to the first half, then the second half."""
    pairs = weight.reshape(num_heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _config(file: GGUFFile) -> ModelConfig:
    """The model that the metadata and the tensors' names and shapes describe."""
    where = file.path
    kind = file.need("general.architecture")
    if kind not in ARCHITECTURES:
        raise UserError(f"{where}: unsupported architecture {kind}; supported GGUF files: {', '.join(ARCHITECTURES)}")
    if file.get(f"{kind}.expert_count"):
        raise UserError(f"{where}: mixture-of-experts models are not supported; use a dense one")
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{where}: unmapped: the file has no tensor for token_embd.weight; fetch another conversion")

    def key(name: str, default: Any = None) -> Any:
        """A number or string; a list with one value per layer counts if all are the same."""
        value = file.get(f"{kind}.{name}", default)
        if isinstance(value, np.ndarray | list):
            if len(set(value)) != 1:
                raise UserError(f"{where}: {kind}.{name} that differs between layers is not supported")
            value = value[0].item() if isinstance(value, np.ndarray) else value[0]
        return _shortest(value) if isinstance(value, float) else value

    def need(name: str) -> Any:
        file.need(f"{kind}.{name}")
        return key(name)

    heads, hidden = need("attention.head_count"), need("embedding_length")
    head_dim = key("attention.key_length") or key("rope.dimension_count") or hidden // max(1, heads)
    for name in ("rope.dimension_count", "attention.value_length"):
        if key(name, head_dim) != head_dim:
            raise UserError(f"{where}: {kind}.{name} {key(name)} must be the head's width {head_dim}")
    window = key("attention.sliding_window") or None
    raw: dict[str, Any] = {
        "model_type": "mistral" if kind == "llama" and window else kind,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": key("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "rope_theta": key("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": 0,
        "bos_token_id": _token(file, "bos"),
        "eos_token_id": [i for i in (_token(file, k) for k in ("eos", "eot", "eom")) if i is not None],
        "pad_token_id": _token(file, "padding"),
    }
    if key("rope.scaling.attn_factor", 1.0) != 1.0:
        raise UserError(f"{where}: {kind}.rope.scaling.attn_factor other than 1 is not supported")
    # llama.cpp's rules: no type means linear, no factor means none
    scaling = key("rope.scaling.type", "linear")
    factor = key("rope.scaling.factor", key("rope.scale_linear", 0.0))
    if scaling not in ("none", "linear") or (scaling == "linear" and factor not in (0.0, 1.0)):
        raw["rope_scaling"] = {"rope_type": scaling, "factor": factor}
    config = from_hf(raw, str(where))

    def bias(*names: str) -> bool:
        return any(f"blk.0.{name}.bias" in file.tensors for name in names)

    config = replace(
        config,
        attention_bias=bias("attn_q", "attn_k", "attn_v"),
        attention_output_bias=bias("attn_output"),
        mlp_bias=bias("ffn_gate", "ffn_up", "ffn_down"),
    )
    return replace(config, rope=replace(config.rope, factors=_rope_factors(file, config)))


def _rope_factors(file: GGUFFile, config: ModelConfig) -> tuple[float, ...]:
    """Per-frequency divisors of `rope_freqs.weight`; empty where there are none or all are 1."""
    if ROPE_FACTORS not in file.tensors:
        return ()
    factors = file.read(ROPE_FACTORS)
    num = config.head_dim // 2
    if factors.shape != (num,) or not np.all(factors > 0):
        raise UserError(f"{file.path}: {ROPE_FACTORS} must hold {num} positive factors; it is {factors.shape}")
    if np.all(factors == 1):
        return ()
    if config.rope.kind != "default":
        raise UserError(f"{file.path}: {ROPE_FACTORS} together with rope scaling {config.rope.kind} is not supported")
    return tuple(map(_shortest, factors.tolist()))


def _token(file: GGUFFile, name: str) -> int | None:
    value = file.get(f"tokenizer.ggml.{name}_token_id")
    return None if value in (None, 0xFFFFFFFF) else value


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class _Parser:
    """Walks through a GGUF header; whatever does not fit raises ValueError or struct.error."""

    def __init__(self, path: Path, data: mmap.mmap, size: int):
        self.path, self.data, self.size, self.at = path, data, size, 4

    def file(self) -> GGUFFile:
        version = self.scalar("<I")
        if version not in (2, 3):
            swapped = " (big-endian)" if struct.unpack("<I", struct.pack(">I", version))[0] in (2, 3) else ""
            raise UserError(f"{self.path}: GGUF version {version}{swapped} is not supported, only 2 and 3")
        num_tensors, num_keys = self.scalar("<Q"), self.scalar("<Q")
        metadata = {}
        for _ in range(num_keys):
            key = self.string()
            metadata[key] = self.value(self.scalar("<I"))
        tensors: dict[str, GGUFTensor] = {}
        for _ in range(num_tensors):
            name, tensor = self.tensor()
            if name in tensors:
                raise UserError(f"{name} is set twice in {self.path}; fetch it again")
            tensors[name] = tensor
        alignment = metadata.get("general.alignment", 32)
        start = -(-self.at // alignment) * alignment
        tensors = {name: replace(tensor, offset=start + tensor.offset) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            end = tensor.offset + tensor.num_rows * tensor.row_bytes
            if end > self.size:
                raise ValueError(f"{name} should end at byte {end}, the file at {self.size}")
        return GGUFFile(self.path, metadata, tensors)

    def take(self, count: int) -> int:
        """Steps over `count` bytes that must be there; gives their start."""
        start = self.at
        if count > self.size - start:
            raise ValueError(f"the header needs {count} bytes at {start}, the file ends at {self.size}")
        self.at = start + count
        return start

    def scalar(self, form: str) -> Any:
        return struct.unpack_from(form, self.data, self.take(struct.calcsize(form)))[0]

    def string(self) -> str:
        length = self.scalar("<Q")
        start = self.take(length)
        return self.data[start : start + length].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.scalar("<I"), self.scalar("<Q")
            if inner in (_STRING, _ARRAY):
                self.take(8 * count)  # each has at least its length; then go back and read
                self.at -= 8 * count
                return [self.value(inner) for _ in range(count)]
            dtype = np.dtype(self.form(inner))
            start = self.take(count * dtype.itemsize)
            return np.frombuffer(self.data[start : self.at], dtype)
        return self.scalar(self.form(kind))

    def form(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"unknown metadata type {kind}")
        return _SCALARS[kind]

    def tensor(self) -> tuple[str, GGUFTensor]:
        name = self.string()
        num_axes = self.scalar("<I")
        if num_axes > 4:
            raise ValueError(f"{name} has {num_axes} axes")
        shape = tuple(self.scalar("<Q") for _ in range(num_axes))[::-1]
        number = self.scalar("<I")
        kind = next((k for k in gguf.GGMLQuantizationType if k == number), None)
        if kind is None or not _can_unpack(kind):
            raise UserError(f"{self.path}: {name} is packed as {kind.name if kind else number}, which is not supported")
        if shape and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            raise ValueError(f"rows of {name} have {shape[-1]} numbers, which {kind.name} cannot pack")
        if any(axis > self.size * 8 for axis in shape):
            raise ValueError(f"{name} has shape {list(shape)}")
        return name, GGUFTensor(shape, kind, self.scalar("<Q"))


@functools.cache
def _can_unpack(kind: gguf.GGMLQuantizationType) -> bool:
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
