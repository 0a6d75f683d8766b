"""The table of architectures: what every key of a `config.json` sets, or that it is refused, or why it has no effect.

An architecture is one entry: its class names, the fields of `ModelConfig` that are its own whatever the config says,
and its keys. `sva.models.config` reads and writes configs by it, docs/models.md is made from it. The keys of one group
are one dictionary; an architecture adds its own to it.

Defaults are those of transformers' config classes. They are kept here because importing those classes imports torch
wherever it is installed (5 s); a test holds them equal.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sva.models.fields import REQUIRED, Field, Only, Reader, Sets, Unused
from sva.models.moe_config import MIXTRAL, OLMOE, QWEN3_MOE
from sva.models.rope import DEFAULT_ROPE_THETA, Rope, rope_from_hf
from sva.utils.errors import UserError

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}
_WINDOWS = ("full_attention", "sliding_attention")


class Architecture(NamedTuple):
    """One model type."""

    prefix: str  # of transformers' class names
    names: str  # the models that users know, for the docs
    fixed: Mapping[str, Any]  # fields of `ModelConfig` that no key sets
    fields: Mapping[str, Field]

    def defaults(self) -> dict[str, Any]:
        """What each absent key that is read means; the sizes that make a model have no default."""
        read = {key: field.default for key, field in self.fields.items() if isinstance(field, Sets)}
        return {key: default for key, default in read.items() if default is not REQUIRED}


# Readers of keys that need others.


def _kv_heads(read: Reader, key: str) -> int:
    heads = read.size("num_attention_heads")
    kv_heads = heads if read.get(key) is None else read.size(key)
    if heads % kv_heads:
        raise UserError(f"{read.where}: num_attention_heads {heads} is not a multiple of {key} {kv_heads}")
    return kv_heads


def _head_dim(read: Reader, key: str) -> int:
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    if read.get(key) is not None:
        head_dim = read.size(key)
    elif hidden % heads == 0:
        head_dim = hidden // heads
    else:
        raise UserError(
            f"{read.where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}; give head_dim"
        )
    if head_dim % 2:
        raise UserError(f"{read.where}: head_dim {head_dim} is odd; rotary positions need an even one")
    return head_dim


def _activation(read: Reader, key: str) -> str:
    return read.choice(key, ACTIVATIONS)


def _rope(read: Reader, key: str) -> Rope:
    return rope_from_hf(read, _head_dim(read, "head_dim"))


def _same_window(read: Reader, key: str) -> tuple[int, ...]:
    window = 0 if read.get(key) is None else read.size(key)
    return (window,) * read.size("num_hidden_layers")


def _same_window_if_used(read: Reader, key: str) -> tuple[int, ...]:
    """Qwen3-MoE's: one window for all layers, or none where it is switched off."""
    return _same_window(read, "sliding_window") if read.flag(key) else (0,) * read.size("num_hidden_layers")


def _windows_from_a_layer_on(read: Reader, key: str) -> tuple[int, ...]:
    """Qwen's: `layer_types`, or windows from `max_window_layers` on; none where they are switched off."""
    window = 0
    if read.flag("use_sliding_window") and read.get("sliding_window") is not None:
        window = read.size("sliding_window")
    types = read.per_layer(key, _WINDOWS)
    if types is None:
        first = read.get("max_window_layers")
        if isinstance(first, bool) or not isinstance(first, int):
            raise UserError(f"{read.where}: max_window_layers must be a whole number, not {first!r}")
        return tuple(window if i >= first else 0 for i in range(read.size("num_hidden_layers")))
    if "sliding_attention" in types and not window:
        raise UserError(f"{read.where}: {key} has sliding_attention; set use_sliding_window and sliding_window")
    return tuple(window if t == "sliding_attention" else 0 for t in types)


def _two_flags(read: Reader, key: str) -> tuple[bool, bool]:
    return read.flag(key), read.flag(key)


# Groups of keys.

_TRAINING = "it counts in training from scratch only"
_OUTPUT = "what transformers' forward returns beside the logits"
COMMON: dict[str, Field] = {
    "model_type": Unused("names the architecture"),
    "architectures": Unused("names the architecture"),
    "is_encoder_decoder": Only((False, None), "there is no encoder"),
    "add_cross_attention": Only((False, None), "there is no encoder to attend to"),
    "rope_interleaved": Only((False, None), "halves of a head are paired, not neighbours"),
    "quantization_config": Only((None, {}), "its weights are read by a GGUF file only"),
    "initializer_range": Unused(_TRAINING),
    "attention_dropout": Unused(_TRAINING),
    "use_cache": Unused("sva decides where keys and values are kept"),
    "chunk_size_feed_forward": Unused("the same products in pieces"),
    "pretraining_tp": Unused("the same products in pieces"),
    "output_attentions": Unused(_OUTPUT),
    "output_hidden_states": Unused(_OUTPUT),
    "return_dict": Unused(_OUTPUT),
    "id2label": Unused("names for a classifier"),
    "label2id": Unused("names for a classifier"),
    "problem_type": Unused("chooses a classifier's loss"),
    "dtype": Unused("the stored weights have a dtype of their own, `sva.load` takes the one to compute in"),
    "torch_dtype": Unused("transformers 4's name of dtype"),
    "transformers_version": Unused("tells who wrote the file"),
    "_name_or_path": Unused("tells where the model came from"),
    "_attn_implementation_autoset": Unused("chooses a kernel"),
    "attn_implementation": Unused("chooses a kernel"),
    "is_llama_config": Unused("a note of its maker"),
    "transformers.js_config": Unused("for another library"),
    "unsloth_version": Unused("tells who wrote the file"),
    "unsloth_fixed": Unused("tells who wrote the file"),
    "auto_map": Unused("names Python code beside the weights, which is not run"),
}


def _sizes(**defaults: Any) -> dict[str, Field]:
    """The keys that every architecture has, with other defaults where they are given."""
    fields: dict[str, Field] = {
        "vocab_size": Sets(("vocab_size",), REQUIRED, Reader.size),
        "hidden_size": Sets(("hidden_size",), REQUIRED, Reader.size),
        "intermediate_size": Sets(("intermediate_size",), REQUIRED, Reader.size),
        "num_hidden_layers": Sets(("num_layers",), REQUIRED, Reader.size),
        "num_attention_heads": Sets(("num_heads",), REQUIRED, Reader.size),
        "num_key_value_heads": Sets(("num_kv_heads",), None, _kv_heads),
        "head_dim": Sets(("head_dim",), None, _head_dim),
        "hidden_act": Sets(("hidden_act",), "silu", _activation),
        "max_position_embeddings": Sets(("max_position_embeddings",), 2048, Reader.size),
        "rms_norm_eps": Sets(("rms_norm_eps",), 1e-6, Reader.number),
        "tie_word_embeddings": Sets(("tie_word_embeddings",), False, Reader.flag),
        "bos_token_id": Sets(("bos_token_id",), 1, Reader.token),
        "eos_token_id": Sets(("eos_token_ids",), 2, Reader.tokens),
        "pad_token_id": Sets(("pad_token_id",), None, Reader.token),
    }
    changed: dict[str, Field] = {key: fields[key]._replace(default=value) for key, value in defaults.items()}  # pyright: ignore[reportCallIssue]
    return fields | changed


def _rope_keys(theta: float = DEFAULT_ROPE_THETA) -> dict[str, Field]:
    return {
        "rope_theta": Sets(("rope",), theta, _rope),
        "rope_parameters": Sets(("rope",), None, None),
        "rope_scaling": Sets(("rope",), None, None),
        "original_max_position_embeddings": Sets(("rope",), None, None),
        "partial_rotary_factor": Only((1, 1.0, None), "whole heads are turned"),
    }


_ATTENTION_BIAS: dict[str, Field] = {
    "attention_bias": Sets(("attention_bias", "attention_output_bias"), False, _two_flags)
}
_MLP_BIAS: dict[str, Field] = {"mlp_bias": Sets(("mlp_bias",), False, Reader.flag)}
_NO_BIAS = Unused("transformers' class has none, whatever the config says")
_QWEN_WINDOWS: dict[str, Field] = {
    "layer_types": Sets(("windows",), None, _windows_from_a_layer_on),
    "use_sliding_window": Sets(("windows",), False, None),
    "sliding_window": Sets(("windows",), 4096, None),
    "max_window_layers": Sets(("windows",), 28, None),
}
_QWEN = _sizes(num_key_value_heads=32, max_position_embeddings=32768, bos_token_id=None, eos_token_id=None)

TABLE: dict[str, Architecture] = {
    "llama": Architecture(
        "Llama",
        "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2",
        {},
        COMMON
        | _sizes()
        | _rope_keys()
        | _ATTENTION_BIAS
        | _MLP_BIAS
        | {"sliding_window": Unused("transformers' class has no windows, whatever the config says")},
    ),
    "mistral": Architecture(
        "Mistral",
        "Mistral 7B",
        {},
        COMMON
        | _sizes(num_key_value_heads=8, max_position_embeddings=131072)
        | _rope_keys()
        | {"sliding_window": Sets(("windows",), 4096, _same_window), "attention_bias": _NO_BIAS, "mlp_bias": _NO_BIAS},
    ),
    "qwen2": Architecture(
        "Qwen2",
        "Qwen2, Qwen2.5",
        {"attention_bias": True},
        COMMON
        | _QWEN
        | _rope_keys()
        | _QWEN_WINDOWS
        | {"attention_bias": Unused("q, k and v always have biases"), "mlp_bias": _NO_BIAS},
    ),
    "qwen3": Architecture(
        "Qwen3",
        "Qwen3, dense",
        {"qk_norm": "head"},
        COMMON
        | _QWEN
        | {"head_dim": Sets(("head_dim",), 128, _head_dim)}
        | _rope_keys()
        | _QWEN_WINDOWS
        | _ATTENTION_BIAS
        | {"mlp_bias": _NO_BIAS},
    ),
    "mixtral": Architecture(
        "Mixtral",
        "Mixtral 8x7B, 8x22B",
        {},
        COMMON
        | _sizes(num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5)
        | _rope_keys(1e6)
        | {"sliding_window": Sets(("windows",), None, _same_window), "attention_bias": _NO_BIAS, "mlp_bias": _NO_BIAS}
        | MIXTRAL,
    ),
    "qwen3_moe": Architecture(
        "Qwen3Moe",
        "Qwen3, mixtures of experts",
        {"qk_norm": "head"},
        COMMON
        | _sizes(num_key_value_heads=4, max_position_embeddings=32768, bos_token_id=None, eos_token_id=None)
        | _rope_keys()
        | _ATTENTION_BIAS
        | {
            "use_sliding_window": Sets(("windows",), False, _same_window_if_used),
            "sliding_window": Sets(("windows",), 4096, None),
            "max_window_layers": Unused("transformers' class has the same window in all layers"),
            "mlp_bias": _NO_BIAS,
        }
        | QWEN3_MOE,
    ),
    "olmoe": Architecture(
        "Olmoe",
        "OLMoE",
        {"qk_norm": "full"},
        COMMON
        | _sizes(max_position_embeddings=4096, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=50279, pad_token_id=1)
        | _rope_keys()
        | _ATTENTION_BIAS
        | {"mlp_bias": _NO_BIAS}
        | OLMOE,
    ),
}
