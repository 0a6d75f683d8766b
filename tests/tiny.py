"""Tiny random Hugging Face and GGUF checkpoints of every supported kind, made with transformers and torch."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

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
KINDS = tuple(_CONFIGS)
"""llama (untied, grouped queries), mistral (window 6), qwen2 (biases; window 7 in the last layer), qwen3
(tied, head_dim 24 where hidden / heads is 16), llama3 (tied, scaled rope of original length 32)."""


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
                weight.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                weight.normal_(0, 0.5)
            elif "embed" in name or "lm_head" in name:
                weight.normal_(0, 0.3)
            else:
                weight.normal_(0, 1.2 / weight.shape[1] ** 0.5)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size="50KB" if shards else "1GB")
    return model.to(torch.float32).eval()


def logits(model: torch.nn.Module, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
    """[B, T, V] float32 logits of the torch model; positions count attended tokens, as generate() does."""
    mask = torch.tensor(np.asarray(attention_mask))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(
            torch.tensor(np.asarray(input_ids)), attention_mask=mask, position_ids=positions, use_cache=False
        )
    return out.logits.numpy()
