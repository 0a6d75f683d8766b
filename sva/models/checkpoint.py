"""Reading checkpoints one tensor at a time: Hugging Face directories, and GGUF files through `gguf.py`.

Nothing here knows which weights a model has: `shapes` says what the file holds under Hugging Face names,
`match` holds it against what a model expects. Of the four ways a weight can go astray, "set twice" is found
on opening; "unmapped", "unexpected" and "wrong shape" by `match`.
"""

import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sva.models.config import ModelConfig, from_hf, token_ids
from sva.utils.errors import UserError
from sva.utils.files import read_json
from sva.utils.remote import is_remote, reaching, to_path

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


@dataclass(frozen=True)
class Checkpoint:
    """A model's weights on disk, not yet in memory.

    `shapes` names every weight as Hugging Face does and gives its stored shape, (out, in) for matrices;
    `read` returns one of them as stored (GGUF: unpacked to float32), in memory of its own; `read_rows`, where the
    format allows it, only some of its rows. `quantisation` is the commonest packed type of a GGUF file ("Q4_1"), None
    where nothing is packed.
    """

    path: Path
    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    quantisation: str | None = None
    read_rows: Callable[[str, slice], np.ndarray] | None = None

    def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """weight[index] of one weight, as stored; no more rows are read than that, where the format allows it."""
        if self.read_rows is None:
            return self.read(name)[index]
        return self.read_rows(name, index[0])[(slice(None), *index[1:])]


def open_checkpoint(path: Path | str) -> Checkpoint:
    """The checkpoint at `path`: a directory with config.json and safetensors, or a GGUF file.

    Weights are looked for as transformers does: model.safetensors, then model.safetensors.index.json, then
    every *.safetensors that is not an adapter. Names of a base model saved without its head, and so without
    "model." in front, are completed.

    When the config ties the output head to the embedding and the file holds both, they are compared: equal
    means tied, and if they differ the head of the file is used, untied, as transformers 5 does
    (transformers 4 ignored it). A head alone serves as the embedding.

    Raises:
      UserError: nothing readable there, a damaged file, a tensor set twice, an unsupported model or dtype.
    """
    path = to_path(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{path} is neither a GGUF file nor a directory; give the directory that holds config.json")
        from sva.models.gguf import open_gguf

        return open_gguf(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or directory; give a model directory, a .gguf file or a model name")
    config = _read_config(path)
    tensors = _completed(_tensors(path, tied=config.tie_word_embeddings))

    def read(name: str) -> np.ndarray:
        return tensors[name].read()

    def read_rows(name: str, rows: slice) -> np.ndarray:
        return tensors[name].read(rows)

    config = _tie(config, tensors, read)
    return Checkpoint(path, config, {name: t.shape for name, t in tensors.items()}, read, read_rows=read_rows)


def match(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: Any = "") -> None:
    """Nothing, if both name the same weights with the same shapes.

    Args:
      expected: shape of each weight the model needs.
      found: shape of each tensor the checkpoint holds.
      where: the checkpoint's path, for the message.

    Raises:
      UserError: one kind at a time: a weight without a tensor (unmapped), a tensor no weight takes
        (unexpected), a wrong shape. It names up to three of them and how many more there are.
    """
    lead = f"{where}: " if where else ""
    unmapped = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in found]
    unexpected = [f"{name} {list(shape)}" for name, shape in found.items() if name not in expected]
    wrong = [
        f"{name} (expected {list(shape)}, found {list(found[name])})"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if unmapped:
        also = f"; and it holds {_some(unexpected)} that no weight takes" if unexpected else ""
        raise UserError(f"{lead}unmapped: the checkpoint has no tensor for {_some(unmapped)}{also}")
    if unexpected:
        raise UserError(f"{lead}unexpected: the model has no weight for {_some(unexpected)}; is config.json its own?")
    if wrong:
        raise UserError(f"{lead}wrong shape: {_some(wrong)}; is config.json the checkpoint's own?")


@dataclass(frozen=True)
class _Tensor:
    """Where one tensor lies in a safetensors file.

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
    config = from_hf(read_json(where), str(where))
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
            raise UserError(f"{index} names {_some(absent)}, not there; fetch the model again")
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
        raise UserError(f"{index} promises {_some(lost)}, not in the file it names; fetch the model again")
    return tensors


def _no_weights(directory: Path) -> str:
    pickles = sorted(f.name for f in directory.glob("*.bin")) + sorted(f.name for f in directory.glob("*.pt*"))
    if not pickles:
        return f"{directory} has no *.safetensors files; fetch the model again"
    return (
        f"{directory} has only torch pickles ({_some(pickles)}), which can run code and are not read; with"
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


def _some(items: list[str]) -> str:
    """Up to three items and the number of the rest."""
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
