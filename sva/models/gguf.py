"""GGUF files as checkpoints: metadata as a model configuration, tensors under Hugging Face names."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sva.models.checkpoint import Checkpoint
from sva.models.config import ModelConfig, from_hf
from sva.models.end_tokens import end_tokens
from sva.models.gguf_file import GGUFFile, read_gguf
from sva.utils.errors import UserError


class _Kind(NamedTuple):
    """One `general.architecture` of a GGUF file."""

    model_type: str
    layer_names: Mapping[str, str] = {}  # where other than `LAYER_NAMES`
    is_permuted: bool = False  # rotary pairs of q and k lie side by side
    has_norms_plus_one: bool = False  # the file holds 1 + weight of norms
    wide_layers: int = 0  # of the one model whose query scale is that of hidden_size / heads

    @property
    def names(self) -> dict[str, str]:
        """This kind's names of a layer's tensors, and Hugging Face's."""
        return {**LAYER_NAMES, **self.layer_names}


_GEMMA_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
KINDS = {
    "llama": _Kind("llama", is_permuted=True),  # Mistral and SmolLM2 too
    "qwen2": _Kind("qwen2"),
    "qwen3": _Kind("qwen3"),
    "gemma2": _Kind("gemma2", _GEMMA_NAMES, has_norms_plus_one=True, wide_layers=46),
    "gemma3": _Kind("gemma3_text", _GEMMA_NAMES, has_norms_plus_one=True, wide_layers=62),
}

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
# Rotary tables that the first converters left in the file, which follow from the metadata.
_HARMLESS = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?|(.*\.)?rotary_emb\.inv_freq")
# Metadata that would change the result, and the values that do not; llama.cpp takes 0 for an absent scale.
_ONLY: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
}
_PLAIN = ("F32", "F16", "BF16")


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
    kind = KINDS[file.need("general.architecture")]
    named: dict[str, str] = {}
    for name in file.tensors:
        if name == ROPE_FACTORS or _HARMLESS.fullmatch(name):
            continue
        layer = _LAYER.fullmatch(name)
        if name in NAMES:
            named[NAMES[name]] = name
        elif layer and layer[2] in kind.names:
            named[f"model.layers.{layer[1]}.{kind.names[layer[2]]}.{layer[3]}"] = name
        else:
            raise UserError(f"{file.path}: unexpected: no weight of a {config.architecture} model takes {name}")
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    permuted = heads if kind.is_permuted else {}

    def read(name: str) -> np.ndarray:
        weight = file.read(named[name])
        if kind.has_norms_plus_one and name.endswith("norm.weight"):
            weight -= 1
        num_heads = permuted.get(name.split(".")[-2])
        return weight if num_heads is None else _halves(weight, num_heads)

    kinds = Counter(tensor.kind.name for tensor in file.tensors.values())
    packed = [kind for kind, _ in kinds.most_common() if kind not in _PLAIN]
    shapes = {name: file.tensors[theirs].shape for name, theirs in named.items()}
    files = tuple(dict.fromkeys(tensor.file for tensor in file.tensors.values()))
    return Checkpoint(file.path, config, shapes, read, packed[0] if packed else None, files=files)


def _halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from rotary pairs side by side to the first half, then the second half."""
    pairs = weight.reshape(num_heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _config(file: GGUFFile) -> ModelConfig:
    """The model that the metadata and the tensors' names and shapes describe."""
    where = file.path
    kind = file.need("general.architecture")
    if kind not in KINDS:
        raise UserError(f"{where}: unsupported architecture {kind}; supported GGUF files: {', '.join(KINDS)}")
    if file.get(f"{kind}.expert_count"):
        raise UserError(
            f"{where}: mixtures of experts are not read from GGUF files; use the model's Hugging Face directory"
        )
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{where}: unmapped: the file has no tensor for token_embd.weight; fetch another conversion")

    read = _Reader(file, kind)
    heads, hidden = read.need("attention.head_count"), read.need("embedding_length")
    head_dim = read.key("attention.key_length") or read.key("rope.dimension_count") or hidden // max(1, heads)
    for name in ("rope.dimension_count", "attention.value_length"):
        if read.key(name, head_dim) != head_dim:
            raise UserError(f"{where}: {kind}.{name} {read.key(name)} must be the head's width {head_dim}")
    window = read.key("attention.sliding_window") or None
    raw: dict[str, Any] = {
        "model_type": "mistral" if kind == "llama" and window else KINDS[kind].model_type,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": read.need("feed_forward_length"),
        "num_hidden_layers": read.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": read.key("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": read.need("context_length"),
        "rms_norm_eps": read.need("attention.layer_norm_rms_epsilon"),
        "rope_theta": read.key("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": 0,
        "bos_token_id": _token(file, "bos"),
        "eos_token_id": end_tokens(file.metadata, str(where)),
        "pad_token_id": _token(file, "padding"),
    }
    if scaling := _rope_scaling(read):
        raw["rope_scaling"] = scaling
    if kind.startswith("gemma"):
        raw |= _gemma(read, raw)
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


class _Reader:
    """Look-ups among the metadata of one architecture, `kind`."""

    def __init__(self, file: GGUFFile, kind: str) -> None:
        self.file, self.kind = file, kind
        for name, values in _ONLY.items():
            if (value := self.key(name, values[0])) not in values:
                raise UserError(
                    f"{file.path}: {kind}.{name} {value} is not implemented; use the model's Hugging Face directory"
                )

    def key(self, name: str, default: Any = None) -> Any:
        """A number or string; a list with one value per layer counts if all are the same."""
        value = self.file.get(f"{self.kind}.{name}", default)
        if isinstance(value, np.ndarray | list):
            if len(set(value)) != 1:
                raise UserError(f"{self.file.path}: {self.kind}.{name} that differs between layers is not supported")
            value = value[0].item() if isinstance(value, np.ndarray) else value[0]
        return _shortest(value) if isinstance(value, float) else value

    def need(self, name: str) -> Any:
        """The value of `key`; raises UserError where the file does not have it."""
        self.file.need(f"{self.kind}.{name}")
        return self.key(name)


def _gemma(read: _Reader, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of Gemma 2's and 3's config, absent ones as llama.cpp takes them."""
    second = read.kind == "gemma2"
    is_wide = raw["num_hidden_layers"] == KINDS[read.kind].wide_layers
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": raw["hidden_size"] // raw["num_attention_heads"] if is_wide else raw["head_dim"],
        "sliding_window": raw["sliding_window"] or (4096 if second else None),
        "layer_types": _layer_types(read, raw["num_hidden_layers"], 2 if second else 6),
        "rope_local_base_freq": read.key("rope.freq_base_swa", 10000.0),
        "attn_logit_softcapping": read.key("attn_logit_softcapping", 50.0 if second else None),
        "final_logit_softcapping": read.key("final_logit_softcapping", 30.0 if second else 0.0) or None,
    }


def _layer_types(read: _Reader, num_layers: int, every: int) -> list[str]:
    """Gemma's `layer_types`: an array tells which layers have a window, a number that every so many-th has none."""
    key = f"{read.kind}.attention.sliding_window_pattern"
    given = read.file.get(key, every)
    if isinstance(given, np.ndarray | list) and len(given) == num_layers:
        has_window = [bool(flag) for flag in given]
    elif isinstance(given, int) and given >= 0:
        has_window = [not given or (i + 1) % given > 0 for i in range(num_layers)]  # 0: every layer, as in llama.cpp
    else:
        raise UserError(f"{read.file.path}: {key} must be a number, or one flag for each of {num_layers} layers")
    return ["sliding_attention" if has else "full_attention" for has in has_window]


def _rope_scaling(read: _Reader) -> dict[str, Any] | None:
    """The `rope_scaling` entry of the config that says the same; None for unchanged frequencies."""
    if read.key("rope.scaling.attn_factor", 1.0) != 1.0:
        raise UserError(f"{read.file.path}: {read.kind}.rope.scaling.attn_factor other than 1 is not supported")
    # By llama.cpp's rules no type means linear and no factor means none.
    scaling = read.key("rope.scaling.type", "linear")
    factor = read.key("rope.scaling.factor", read.key("rope.scale_linear", 0.0))
    if scaling not in ("none", "linear"):
        raise UserError(f"{read.file.path}: unsupported rope type {scaling!r} in a GGUF file; supported: none, linear")
    if scaling == "linear" and factor not in (0.0, 1.0):
        return {"rope_type": "linear", "factor": factor}
    return None


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
