"""Hugging Face directories (config.json and safetensors) as checkpoints, read one tensor at a time."""

import json
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sva.models import moe_names
from sva.models.checkpoint import Checkpoint, some_of
from sva.models.config import ModelConfig, from_hf, unknown_keys
from sva.models.fields import token_ids
from sva.utils.errors import UserError
from sva.utils.files import read_json
from sva.utils.remote import is_remote, reaching

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Buffers that older versions of transformers, and some converters, saved among the weights: rotary tables, masks,
# positions. No architecture has a weight of such a name, and they hold nothing that the config does not say.
_HARMLESS = re.compile(
    r"(.*\.)?(rotary_emb\.\w+|rope\.freqs|(self_attn|attn|attention)\.(bias|masked_bias)"
    r"|inv_freq|(cos|sin)_cached|freqs_cis|position_ids|(causal|attention|attn)_mask)"
)
# Not this model's weights although they may lie beside them: PEFT adapters, Mistral's own format.
_FOREIGN = re.compile(r"(adapter_|consolidated).*")


def open_hf_directory(path: Path) -> Checkpoint:
    """The checkpoint of a directory with config.json and safetensors.

    Weights are looked for as transformers does: model.safetensors, then model.safetensors.index.json, then
    every *.safetensors that is not an adapter. Names of a base model saved without its head, and so without
    "model." in front, are completed.

    When the config ties the output head to the embedding and the file holds both, they are compared: equal
    means tied, and if they differ the head of the file is used, untied, as transformers 5 does
    (transformers 4 ignored it). A head alone serves as the embedding.

    Raises:
      UserError: no config.json or no weights there, a damaged file, a tensor set twice, an unsupported model or dtype.
    """
    config = _read_config(path)
    tensors = _by_module(_completed(_tensors(path, tied=config.tie_word_embeddings)), config)

    def read(name: str) -> np.ndarray:
        return tensors[name].read()

    def read_rows(name: str, rows: slice) -> np.ndarray:
        return tensors[name].read(rows)

    config = _tie(config, tensors, read)
    files = () if is_remote(path) else tuple(dict.fromkeys(tensor.file for tensor in tensors.values()))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return Checkpoint(path, config, shapes, read, read_rows=read_rows, files=files)


@dataclass(frozen=True)
class _Tensor:
    """The place of one tensor in a safetensors file.

    Read with plain reads rather than through a memory map: mapped pages would count as this process's memory
    beside the copy made from them.
    """

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """The tensor, or those of its rows."""
        start, stop, _ = rows.indices(self.shape[0])
        width = int(np.prod(self.shape[1:], dtype=np.int64))
        flat = np.empty((stop - start) * width, self.dtype)
        try:
            with reaching(self.file), self.file.open("rb") as stream:
                stream.seek(self.offset + start * width * self.dtype.itemsize)
                size = stream.readinto(flat.view(np.uint8).data)
        except OSError as error:
            raise UserError(f"{self.file}: cannot be read ({error.strerror})") from error
        if size != flat.nbytes:
            raise UserError(f"{self.file} has become shorter while it was read; fetch it again")
        return flat.reshape(stop - start, *self.shape[1:])


def _read_config(directory: Path) -> ModelConfig:
    """config.json with the token ids of generation_config.json added."""
    where = directory / "config.json"
    if not where.is_file():
        raise UserError(f"{directory} has no config.json; give a Hugging Face model directory or a .gguf file")
    raw = read_json(where)
    config = from_hf(raw, str(where))
    if unknown := unknown_keys(raw):
        print(f"sva: {where}: passed over, as transformers does: {', '.join(unknown)}", file=sys.stderr)
    where = directory / "generation_config.json"
    if not where.is_file():
        return config
    generation = read_json(where)

    def ids(key: str) -> tuple[int, ...]:
        return token_ids(generation.get(key), f"{where}: {key}")

    def one(given: int | None, key: str) -> int | None:
        return given if given is not None else next(iter(ids(key)), None)

    return replace(
        config,
        bos_token_id=one(config.bos_token_id, "bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *ids("eos_token_id")))),
        pad_token_id=one(config.pad_token_id, "pad_token_id"),
    )


def _tensors(directory: Path, *, tied: bool) -> dict[str, _Tensor]:
    """Every tensor of a directory's safetensors files, by its name there.

    What the index names and no model has a weight for may be missing, and so may the head of a model that ties it to
    the embedding (`tied`).
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    promised: dict[str, str] = {}
    if single.is_file():
        files = [single]
    elif index.is_file():
        promised = read_json(index).get("weight_map") or {}
        if not isinstance(promised, dict) or not all(isinstance(f, str) for f in promised.values()) or not promised:
            raise UserError(f"{index} has no weight_map; fetch it again")
        promised = {name: file for name, file in promised.items() if not _HARMLESS.fullmatch(name)}
        files = [directory / name for name in sorted(set(promised.values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise UserError(f"{index} names {some_of(absent)}, not there; fetch the model again")
    else:
        files = [f for f in sorted(directory.glob("*.safetensors")) if not _FOREIGN.fullmatch(f.name)]
    if not files:
        raise UserError(_no_weights(directory))
    tensors: dict[str, _Tensor] = {}
    for file in files:
        for name, tensor in _header(file).items():
            if name in tensors:
                raise UserError(f"{name} is set twice, in {tensors[name].file.name} and in {file}; delete one of them")
            tensors[name] = tensor
    if tied and HEAD not in tensors:
        promised = {name: shard for name, shard in promised.items() if name != HEAD}
    lost = [name for name, shard in promised.items() if name not in tensors or tensors[name].file.name != shard]
    if lost:
        raise UserError(f"{index} promises {some_of(lost)}, not in the file it names; fetch the model again")
    return tensors


def _no_weights(directory: Path) -> str:
    pickles = sorted(f.name for f in directory.glob("*.bin")) + sorted(f.name for f in directory.glob("*.pt*"))
    if not pickles:
        return f"{directory} has no *.safetensors files; fetch the model again"
    return (
        f"{directory} has only torch pickles ({some_of(pickles)}), which can run code and are not read; with"
        " torch, transformers converts them: AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
    )


def _header(file: Path) -> dict[str, _Tensor]:
    """The tensors a safetensors file holds; of a local one the library has checked that it is whole."""
    try:
        if not is_remote(file):
            with safe_open(file, "numpy"):
                pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            entries = json.loads(stream.read(length), object_pairs_hook=lambda pairs: _once(pairs, file))
    except (SafetensorError, struct.error, json.JSONDecodeError, UnicodeDecodeError) as error:
        with file.open("rb") as stream:
            start = stream.read(24)
        if start.startswith(b"version https://git-lfs"):
            raise UserError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull`") from error
        raise UserError(f"{file} is truncated or not a safetensors file ({error}); fetch it again") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    tensors = {}
    for name, entry in entries.items():
        if name == "__metadata__" or _HARMLESS.fullmatch(name):
            continue
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"{file}: {name} has dtype {entry['dtype']}; supported: {', '.join(_DTYPES)}")
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = _Tensor(file, start, _DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return tensors


def _once(pairs: list[tuple[str, Any]], file: Path) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{twice} is set twice in {file}; fetch it again")
    return entries


def _completed(tensors: dict[str, _Tensor]) -> dict[str, _Tensor]:
    """The tensors under full names: a base model saved alone has no "model." in front."""
    if any(name.startswith("model.") for name in tensors):
        return tensors
    return {name if name == HEAD else f"model.{name}": tensor for name, tensor in tensors.items()}


def _by_module(tensors: dict[str, _Tensor], config: ModelConfig) -> dict[str, _Tensor]:
    """The tensors with one for every matrix of a mixture-of-experts layer, under the names of `moe_names`.

    Where a checkpoint has one tensor for all modules, as transformers 5 holds them, those are its parts.
    """
    if config.moe is None:
        return tensors
    found: dict[str, _Tensor] = {}
    for name, tensor in tensors.items():
        parts = moe_names.parts(name, tensor.shape, config.moe) or {name: (0, tensor.shape)}
        for own, (start, shape) in parts.items():
            offset = tensor.offset + start * tensor.dtype.itemsize
            own = moe_names.canonical(own)
            if own in found:
                raise UserError(
                    f"{own} is set twice, in {found[own].file.name} and as {name} in {tensor.file}; delete one of them"
                )
            found[own] = replace(tensor, offset=offset, shape=shape)
    return found


def _tie(config: ModelConfig, tensors: dict[str, _Tensor], read: Callable[[str], np.ndarray]) -> ModelConfig:
    """The config with tying as the file has it; drops a repeated head from `tensors`, renames a lone one."""
    if not config.tie_word_embeddings or HEAD not in tensors:
        return config
    if EMBEDDING not in tensors:
        tensors[EMBEDDING] = tensors.pop(HEAD)
    elif tensors[EMBEDDING].shape == tensors[HEAD].shape and np.array_equal(read(EMBEDDING), read(HEAD)):
        del tensors[HEAD]
    else:
        return replace(config, tie_word_embeddings=False)
    return config
