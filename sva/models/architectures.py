"""The table of architectures: what every key of a `config.json` sets, or that it is refused, or why it has no effect.

An architecture is one entry: its class names, the fields of `ModelConfig` that are its own whatever the config says,
and its keys. `sva.models.config` reads and writes configs by it, docs/models.md is made from it. Keys come in groups
(`sva.models.config_keys`); an architecture adds its own to them.

Defaults are those of transformers' config classes. They are kept here because importing those classes imports torch
wherever it is installed (5 s); a test holds them equal.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sva.models import config_keys as keys
from sva.models.fields import REQUIRED, Field, Only, Reader, Sets, Unused
from sva.models.moe_config import MIXTRAL, OLMOE, QWEN3_MOE


class Architecture(NamedTuple):
    """One model type."""

    prefix: str  # of transformers' class names
    names: str  # the models that users know, for the docs
    fixed: Mapping[str, Any]  # fields of `ModelConfig` that no key sets
    fields: Mapping[str, Field]
    part: str = ""  # what the class without a head has between prefix and "Model"

    @property
    def classes(self) -> tuple[str, str]:
        """Transformers' classes with and without a head."""
        return f"{self.prefix}ForCausalLM", f"{self.prefix}{self.part}Model"

    def defaults(self) -> dict[str, Any]:
        """What each absent key that is read means; the sizes that make a model have no default."""
        read = {key: field.default for key, field in self.fields.items() if isinstance(field, Sets)}
        return {key: default for key, default in read.items() if default is not REQUIRED}


_QWEN = (
    keys.COMMON
    | keys.sizes(num_key_value_heads=32, max_position_embeddings=32768, bos_token_id=None, eos_token_id=None)
    | keys.rope_keys()
    | keys.QWEN_WINDOWS
    | {"mlp_bias": keys.NO_BIAS}
)
_GEMMA: dict[str, Field] = (
    keys.COMMON
    | keys.sizes(num_key_value_heads=4, tie_word_embeddings=True, pad_token_id=0, bos_token_id=2, eos_token_id=1)
    | keys.ATTENTION_BIAS
    | {
        "hidden_size": Sets(("hidden_size", "embedding_multiplier"), REQUIRED, keys.scaled_width),
        "head_dim": Sets(("head_dim",), 256, keys.head_dim),
        "hidden_activation": Sets(("hidden_act",), "gelu_pytorch_tanh", keys.activation),
        "hidden_act": Unused("hidden_activation is read"),
        "query_pre_attn_scalar": Sets(("attention_scale",), 256, keys.scale_of_queries),
        "sliding_window": Sets(("windows",), 4096, None),
        "final_logit_softcapping": Sets(("logit_softcap",), None, Reader.number_or_none),
        "use_bidirectional_attention": Only((None, False), "tokens see earlier tokens only"),
        "cache_implementation": Unused("sva decides where keys and values are kept"),
        "mlp_bias": keys.NO_BIAS,
    }
)
_GEMMA_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_OLMO = (
    keys.COMMON
    | keys.sizes(rms_norm_eps=1e-5, pad_token_id=1, bos_token_id=None, eos_token_id=50279)
    | keys.ATTENTION_BIAS
    | {"mlp_bias": keys.NO_BIAS}
)
_OLMO_FIXED = {"norms": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"), "qk_norm": "full"}

TABLE: dict[str, Architecture] = {
    "llama": Architecture(
        "Llama",
        "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM, SmolLM2",
        {},
        keys.COMMON
        | keys.sizes()
        | keys.rope_keys()
        | keys.ATTENTION_BIAS
        | keys.MLP_BIAS
        | {"sliding_window": Unused("transformers' class has no windows, whatever the config says")},
    ),
    "mistral": Architecture(
        "Mistral",
        "Mistral 7B",
        {},
        keys.COMMON
        | keys.sizes(num_key_value_heads=8, max_position_embeddings=131072)
        | keys.rope_keys()
        | {
            "sliding_window": Sets(("windows",), 4096, keys.same_window),
            "attention_bias": keys.NO_BIAS,
            "mlp_bias": keys.NO_BIAS,
        },
    ),
    "qwen2": Architecture(
        "Qwen2",
        "Qwen2, Qwen2.5",
        {"attention_bias": True},
        _QWEN | {"attention_bias": Unused("q, k and v always have biases")},
    ),
    "qwen3": Architecture(
        "Qwen3",
        "Qwen3, dense",
        {"qk_norm": "head"},
        _QWEN | keys.ATTENTION_BIAS | {"head_dim": Sets(("head_dim",), 128, keys.head_dim)},
    ),
    "gemma2": Architecture(
        "Gemma2",
        "Gemma 2",
        {"norms": _GEMMA_NORMS, "norm_plus_one": True},
        _GEMMA
        | keys.rope_keys()
        | {
            "max_position_embeddings": Sets(("max_position_embeddings",), 8192, Reader.size),
            "layer_types": Sets(("windows",), None, keys.windows_by_type(2)),
            "final_logit_softcapping": Sets(("logit_softcap",), 30.0, Reader.number_or_none),
            "attn_logit_softcapping": Sets(("attention_softcap",), 50.0, Reader.number_or_none),
        },
    ),
    "gemma3_text": Architecture(
        "Gemma3",
        "Gemma 3, text only (270M, 1B, and the text part of others saved alone)",
        {"norms": _GEMMA_NORMS, "norm_plus_one": True, "qk_norm": "head"},
        _GEMMA
        | {
            "max_position_embeddings": Sets(("max_position_embeddings",), 131072, Reader.size),
            "rope_theta": Sets(("rope", "local_rope"), 1000000.0, keys.gemma3_ropes),
            "rope_local_base_freq": Sets(("local_rope",), 10000.0, None),
            "rope_parameters": Sets(("rope", "local_rope"), None, None),
            "rope_scaling": Sets(("rope",), None, None),
            "layer_types": Sets(("windows",), None, keys.windows_by_type(6)),
            "sliding_window_pattern": Sets(("windows",), None, None),
            "_sliding_window_pattern": Unused("layer_types beside it is read"),
            "attn_logit_softcapping": Unused("the attention of transformers' Gemma 3 does not read it"),
        },
        part="Text",
    ),
    "smollm3": Architecture(
        "SmolLM3",
        "SmolLM3",
        {},
        keys.COMMON
        | keys.sizes(
            num_key_value_heads=4,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
            bos_token_id=128000,
            eos_token_id=128001,
            pad_token_id=128004,
        )
        | keys.rope_keys(2000000.0)
        | keys.ATTENTION_BIAS
        | keys.MLP_BIAS
        | {
            "no_rope_layers": Sets(("no_rope_layers",), None, keys.without_rope),
            "no_rope_layer_interval": Sets(("no_rope_layers",), 4, None),
            "layer_types": Sets(("windows",), None, keys.windows_without_rope),
            "use_sliding_window": Sets(("windows",), False, None),
            "sliding_window": Sets(("windows",), None, None),
            "max_window_layers": Unused("layer_types and no_rope_layers say which layers have windows"),
        },
    ),
    "olmo2": Architecture("Olmo2", "OLMo 2", _OLMO_FIXED, _OLMO | keys.rope_keys()),
    "olmo3": Architecture(
        "Olmo3",
        "OLMo 3",
        _OLMO_FIXED,
        _OLMO
        | {
            "rope_theta": Sets(("rope", "local_rope"), keys.OLMO3_THETA, keys.olmo3_ropes),
            "rope_parameters": Sets(("rope", "local_rope"), None, None),
            "rope_scaling": Sets(("rope",), None, None),
            "layer_types": Sets(("windows",), None, keys.windows_by_type(4)),
            "sliding_window": Sets(("windows",), 4096, None),
        },
    ),
    "phi3": Architecture(
        "Phi3",
        "Phi-3, Phi-3.5, Phi-4, dense",
        {"fused": True},
        keys.COMMON
        | keys.sizes(max_position_embeddings=4096, rms_norm_eps=1e-5, eos_token_id=32000, pad_token_id=32000)
        | keys.rope_keys()
        | {
            "rope_theta": Sets(("rope",), 10000.0, keys.phi3_rope),
            "original_max_position_embeddings": Sets(("rope",), 4096, None),
            "partial_rotary_factor": Sets(("rope",), 1.0, None),
            "sliding_window": Sets(("windows",), None, keys.same_window),
            "resid_pdrop": Unused(keys.TRAINING),
            "embd_pdrop": Unused(keys.TRAINING),
            "attention_bias": keys.NO_BIAS,
            "mlp_bias": keys.NO_BIAS,
        },
    ),
    "granite": Architecture(
        "Granite",
        "Granite 3, dense",
        {},
        keys.COMMON
        | keys.sizes()
        | keys.rope_keys()
        | keys.ATTENTION_BIAS
        | keys.MLP_BIAS
        | {
            "embedding_multiplier": Sets(("embedding_multiplier",), 1.0, Reader.number),
            "residual_multiplier": Sets(("residual_multiplier",), 1.0, Reader.number),
            "attention_multiplier": Sets(("attention_scale",), 1.0, Reader.number),
            "logits_scaling": Sets(("logits_divisor",), 1.0, Reader.number),
        },
    ),
    "mixtral": Architecture(
        "Mixtral",
        "Mixtral 8x7B, 8x22B",
        {},
        keys.COMMON
        | keys.sizes(num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5)
        | keys.rope_keys(1e6)
        | {
            "sliding_window": Sets(("windows",), None, keys.same_window),
            "attention_bias": keys.NO_BIAS,
            "mlp_bias": keys.NO_BIAS,
        }
        | MIXTRAL,
    ),
    "qwen3_moe": Architecture(
        "Qwen3Moe",
        "Qwen3, mixtures of experts",
        {"qk_norm": "head"},
        keys.COMMON
        | keys.sizes(num_key_value_heads=4, max_position_embeddings=32768, bos_token_id=None, eos_token_id=None)
        | keys.rope_keys()
        | keys.ATTENTION_BIAS
        | {
            "use_sliding_window": Sets(("windows",), False, keys.same_window_if_used),
            "sliding_window": Sets(("windows",), 4096, None),
            "max_window_layers": Unused("transformers' class has the same window in all layers"),
            "mlp_bias": keys.NO_BIAS,
        }
        | QWEN3_MOE,
    ),
    "olmoe": Architecture(
        "Olmoe",
        "OLMoE",
        {"qk_norm": "full"},
        keys.COMMON
        | keys.sizes(
            max_position_embeddings=4096, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=50279, pad_token_id=1
        )
        | keys.rope_keys()
        | keys.ATTENTION_BIAS
        | {
            "mlp_bias": keys.NO_BIAS,
            "sliding_window": Only((None,), "there are no windows, and only some of transformers' kernels have them"),
        }
        | OLMOE,
    ),
}
