"""The shape of a decoder, read from and written to a Hugging Face `config.json` by the table of architectures."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sva.models.architectures import TABLE
from sva.models.fields import Reader, Sets
from sva.models.moe_config import WRITERS as MOE_WRITERS
from sva.models.moe_config import Moe
from sva.models.rope import NO_ROPE, Rope, longrope_attention_factor, rope_to_hf
from sva.utils.errors import UserError

_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the network and its weights' shapes; hashable, so static under jit.

    `attention_bias` speaks of the q, k and v projections, `attention_output_bias` of the o projection.
    `windows` has one entry per layer: token i attends to the tokens j with i - window < j <= i; 0 means to
    all j <= i. `hidden_act` is "silu", "gelu" (exact) or "gelu_tanh".
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    hidden_act: str
    windows: tuple[int, ...]
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""  # "head": each head of q and k is normalised by itself; "full": all of them as one vector
    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    """Names of the norms before and after attention, before and after the mlp; "" for none."""
    norm_plus_one: bool = False  # norms multiply by 1 + weight
    fused: bool = False  # q, k and v are one matrix, gate and up are one
    local_rope: Rope | None = None  # of the layers with a window, if another than `rope`
    no_rope_layers: tuple[int, ...] = ()
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what attention and the mlp add
    logits_divisor: float = 1.0
    attention_scale: float | None = None  # of query-key products; None: head_dim ** -0.5
    attention_softcap: float | None = None  # scores become cap * tanh(score / cap)
    logit_softcap: float | None = None  # the same of the logits
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    moe: Moe | None = None  # which layers have a sparse mlp, and of what

    @property
    def decoding_length(self) -> int:
        """Tokens of the longest row that a cache can hold: the context, or less where a rope turns keys anew."""
        ropes = [rope for rope in (self.rope, self.local_rope) if rope is not None and rope.follows_length]
        return min([self.max_position_embeddings, *(rope.original_max_position_embeddings for rope in ropes)])

    @property
    def layer_ropes(self) -> tuple[Rope, ...]:
        """Each layer's rotary positions."""

        def one(layer: int) -> Rope:
            if layer in self.no_rope_layers:
                return NO_ROPE
            return self.local_rope if self.local_rope and self.windows[layer] else self.rope

        return tuple(one(layer) for layer in range(self.num_layers))


def from_hf(config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The model a parsed `config.json` describes, in transformers 4's or 5's spelling of the rope settings.

    Absent keys mean what transformers' config class of that model type says, except the five sizes that make
    the model (vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads): without
    them transformers would build a 7B model, here they are an error. `where` names the file in messages.

    Raises:
      UserError: an architecture, rope type, activation or quantisation that is not supported, a missing or
        impossible value, a value that the network does not implement.
    """
    kind = _model_type(config, where)
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, Mapping) else method
        raise UserError(
            f"{where}: the weights are quantised ({method}), which sva does not read;"
            " use the unquantised checkpoint or a GGUF file"
        )
    architecture = TABLE[kind]
    read = Reader(config, architecture.fields, where)
    values: dict[str, Any] = {"architecture": kind, "windows": (0,) * read.size("num_hidden_layers")}
    values |= architecture.fixed
    for key, field in architecture.fields.items():
        if isinstance(field, Sets) and field.read is not None:
            found = field.read(read, key)
            values |= zip(field.sets, found if len(field.sets) > 1 else [found], strict=True)
    return ModelConfig(**values)


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys of a config that its architecture's class in transformers does not read, so neither does sva."""
    return [key for key in config if key not in TABLE[_model_type(config, "config.json")].fields]


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """A `config.json` from which transformers 4 and 5, and `from_hf`, build this model again.

    The rope settings take transformers 4's spelling, which both read. Per-frequency factors are written as
    "longrope" with the same short and long factors and an attention factor of 1, which is exactly them. A Phi-3 model
    with an attention factor of its own is for transformers 5 only: 4 has no place for it.

    Raises:
      UserError: windows, biases or ropes that no config of this architecture can express.
    """
    kind = cfg.architecture
    raw: dict[str, Any] = {"architectures": [TABLE[kind].classes[0]], "model_type": kind}
    for key, field in TABLE[kind].fields.items():
        if isinstance(field, Sets) and key in _WRITERS:
            value = _WRITERS[key](cfg)
            raw |= {} if value is ... else {key: value}
    again = from_hf(raw)
    if again != cfg:
        odd = [f for f in cfg.__dataclass_fields__ if getattr(again, f) != getattr(cfg, f)]
        raise UserError(f"a Hugging Face config of type {kind} cannot express this model's {', '.join(odd)}")
    return raw


def _window(cfg: ModelConfig) -> int | None:
    return next((window for window in cfg.windows if window), None)


def _rope_scaling(cfg: ModelConfig) -> dict[str, Any] | None:
    scaling, length = rope_to_hf(cfg.rope), cfg.rope.original_max_position_embeddings
    if cfg.architecture != "phi3" or cfg.rope.kind != "longrope" or scaling is None:
        return scaling
    if cfg.rope.attention_factor != longrope_attention_factor(cfg.max_position_embeddings / length, length):
        return scaling
    # transformers 4's Phi3Config takes exactly these three; the rest follows from the two lengths.
    return {"type": "longrope", "short_factor": scaling["short_factor"], "long_factor": scaling["long_factor"]}


def _original_length(cfg: ModelConfig) -> Any:
    """What Phi-3 looks for outside the rope settings first."""
    is_read = cfg.architecture == "phi3" and cfg.rope.kind == "longrope"
    return cfg.rope.original_max_position_embeddings if is_read else ...


# What each key of a config says of a model, ... for nothing; an architecture writes those that it reads.
_WRITERS: dict[str, Callable[[ModelConfig], Any]] = {
    "vocab_size": lambda cfg: cfg.vocab_size,
    "hidden_size": lambda cfg: cfg.hidden_size,
    "intermediate_size": lambda cfg: cfg.intermediate_size,
    "num_hidden_layers": lambda cfg: cfg.num_layers,
    "num_attention_heads": lambda cfg: cfg.num_heads,
    "num_key_value_heads": lambda cfg: cfg.num_kv_heads,
    "head_dim": lambda cfg: cfg.head_dim,
    "hidden_act": lambda cfg: _ACTIVATION_NAMES[cfg.hidden_act],
    "hidden_activation": lambda cfg: _ACTIVATION_NAMES[cfg.hidden_act],
    "max_position_embeddings": lambda cfg: cfg.max_position_embeddings,
    "rms_norm_eps": lambda cfg: cfg.rms_norm_eps,
    "rope_theta": lambda cfg: cfg.rope.theta,
    "rope_local_base_freq": lambda cfg: (cfg.local_rope or cfg.rope).theta,
    "rope_scaling": _rope_scaling,
    "original_max_position_embeddings": _original_length,
    "partial_rotary_factor": lambda cfg: cfg.rope.fraction,
    "tie_word_embeddings": lambda cfg: cfg.tie_word_embeddings,
    "bos_token_id": lambda cfg: cfg.bos_token_id,
    "eos_token_id": lambda cfg: (
        cfg.eos_token_ids[0] if len(cfg.eos_token_ids) == 1 else list(cfg.eos_token_ids) or None
    ),
    "pad_token_id": lambda cfg: cfg.pad_token_id,
    "attention_bias": lambda cfg: cfg.attention_bias,
    "mlp_bias": lambda cfg: cfg.mlp_bias,
    "no_rope_layers": lambda cfg: [int(layer not in cfg.no_rope_layers) for layer in range(cfg.num_layers)],
    "query_pre_attn_scalar": lambda cfg: round((cfg.attention_scale or cfg.head_dim**-0.5) ** -2),
    "attn_logit_softcapping": lambda cfg: cfg.attention_softcap,
    "final_logit_softcapping": lambda cfg: cfg.logit_softcap,
    "embedding_multiplier": lambda cfg: cfg.embedding_multiplier,
    "residual_multiplier": lambda cfg: cfg.residual_multiplier,
    "attention_multiplier": lambda cfg: cfg.attention_scale,
    "logits_scaling": lambda cfg: cfg.logits_divisor,
    "sliding_window": _window,
    "use_sliding_window": lambda cfg: _window(cfg) is not None,
    "layer_types": lambda cfg: ["sliding_attention" if window else "full_attention" for window in cfg.windows],
    # transformers 4 before layer_types: the windows start at a layer and go on to the last
    "max_window_layers": lambda cfg: next((i for i, window in enumerate(cfg.windows) if window), cfg.num_layers),
} | MOE_WRITERS


def _model_type(config: Mapping[str, Any], where: str) -> str:
    """The model type, from `model_type` or, in old configs without one, from the class name."""
    listed = config.get("architectures") or []
    listed = [str(c) for c in listed] if isinstance(listed, list | tuple) else [str(listed)]
    known = {name.lower(): kind for kind, a in TABLE.items() for name in a.classes}
    kind = config.get("model_type") or next((known[c.lower()] for c in listed if c.lower() in known), None)
    if not isinstance(kind, str) or kind not in TABLE:
        named = kind or ", ".join(listed) or "(no model_type)"
        raise UserError(f"{where}: unsupported architecture {named}; supported: {', '.join(TABLE)}")
    if listed and not any(known.get(c.lower()) == kind for c in listed):
        raise UserError(
            f"{where}: unsupported architecture {', '.join(listed)}; supported: causal language models,"
            f" here {TABLE[kind].classes[0]}"
        )
    return kind
