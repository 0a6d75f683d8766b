"""Cosines and sines of rotary positions, for each kind of layer that a model has."""

import jax
import jax.numpy as jnp
import numpy as np

from sva.models.config import ModelConfig
from sva.models.rope import Rope, inverse_frequencies, rotated_width


def rope_numbers(cfg: ModelConfig) -> jax.Array | None:
    """[L] int32, which of the model's ropes each layer takes; None where there is one for all."""
    kinds = _kinds(cfg)
    return None if len(kinds) == 1 else jnp.asarray([kinds.index(rope) for rope in cfg.layer_ropes], jnp.int32)


def rotary(
    cfg: ModelConfig, positions: jax.Array, slots: int, is_cached: bool, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine, each [B, T, 1, 2, width / 2], or [kinds, ...] where layers differ; half of the sines negative.

    Args:
      cfg: the model.
      positions: [B, T] int32.
      slots: how many tokens these tokens attend to at most, themselves among them.
      is_cached: whether there are keys of earlier tokens among them, turned when those were read. No row is then longer
        than `ModelConfig.decoding_length`, which callers check: here slots are known, not how many of them a row fills.
      dtype: of the result.
    """
    each = [_rotary(rope, cfg.head_dim, positions, slots, is_cached, dtype) for rope in _kinds(cfg)]
    if len(each) == 1:
        return each[0]
    cos, sin = (jnp.stack(parts) for parts in zip(*each, strict=True))
    return cos, sin


def _kinds(cfg: ModelConfig) -> list[Rope]:
    """The different ropes of a model, in the order of its layers."""
    return list(dict.fromkeys(cfg.layer_ropes))


def _rotary(
    rope: Rope, head_dim: int, positions: jax.Array, slots: int, is_cached: bool, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """See `rotary`."""
    freqs = jnp.asarray(inverse_frequencies(rope, head_dim))[None]
    if rope.follows_length and not is_cached and slots > rope.original_max_position_embeddings:
        freqs = _long_frequencies(rope, head_dim, jnp.max(positions, axis=1) + 1, freqs)
    angles = positions[:, :, None, None, None].astype(jnp.float32) * freqs[:, None, None, None, :]
    cos, sin = (jnp.asarray(rope.attention_factor * f(angles), dtype) for f in (jnp.cos, jnp.sin))
    return jnp.concatenate([cos, cos], axis=3), jnp.concatenate([-sin, sin], axis=3)


def _long_frequencies(rope: Rope, head_dim: int, lengths: jax.Array, short: jax.Array) -> jax.Array:
    """[B, width / 2] frequencies of rows of these lengths [B], `short` [1, width / 2] up to the original one.

    transformers takes the longest row's length for all rows of a batch; here each row is as it is alone.
    """
    original, width = rope.original_max_position_embeddings, rotated_width(rope, head_dim)
    exponent = np.arange(0, width, 2, dtype=np.float32)[None, :] / np.float32(width)
    if rope.kind == "longrope":
        long = np.float32(rope.theta) ** -exponent / np.asarray(rope.long_factors, np.float32)
        return jnp.where(lengths[:, None] > original, long, short)
    ratio = jnp.maximum(lengths, original).astype(jnp.float32)[:, None] / original
    theta = rope.theta * (rope.factor * ratio - (rope.factor - 1)) ** (width / (width - 2))
    return theta**-exponent
