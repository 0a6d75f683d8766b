"""The shape of a Llama-family decoder, read from and written to a Hugging Face `config.json`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sva.models.moe_config import MOE_DEFAULTS, Moe, moe_from_hf, moe_to_hf
from sva.models.rope import DEFAULT_ROPE_THETA, Rope, positive_number, rope_from_hf, rope_to_hf
from sva.utils.errors import UserError

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "olmoe")

# What an absent key means, per model type: the defaults of transformers' own config classes. They are kept
# here because importing those classes imports torch wherever it is installed (5 s); a test holds them equal.
_SHARED_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "head_dim": None,
}
_QWEN_DEFAULTS: dict[str, Any] = _SHARED_DEFAULTS | {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _SHARED_DEFAULTS
    | {
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": _SHARED_DEFAULTS
    | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN_DEFAULTS,
    "qwen3": _QWEN_DEFAULTS | {"attention_bias": False, "head_dim": 128},
    "mixtral": _SHARED_DEFAULTS
    | MOE_DEFAULTS["mixtral"]
    | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen3_moe": {key: value for key, value in _QWEN_DEFAULTS.items() if key not in ("max_window_layers", "layer_types")}
    | MOE_DEFAULTS["qwen3_moe"]
    | {"num_key_value_heads": 4, "attention_bias": False},
    "olmoe": _SHARED_DEFAULTS
    | MOE_DEFAULTS["olmoe"]
    | {
        "num_key_value_heads": None,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": 50279,
        "pad_token_id": 1,
    },
}
_THETAS = {"mixtral": 1e6}  # where it is not 10,000

_ACTIVATIONS = {
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
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_CLASS_PREFIXES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
    "olmoe": "Olmoe",
}


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
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    hidden_act: str
    windows: tuple[int, ...]
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    qk_norm_over_heads: bool = False  # q and k are normalised over all heads together, before they are split
    moe: Moe | None = None


def from_hf(config: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The model a parsed `config.json` describes, in transformers 4's or 5's spelling of the rope settings.

    Absent keys mean what transformers' config class of that model type says, except the five sizes that make
    the model (vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads): without
    them transformers would build a 7B model, here they are an error. `where` names the file in messages.

    Raises:
      UserError: an architecture, rope type, activation or quantisation that is not supported, a missing or
        impossible value.
    """
    kind = _model_type(config, where)
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, Mapping) else method
        raise UserError(
            f"{where}: the weights are quantised ({method}), which sva does not read;"
            " use the unquantised checkpoint or a GGUF file"
        )
    read = _Reader(config, DEFAULTS[kind], where)

    heads, kv_heads, head_dim = _heads(kind, read)
    act = read.get("hidden_act")
    if act not in _ACTIVATIONS:
        raise UserError(f"{where}: unsupported hidden_act {act!r}; supported: {', '.join(_ACTIVATIONS)}")
    attention_bias = kind == "qwen2" or ("attention_bias" in DEFAULTS[kind] and read.flag("attention_bias"))
    num_layers = read.size("num_hidden_layers")
    max_positions = read.size("max_position_embeddings")
    eos = read.get("eos_token_id")
    return ModelConfig(
        architecture=kind,
        vocab_size=read.size("vocab_size"),
        hidden_size=read.size("hidden_size"),
        intermediate_size=read.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        rms_norm_eps=read.number("rms_norm_eps"),
        rope=rope_from_hf(config, head_dim, max_positions, where, _THETAS.get(kind, DEFAULT_ROPE_THETA)),
        tie_word_embeddings=read.flag("tie_word_embeddings"),
        attention_bias=attention_bias,
        attention_output_bias=attention_bias and kind != "qwen2",
        mlp_bias=kind == "llama" and read.flag("mlp_bias"),
        qk_norm=kind in ("qwen3", "qwen3_moe", "olmoe"),
        hidden_act=_ACTIVATIONS[act],
        windows=_windows(kind, num_layers, read),
        bos_token_id=read.token("bos_token_id", read.get("bos_token_id")),
        eos_token_ids=token_ids(eos, f"{where}: eos_token_id"),
        pad_token_id=read.token("pad_token_id", read.get("pad_token_id")),
        qk_norm_over_heads=kind == "olmoe",
        moe=moe_from_hf(kind, config, read, num_layers),
    )


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """A `config.json` from which transformers 4 and 5, and `from_hf`, build this model again.

    The rope settings take transformers 4's spelling, which both read. Per-frequency factors are written as
    "longrope" with the same short and long factors and an attention factor of 1, which is exactly them.

    Raises:
      UserError: windows or biases that no config of this architecture can express.
    """
    kind = cfg.architecture
    raw: dict[str, Any] = {
        "architectures": [f"{_CLASS_PREFIXES[kind]}ForCausalLM"],
        "model_type": kind,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": _ACTIVATION_NAMES[cfg.hidden_act],
        "max_position_embeddings": cfg.max_position_embeddings,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_theta": cfg.rope.theta,
        "rope_scaling": rope_to_hf(cfg.rope),
        "tie_word_embeddings": cfg.tie_word_embeddings,
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": cfg.eos_token_ids[0] if len(cfg.eos_token_ids) == 1 else list(cfg.eos_token_ids) or None,
        "pad_token_id": cfg.pad_token_id,
    }
    if "attention_bias" in DEFAULTS[kind]:
        raw["attention_bias"] = cfg.attention_bias
    if kind == "llama":
        raw["mlp_bias"] = cfg.mlp_bias
    sizes = {w for w in cfg.windows if w}
    window = next(iter(sizes), None)
    if kind in ("mistral", "mixtral"):
        raw["sliding_window"] = window
    elif kind == "qwen3_moe":
        raw |= {"use_sliding_window": bool(sizes), "sliding_window": window}
    elif kind in ("qwen2", "qwen3"):
        raw["use_sliding_window"] = bool(sizes)
        raw["sliding_window"] = window
        raw["layer_types"] = ["sliding_attention" if w else "full_attention" for w in cfg.windows]
        # transformers 4 before layer_types: the windows start at a layer and go on to the last
        raw["max_window_layers"] = next((i for i, w in enumerate(cfg.windows) if w), cfg.num_layers)
    if cfg.moe is not None:
        raw |= moe_to_hf(kind, cfg.moe)
    again = from_hf(raw)
    if again != cfg:
        odd = [f for f in cfg.__dataclass_fields__ if getattr(again, f) != getattr(cfg, f)]
        raise UserError(f"a Hugging Face config of type {kind} cannot express this model's {', '.join(odd)}")
    return raw


def token_ids(value: Any, name: str) -> tuple[int, ...]:
    """The ids in a config's token entry: null, one id or a list; negative ones (old Llama 2) are none."""
    items = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in items):
        raise UserError(f"{name} must be null, a token id or a list of token ids, not {value!r}")
    return tuple(dict.fromkeys(i for i in items if i >= 0))


class _Reader:
    """Typed look-ups in a config with its defaults; every complaint names the file and the key."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any], where: str):
        self.config, self.defaults, self.where = config, defaults, where

    def get(self, key: str) -> Any:
        if key not in self.config and key not in self.defaults:
            raise UserError(f"{self.where}: the required key {key!r} is missing")
        return self.config.get(key, self.defaults.get(key))

    def size(self, key: str) -> int:
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise UserError(f"{self.where}: {key} must be a positive whole number, not {value!r}")
        return value

    def number(self, key: str) -> float:
        return positive_number(self.get(key), self.where, key)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {key} must be true or false, not {value!r}")
        return value

    def token(self, key: str, value: Any) -> int | None:
        ids = token_ids(value, f"{self.where}: {key}")
        return ids[0] if ids else None


def _model_type(config: Mapping[str, Any], where: str) -> str:
    """The model type, from `model_type` or, in old configs without one, from the class name."""
    listed = config.get("architectures") or []
    listed = [str(c) for c in listed] if isinstance(listed, list | tuple) else [str(listed)]
    known = {f"{_CLASS_PREFIXES[a]}{end}".lower(): a for a in ARCHITECTURES for end in ("ForCausalLM", "Model")}
    kind = config.get("model_type") or next((known[c.lower()] for c in listed if c.lower() in known), None)
    supported = f"supported: {', '.join(ARCHITECTURES)}"
    if kind not in ARCHITECTURES:
        named = kind or ", ".join(listed) or "(no model_type)"
        raise UserError(f"{where}: unsupported architecture {named}; {supported}")
    if listed and not any(known.get(c.lower()) == kind for c in listed):
        raise UserError(
            f"{where}: unsupported architecture {', '.join(listed)}; supported: causal language models,"
            f" here {_CLASS_PREFIXES[kind]}ForCausalLM"
        )
    return kind


def _heads(kind: str, read: _Reader) -> tuple[int, int, int]:
    """(query heads, key heads, their width)."""
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    kv_heads = heads if read.get("num_key_value_heads") is None else read.size("num_key_value_heads")
    if heads % kv_heads:
        raise UserError(
            f"{read.where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if read.get("head_dim") is not None:
        head_dim = read.size("head_dim")
    elif hidden % heads == 0:
        head_dim = hidden // heads
    else:
        raise UserError(
            f"{read.where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}; give head_dim"
        )
    if kind == "olmoe" and head_dim * heads != hidden:
        raise UserError(f"{read.where}: head_dim {head_dim} times {heads} heads must be hidden_size {hidden} in OLMoE")
    if head_dim % 2:
        raise UserError(f"{read.where}: head_dim {head_dim} is odd; rotary positions need an even one")
    return heads, kv_heads, head_dim


def _windows(kind: str, num_layers: int, read: _Reader) -> tuple[int, ...]:
    """Sliding window of each layer, by the rules of transformers' config classes."""
    if kind in ("llama", "olmoe"):
        return (0,) * num_layers
    if kind in ("mistral", "mixtral"):
        window = 0 if read.get("sliding_window") is None else read.size("sliding_window")
        return (window,) * num_layers
    window = 0
    if read.flag("use_sliding_window") and read.get("sliding_window") is not None:
        window = read.size("sliding_window")
    if kind == "qwen3_moe":
        return (window,) * num_layers
    types = read.get("layer_types")
    if types is None:
        first = read.get("max_window_layers")
        if isinstance(first, bool) or not isinstance(first, int):
            raise UserError(f"{read.where}: max_window_layers must be a whole number, not {first!r}")
        return tuple(window if i >= first else 0 for i in range(num_layers))
    allowed = ("full_attention", "sliding_attention")
    if not isinstance(types, Sequence) or len(types) != num_layers or any(t not in allowed for t in types):
        raise UserError(f"{read.where}: layer_types must hold {num_layers} entries, each one of {', '.join(allowed)}")
    if "sliding_attention" in types and not window:
        raise UserError(f"{read.where}: layer_types has sliding_attention; set use_sliding_window and sliding_window")
    return tuple(window if t == "sliding_attention" else 0 for t in types)
