"""Tiny random Hugging Face and GGUF checkpoints of every supported kind, made with transformers and torch."""

from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from sva.models.checkpoint_formats import open_checkpoint
from sva.models.config import from_hf
from sva.models.hub import KNOWN
from sva.models.load import load_params
from sva.models.transformer import Transformer

VOCAB = 128
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", {"head_dim": 24, "tie_word_embeddings": True}),
    "llama3": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": True}),
}
_FACTORS = [1.0 + 0.5 * i for i in range(8)]
_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2Config", {"sliding_window": 6, "query_pre_attn_scalar": 24, "head_dim": 24,
                                "attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24,
                                    "head_dim": 24, "tie_word_embeddings": True, "rope_parameters": {
                                        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
                                        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}}),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2, "attention_bias": True, "use_sliding_window": True,
                                  "sliding_window": 7}),
    "olmo2": ("Olmo2Config", {"attention_bias": True}),
    "olmo3": ("Olmo3Config", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention",
                                                                   "sliding_attention"],
                              "rope_parameters": {
                                  "full_attention": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 500.0,
                                                     "original_max_position_embeddings": 32},
                                  "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}),
    "phi3": ("Phi3Config", {"sliding_window": 9}),
    "phi4": ("Phi3Config", {"tie_word_embeddings": True, "original_max_position_embeddings": 24, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.75,
        "short_factor": _FACTORS[:6], "long_factor": _FACTORS[2:]}}),
    "granite": ("GraniteConfig", {"embedding_multiplier": 3.0, "residual_multiplier": 0.6, "logits_scaling": 2.0,
                                  "attention_multiplier": 0.1, "mlp_bias": True}),
    "linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}}),
    "dynamic": ("LlamaConfig", {"max_position_embeddings": 24, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}}),
    "yarn": ("LlamaConfig", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0,
                                                 "original_max_position_embeddings": 64, "beta_fast": 8.0}}),
    "longrope": ("LlamaConfig", {"rope_parameters": {
        "rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 24,
        "short_factor": _FACTORS, "long_factor": _FACTORS[::-1]}}),
}  # fmt: skip
_CONFIGS |= _MORE
MORE = tuple(_MORE)
"""The other architectures, and Llama with the rope types; with windows, two ropes, layers without, long rows."""
KINDS = ("llama", "mistral", "qwen2", "qwen3", "llama3")
"""llama (untied, grouped queries), mistral (window 6), qwen2 (biases; window 7 in the last layer), qwen3
(tied, head_dim 24 where hidden / heads is 16), llama3 (tied, scaled rope of original length 32)."""


MOE_KINDS = ("mixtral", "qwen3_moe", "olmoe")
"""mixtral (window 6, 2 of 5 modules), qwen3_moe (3 of 6 modules, shares that add to 1, the first layer dense), olmoe
(2 of 7 modules, shares among all, q and k normalised over all heads)."""
_CONFIGS |= {
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "head_dim": 24,
        },
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 7, "num_experts_per_tok": 2, "attention_bias": True}),
}


def config(kind: str, **changes: Any) -> transformers.PreTrainedConfig:
    """The transformers config of a kind, with some settings changed."""
    name, settings = _CONFIGS[kind]
    return getattr(transformers, name)(**(_SIZES | settings | changes))


def make(
    kind: str,
    directory: Path | str,
    *,
    shards: bool = False,
    seed: int = 0,
    dtype: str = "float32",
    **changes: Any,
) -> torch.nn.Module:
    """The torch model of a random checkpoint saved in `directory`; in eval mode, eager attention, float32.

    Norm weights and biases are random too, and weights large enough that logits span several units, so that a
    mistake anywhere shows. `shards` splits the file in about ten; `dtype` is the one stored (the model
    returned holds the rounded values in float32).
    """
    torch.manual_seed(seed)
    cfg = config(kind, **changes)
    cfg._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(cfg)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(*(-0.5, 0.5) if kind.startswith("gemma") else (0.5, 1.5))
            elif name.endswith("bias"):
                weight.normal_(0, 0.5)
            elif "embed" in name or "lm_head" in name:
                weight.normal_(0, 0.3)
            else:
                weight.normal_(0, 1.2 / weight.shape[-1] ** 0.5)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size="50KB" if shards else "1GB")
    return model.to(torch.float32).eval()


def logits(model: torch.nn.Module, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
    """[B, T, V] float32 logits of the torch model; positions count attended tokens, as generate() does."""
    mask = torch.tensor(np.asarray(attention_mask))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(torch.tensor(np.asarray(input_ids)), attention_mask=mask, position_ids=positions, use_cache=False)
    return out.logits.numpy()


_GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(
    model: torch.nn.Module,
    path: Path | str,
    *,
    packed: str = "F32",
    metadata: dict[str, Any] | None = None,
    each: int = 0,
) -> None:
    """Writes a torch model as llama.cpp's converter would: its names, Llama's q and k rows in rotary pairs.

    Matrices are stored as `packed`; `metadata` adds settings or, with the value None, leaves one out (keys
    without the architecture in front). With `each`, it is split into files of so many tensors, named as
    llama.cpp names them.
    """
    cfg = from_hf(model.config.to_dict())
    kind = {"mistral": "llama", "gemma3_text": "gemma3"}.get(cfg.architecture, cfg.architecture)
    names = _GGUF_NAMES | (_GEMMA_NAMES if kind.startswith("gemma") else {})
    settings: dict[str, Any] = {
        "block_count": cfg.num_layers,
        "context_length": cfg.max_position_embeddings,
        "embedding_length": cfg.hidden_size,
        "feed_forward_length": cfg.intermediate_size,
        "attention.head_count": cfg.num_heads,
        "attention.head_count_kv": cfg.num_kv_heads,
        "attention.key_length": cfg.head_dim,
        "attention.value_length": cfg.head_dim,
        "attention.layer_norm_rms_epsilon": cfg.rms_norm_eps,
        "rope.dimension_count": cfg.head_dim,
        "rope.freq_base": cfg.rope.theta,
    }
    writer = gguf.GGUFWriter(path, kind, split_max_tensors=each)
    for key, value in (settings | (metadata or {})).items():
        if isinstance(value, float):
            writer.add_float32(f"{kind}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{kind}.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"{kind}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{kind}.{key}", value)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if cfg.rope.kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(model))
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        parts = name.split(".")
        heads = {"q_proj": cfg.num_heads, "k_proj": cfg.num_kv_heads}.get(parts[-2])
        if kind == "llama" and heads:
            halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
            weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
        if kind.startswith("gemma") and "norm" in parts[-2]:
            weight = weight + 1
        layer = f"blk.{parts[2]}." if parts[1] == "layers" else ""
        stored = gguf.GGMLQuantizationType[packed if weight.ndim == 2 else "F32"]
        data = weight if stored == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(weight, stored)
        writer.add_tensor(f"{layer}{names[parts[-2]]}.{parts[-1]}", data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _llama3_factors(model: torch.nn.Module) -> np.ndarray:
    """By how much the model's rotary frequencies are below theta's."""
    rope = model.config.rope_parameters
    dim = model.config.head_dim
    return (rope["rope_theta"] ** (-np.arange(0, dim, 2) / dim) / model.model.rotary_emb.inv_freq.numpy()).astype("f4")


def packaged(name: str, megabytes: int) -> Path:
    """A small real model where it was fetched before; skips the test where it was not."""
    path = KNOWN[name].packaged.file()
    if not path.is_file():
        pytest.skip(f"{name} is not in the cache; `sva fetch {name}` brings it ({megabytes} MB)")
    return path


def smollm2() -> Path:
    """SmolLM2 where it was fetched before; skips the test where it was not."""
    return packaged("smollm2-135m-instruct-q4_1", 93)


def gemma3() -> Path:
    """gemma-3-270m where it was fetched before; skips the test where it was not."""
    return packaged("gemma-3-270m-q4_k_m", 238)


def loader(tmp_path_factory):
    """kind, scan -> (transformers' model, model, params, fingerprint), each checkpoint made once."""

    @cache
    def checkpoint(kind):
        directory = tmp_path_factory.mktemp(kind)
        return make(kind, directory), open_checkpoint(directory)

    @cache
    def load(kind, scan=False):
        torch_model, found = checkpoint(kind)
        model = Transformer(found.config, scan_layers=scan)
        return torch_model, model, *load_params(found, model, progress=False)

    return load
