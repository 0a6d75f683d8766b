"""Writing a model as a Hugging Face checkpoint, one shard in memory at a time."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sva.models import moe_names
from sva.models.config import ModelConfig, to_hf
from sva.utils.files import read_json, save_tensors, write_directory

_METADATA = {"format": "pt"}  # what transformers looks for; it says nothing about the tensors


def save_checkpoint(
    directory: Path | str,
    config: ModelConfig,
    tensors: Iterable[tuple[str, np.ndarray]],
    tokenizer: Any = None,
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Writes config, generation config, safetensors and tokenizer files that transformers 4 and 5 load.

    Everything is written to a temporary directory beside `directory` and renamed at the end, so `directory`
    is whole or not there. More than `max_shard_bytes` of weights are split over several files with an index;
    a tensor is never split. At most one shard is held in memory.

    Args:
      directory: a new or an empty directory.
      config: the model.
      tensors: (Hugging Face name, array) of every weight, in the order to be written.
      tokenizer: a transformers tokenizer, saved as it saves itself; None for none.
      max_shard_bytes: upper limit of a file's weights.
    Raises:
      UserError: `directory` holds something already, the disk is full, or it cannot be written to.
    """
    write_directory(directory, lambda place: _write(place, config, tensors, tokenizer, max_shard_bytes))


def _write(
    directory: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, np.ndarray]],
    tokenizer: Any,
    max_shard_bytes: int,
) -> None:
    raw = to_hf(config)
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    total = held = 0
    dtype = ""

    def flush() -> None:
        save_tensors(directory / f"{len(shards)}.safetensors", shard, _METADATA)
        shards.append(list(shard))
        shard.clear()

    for own, tensor in tensors:
        name = moe_names.written(config.architecture, own)
        if shard and held + tensor.nbytes > max_shard_bytes:
            flush()
            held = 0
        shard[name] = np.ascontiguousarray(tensor)
        held += tensor.nbytes
        total += tensor.nbytes
        dtype = dtype or tensor.dtype.name
    flush()

    # "torch_dtype" is transformers 4's name of it, which 5 reads too
    _write_json(directory / "config.json", raw | {"torch_dtype": dtype})
    ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw[key] is not None}
    _write_json(directory / "generation_config.json", ids)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)
    for i, file in enumerate(files):
        (directory / f"{i}.safetensors").rename(directory / file)
        # safetensors writes files that only their owner may read, whatever the umask
        shutil.copymode(directory / "config.json", directory / file)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
        settings = directory / "tokenizer_config.json"
        # transformers 5 writes a class name of its own that 4 does not know; this one both know
        _write_json(settings, read_json(settings) | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
