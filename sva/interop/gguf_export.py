"""Writing a model as a GGUF file, one tensor in memory at a time; `gguf.py` and llama.cpp read it back."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from sva.models.config import ModelConfig
from sva.models.gguf import LAYER_NAMES, NAMES, ROPE_FACTORS
from sva.models.gguf_file import read_gguf
from sva.models.rope import inverse_frequencies
from sva.models.tokenizer import NO_TOKENIZER
from sva.models.weights import expected, split_name
from sva.utils.errors import UserError
from sva.utils.files import write_atomically
from sva.utils.remote import to_path

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_OURS = {theirs: own for own, theirs in (NAMES | LAYER_NAMES).items()}
_KINDS = {
    np.dtype(np.float32): gguf.GGMLQuantizationType.F32,
    np.dtype(ml_dtypes.bfloat16): gguf.GGMLQuantizationType.BF16,
}
_FILE_TYPES = {
    gguf.GGMLQuantizationType.F32: gguf.LlamaFileType.ALL_F32,
    gguf.GGMLQuantizationType.BF16: gguf.LlamaFileType.MOSTLY_BF16,
}


def tokenizer_metadata(path: Path | str) -> dict[str, Any]:
    """Metadata of a GGUF file's tokenizer and chat template, to be carried over; empty for a directory."""
    if not to_path(path).is_file():
        return {}
    return {key: value for key, value in read_gguf(path).metadata.items() if key.startswith("tokenizer.")}


def save_gguf(
    path: Path | str,
    config: ModelConfig,
    read: Callable[[str], np.ndarray],
    *,
    name: str,
    tokenizer: Mapping[str, Any],
    dtype: Any = np.float32,
) -> None:
    """Writes a GGUF file (version 3) that llama.cpp and `open_gguf` load; `path` is whole or untouched.

    q and k rows of Llama models are put in llama.cpp's order (rotary pairs side by side), Llama 3.1's rope scaling
    becomes `rope_freqs.weight`, as llama.cpp's converter does. Matrices are stored as `dtype`, vectors as float32;
    llama.cpp's own `llama-quantize` packs them further.

    Args:
      path: the file.
      config: the model.
      read: a weight by its Hugging Face name, [out, in].
      name: `general.name`.
      tokenizer: metadata from `tokenizer_metadata`; if empty, the file holds weights only, and says so.
      dtype: float32 or bfloat16.
    Raises:
      UserError: an architecture, windows, an activation or rope settings that a GGUF file of this architecture cannot
        express, a full disk.
    """
    arch = _architecture(config)
    writer = gguf.GGUFWriter(None, arch)
    matrices = _KINDS[np.dtype(dtype)]
    writer.add_name(name)
    writer.add_file_type(int(_FILE_TYPES[matrices]))
    for key, value in _settings(config).items():
        _add(writer, f"{arch}.{key}", value)
    for key, value in (dict(tokenizer) or _token_ids(config)).items():
        _add(writer, key, value)
    factors = _rope_factors(config)
    if factors is not None:
        _declare(writer, ROPE_FACTORS, factors.shape, gguf.GGMLQuantizationType.F32)
    specs = expected(config)
    for weight, spec in specs.items():
        kind = matrices if len(spec.shape) == 2 else gguf.GGMLQuantizationType.F32
        _declare(writer, _gguf_name(weight), spec.shape, kind)
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if arch == "llama" else {}

    def write(place: Path) -> None:
        try:
            writer.write_header_to_file(place)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors)
            for weight in specs:
                tensor = np.asarray(read(weight))
                if weight.split(".")[-2] in heads:
                    tensor = _pairs(tensor, heads[weight.split(".")[-2]])
                writer.write_tensor_data(np.ascontiguousarray(tensor, dtype if tensor.ndim == 2 else np.float32))
        finally:
            writer.close()

    write_atomically(to_path(path), write)


def _architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the architecture."""
    if config.architecture not in _ARCHITECTURES:
        raise UserError(
            f"a {config.architecture} model cannot be written as a GGUF file; supported: {', '.join(_ARCHITECTURES)}; "
            "write a Hugging Face directory"
        )
    return _ARCHITECTURES[config.architecture]


def _gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face weight."""
    layer, path = split_name(name)
    if layer is None:
        return _OURS[name]
    return f"blk.{layer}.{_OURS['.'.join(path[:-1])]}.{path[-1]}"


def _pairs(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from the first half, then the second half, to rotary pairs side by side."""
    halves = weight.reshape(num_heads, 2, -1, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def _settings(config: ModelConfig) -> dict[str, Any]:
    """The metadata of the network, without the architecture in front."""
    windows = set(config.windows)
    if len(windows) > 1:
        raise UserError("this model's layers differ in their attention window, which a GGUF file cannot express")
    if config.hidden_act != "silu":
        raise UserError(f"this model's activation is {config.hidden_act}; a GGUF file of its kind means silu")
    if config.rope.kind not in ("default", "linear", "llama3"):
        raise UserError(f"rope type {config.rope.kind} of this model has no place in a GGUF file of its kind")
    settings = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope.theta),
    }
    if max(windows, default=0):
        settings["attention.sliding_window"] = max(windows)
    if config.rope.kind == "linear":
        settings |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope.factor)}
    return settings


def _rope_factors(config: ModelConfig) -> np.ndarray | None:
    """[head_dim / 2] float32, by how much the rotary frequencies lie below theta's; None where by nothing."""
    if config.rope.kind != "llama3" and not config.rope.factors:
        return None
    if _ARCHITECTURES[config.architecture] != "llama":
        raise UserError(f"rope scaling {config.rope.kind} of a {config.architecture} model has no place in a GGUF file")
    plain = inverse_frequencies(replace(config.rope, kind="default", factors=()), config.head_dim)
    return (plain / inverse_frequencies(config.rope, config.head_dim)).astype(np.float32)


def _token_ids(config: ModelConfig) -> dict[str, Any]:
    """The metadata of a file without a tokenizer: that there is none, and the special tokens' numbers."""
    ends = config.eos_token_ids
    ids = dict(zip(("eos", "eom", "eot") if len(ends) > 2 else ("eos", "eot"), ends, strict=False))
    ids |= {"bos": config.bos_token_id, "padding": config.pad_token_id}
    numbers = {f"tokenizer.ggml.{key}_token_id": number for key, number in ids.items() if number is not None}
    return {"tokenizer.ggml.model": NO_TOKENIZER} | numbers


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)


def _declare(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> None:
    size = 4 if kind == gguf.GGMLQuantizationType.F32 else 2
    writer.add_tensor_info(name, shape, np.dtype(f"f{size}"), int(np.prod(shape)) * size, raw_dtype=kind)
