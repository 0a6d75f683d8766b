"""Keys of a `config.json` in groups that architectures are put together from, and readers of keys that need others."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from sva.models.fields import REQUIRED, Field, Only, Reader, Sets, Unused, positive_number
from sva.models.rope import DEFAULT_ROPE_THETA, Rope, nested_settings, rope_from_hf, ropes_from_hf
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
OLMO3_THETA = 500000.0
_WINDOWS = ("full_attention", "sliding_attention")

# Readers of keys that need others.


def _kv_heads(read: Reader, key: str) -> int:
    heads = read.size("num_attention_heads")
    kv_heads = heads if read.get(key) is None else read.size(key)
    if heads % kv_heads:
        raise UserError(f"{read.where}: num_attention_heads {heads} is not a multiple of {key} {kv_heads}")
    return kv_heads


def head_dim(read: Reader, key: str) -> int:
    """The width of a head."""
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


def activation(read: Reader, key: str) -> str:
    """`ModelConfig.hidden_act` of one of transformers' names."""
    return read.choice(key, ACTIVATIONS)


def _rope(read: Reader, key: str) -> Rope:
    return rope_from_hf(read, head_dim(read, "head_dim"))


def same_window(read: Reader, key: str) -> tuple[int, ...]:
    """One window for all layers, null for none."""
    window = 0 if read.get(key) is None else read.size(key)
    return (window,) * read.size("num_hidden_layers")


def same_window_if_used(read: Reader, key: str) -> tuple[int, ...]:
    """Qwen3-MoE's: one window for all layers, or none where it is switched off."""
    return same_window(read, "sliding_window") if read.flag(key) else (0,) * read.size("num_hidden_layers")


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


def two_flags(read: Reader, key: str) -> tuple[bool, bool]:
    """A flag for two fields."""
    return read.flag(key), read.flag(key)


def scale_of_queries(read: Reader, key: str) -> float:
    """Gemma's: the square root of a number below the products of queries and keys."""
    return read.number(key) ** -0.5


def scaled_width(read: Reader, key: str) -> tuple[int, float]:
    """Gemma's: embeddings are multiplied by the square root of their width."""
    return read.size(key), math.sqrt(read.size(key))


def windows_by_type(every: int) -> Callable[[Reader, str], tuple[int, ...]]:
    """A reader of `layer_types`: by default every so many-th layer sees everything, the others a window.

    `sliding_window_pattern` takes the place of `every` where the architecture reads it.
    """

    def windows(read: Reader, key: str) -> tuple[int, ...]:
        types = read.per_layer(key, _WINDOWS)
        if types is None:
            name = "sliding_window_pattern"
            pattern = read.size(name) if name in read.fields and read.get(name) is not None else every
            types = tuple(_WINDOWS[(i + 1) % pattern > 0] for i in range(read.size("num_hidden_layers")))
        return tuple(read.size("sliding_window") if kind == "sliding_attention" else 0 for kind in types)

    return windows


def windows_without_rope(read: Reader, key: str) -> tuple[int, ...]:
    """SmolLM3's: where windows are switched on, the layers without rope have one."""
    window = 0
    if read.flag("use_sliding_window") and read.get("sliding_window") is not None:
        window = read.size("sliding_window")
    default = (_WINDOWS[i in without_rope(read, "no_rope_layers")] for i in range(read.size("num_hidden_layers")))
    types = read.per_layer(key, _WINDOWS)
    if types is not None and "sliding_attention" in types and not window:
        raise UserError(f"{read.where}: {key} has sliding_attention; set use_sliding_window and sliding_window")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types or default)


def without_rope(read: Reader, key: str) -> tuple[int, ...]:
    """SmolLM3's: the layers with 0 in the list, or every so many-th one."""
    flags = read.per_layer(key, (0, 1))
    if flags is None:
        every = read.size("no_rope_layer_interval")
        flags = tuple(int((i + 1) % every > 0) for i in range(read.size("num_hidden_layers")))
    return tuple(i for i, has_rope in enumerate(flags) if not has_rope)


def gemma3_ropes(read: Reader, key: str) -> tuple[Rope, Rope | None]:
    """(the rope of full attention, that of windows, or None where it is the same)."""
    return _full_and_local(read, {"full_attention": key, "sliding_attention": "rope_local_base_freq"})


def olmo3_ropes(read: Reader, key: str) -> tuple[Rope, Rope | None]:
    """As `gemma3_ropes`, by one theta, which transformers 5 takes for one of them only where it lies outside."""
    theta = read.config.get(key)
    is_inside = all(given.get(key) is not None for given in nested_settings(read, _WINDOWS).values())
    if theta is not None and theta != OLMO3_THETA and not is_inside:
        raise UserError(
            f"{read.where}: {key} {theta!r} is read differently by transformers 4 and 5; "
            "give both layer types' rope_theta in rope_parameters"
        )
    return _full_and_local(read, {"full_attention": key, "sliding_attention": key})


def _full_and_local(read: Reader, thetas: dict[str, str]) -> tuple[Rope, Rope | None]:
    ropes = ropes_from_hf(read, head_dim(read, "head_dim"), thetas)
    full, local = ropes["full_attention"], ropes["sliding_attention"]
    return full, None if local == full else local


def phi3_rope(read: Reader, key: str) -> Rope:
    """Plain or longrope, under three names, of a part of the head."""
    given = read.config.get("rope_scaling") or read.config.get("rope_parameters") or {}
    fraction = given.get("partial_rotary_factor") if isinstance(given, Mapping) else None
    name = "partial_rotary_factor"
    fraction = positive_number(read.get(name) if fraction is None else fraction, read.where, name)
    if fraction > 1 or int(head_dim(read, "head_dim") * fraction) % 2:
        raise UserError(f"{read.where}: {name} {fraction} must turn an even number of a head's numbers, and not more")
    kinds = {"default": "default"} | dict.fromkeys(("longrope", "su", "yarn"), "longrope")
    return rope_from_hf(read, head_dim(read, "head_dim"), kinds, fraction)


# Groups of keys.

TRAINING = "it counts in training from scratch only"
_OUTPUT = "what transformers' forward returns beside the logits"
COMMON: dict[str, Field] = {
    "model_type": Unused("apart from choosing this architecture"),
    "architectures": Unused("apart from choosing this architecture, where there is no model_type"),
    "is_encoder_decoder": Only((False, None), "there is no encoder"),
    "add_cross_attention": Only((False, None), "there is no encoder to attend to"),
    "is_causal": Only((True,), "tokens see earlier tokens only"),
    "per_layer_config": Only((None, {}), "all layers have the settings of the model"),
    "rope_interleaved": Only((False, None), "halves of a head are paired, not neighbours"),
    "quantization_config": Only((None, {}), "its weights are read by a GGUF file only"),
    "initializer_range": Unused(TRAINING),
    "attention_dropout": Unused(TRAINING),
    "use_cache": Unused("sva decides where keys and values are kept"),
    "chunk_size_feed_forward": Unused("the same products in pieces"),
    "pretraining_tp": Unused("the same products in pieces"),
    "output_attentions": Unused(_OUTPUT),
    "output_hidden_states": Unused(_OUTPUT),
    "return_dict": Unused(_OUTPUT),
    "id2label": Unused("names for a classifier"),
    "label2id": Unused("names for a classifier"),
    "num_labels": Unused("counts the names for a classifier"),
    "problem_type": Unused("chooses a classifier's loss"),
    "dtype": Unused("the stored weights have a dtype of their own, `sva.load` takes the one to compute in"),
    "torch_dtype": Unused("transformers 4's name of dtype"),
    "transformers_version": Unused("tells who wrote the file"),
    "_name_or_path": Unused("tells where the model came from"),
    "name_or_path": Unused("tells where the model came from"),
    "_commit_hash": Unused("tells where the model came from"),
    "_attn_implementation_autoset": Unused("chooses a kernel"),
    "attn_implementation": Unused("chooses a kernel"),
    "experts_implementation": Unused("chooses a kernel"),
    "is_llama_config": Unused("a note of its maker"),
    "transformers.js_config": Unused("for another library"),
    "unsloth_version": Unused("tells who wrote the file"),
    "unsloth_fixed": Unused("tells who wrote the file"),
    "auto_map": Unused("names Python code beside the weights, which is not run"),
}


def sizes(**defaults: Any) -> dict[str, Field]:
    """The keys that every architecture has, with other defaults where they are given."""
    fields: dict[str, Field] = {
        "vocab_size": Sets(("vocab_size",), REQUIRED, Reader.size),
        "hidden_size": Sets(("hidden_size",), REQUIRED, Reader.size),
        "intermediate_size": Sets(("intermediate_size",), REQUIRED, Reader.size),
        "num_hidden_layers": Sets(("num_layers",), REQUIRED, Reader.size),
        "num_attention_heads": Sets(("num_heads",), REQUIRED, Reader.size),
        "num_key_value_heads": Sets(("num_kv_heads",), None, _kv_heads),
        "head_dim": Sets(("head_dim",), None, head_dim),
        "hidden_act": Sets(("hidden_act",), "silu", activation),
        "max_position_embeddings": Sets(("max_position_embeddings",), 2048, Reader.size),
        "rms_norm_eps": Sets(("rms_norm_eps",), 1e-6, Reader.number),
        "tie_word_embeddings": Sets(("tie_word_embeddings",), False, Reader.flag),
        "bos_token_id": Sets(("bos_token_id",), 1, Reader.token),
        "eos_token_id": Sets(("eos_token_ids",), 2, Reader.tokens),
        "pad_token_id": Sets(("pad_token_id",), None, Reader.token),
    }
    changed: dict[str, Field] = {key: fields[key]._replace(default=value) for key, value in defaults.items()}  # pyright: ignore[reportCallIssue]
    return fields | changed


def rope_keys(theta: float = DEFAULT_ROPE_THETA) -> dict[str, Field]:
    """The keys of one rope for all layers."""
    return {
        "rope_theta": Sets(("rope",), theta, _rope),
        "rope_parameters": Sets(("rope",), None, None),
        "rope_scaling": Sets(("rope",), None, None),
        "original_max_position_embeddings": Sets(("rope",), None, None),
        "partial_rotary_factor": Only((1, 1.0, None), "whole heads are turned"),
    }


ATTENTION_BIAS: dict[str, Field] = {
    "attention_bias": Sets(("attention_bias", "attention_output_bias"), False, two_flags)
}
MLP_BIAS: dict[str, Field] = {"mlp_bias": Sets(("mlp_bias",), False, Reader.flag)}
NO_BIAS = Unused("transformers' class has none, whatever the config says")
QWEN_WINDOWS: dict[str, Field] = {
    "layer_types": Sets(("windows",), None, _windows_from_a_layer_on),
    "use_sliding_window": Sets(("windows",), False, None),
    "sliding_window": Sets(("windows",), 4096, None),
    "max_window_layers": Sets(("windows",), 28, None),
}
