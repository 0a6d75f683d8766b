"""Checks and arrays of a batch of prompts: lengths that fit the context, one key a row, end tokens."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sva.generation.loaded_model import LoadedModel
from sva.generation.sampling import Greedy, Sampling
from sva.models.config import ModelConfig
from sva.models.vocabulary import check_ids
from sva.utils import seeds
from sva.utils.errors import UserError
from sva.utils.padding import batch_bucket, pad_rows


def longest_row(cfg: ModelConfig) -> str:
    """Why rows may have `cfg.decoding_length` tokens, for messages."""
    length = cfg.decoding_length
    if length == cfg.max_position_embeddings:
        return f"the model's context is {length}"
    return f"answers end at {length} tokens, where this model turns all positions of a row anew"


def check_prompts(lengths: np.ndarray, new_tokens: int | np.ndarray, cfg: ModelConfig) -> None:
    """Raises UserError for an empty prompt, or one with fewer than its `new_tokens` left of `cfg.decoding_length`."""
    limits = np.broadcast_to(new_tokens, lengths.shape)
    if limits.min() < 1:
        raise UserError(f"max_new_tokens={limits.min()} must be at least 1")
    empty = np.flatnonzero(lengths == 0)
    if empty.size:
        raise UserError(f"prompt {empty[0]} is empty; give it at least one token")
    longest = int((lengths + limits).argmax())
    if lengths[longest] + limits[longest] > cfg.decoding_length:
        raise UserError(
            f"prompt {longest} has {lengths[longest]} tokens and {limits[longest]} new ones are asked for, but "
            f"{longest_row(cfg)}; shorten the prompt or lower max_new_tokens"
        )


def check_token_lists(lm: LoadedModel, prompts: Sequence[Sequence[int]], new_tokens: int | np.ndarray) -> None:
    """Raises UserError as `check_prompts` does, or for a token id outside the model's vocabulary."""
    lengths = np.asarray([len(prompt) for prompt in prompts])
    check_prompts(lengths, new_tokens, lm.model.cfg)
    for number, prompt in enumerate(prompts):
        check_ids(prompt, lm.model.cfg.vocab_size, lm.tokenizer, f"prompt {number}")


def row_keys(key: jax.Array | None, rows: int, bucket: int, sampling: Sampling) -> jax.Array:
    """One typed key a row, [bucket], for `rows` prompts padded to it; of a single key, row i takes fold_in(key, i)."""
    if key is None:
        if not isinstance(sampling, Greedy):
            raise UserError(f"sampling with {sampling} needs a key: pass key=jax.random.key(seed)")
        key = jax.random.key(0)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise UserError("key is one of JAX's old untyped keys; make it with jax.random.key(seed)")
    if key.ndim == 0:
        return seeds.of_rows(key, np.arange(bucket))
    if key.shape != (rows,):
        raise UserError(f"{rows} prompts need one key or {rows}; got {key.shape}")
    data = pad_rows(np.asarray(jax.random.key_data(key)), bucket)
    return jax.random.wrap_key_data(jax.device_put(data), impl=jax.random.key_impl(key))


def pad_eos(eos_ids: Sequence[int]) -> np.ndarray:
    """[K] int32 end tokens in a bucket of 4, 8, ..., -1 where unused."""
    size = max(4, batch_bucket(len(eos_ids)))
    return np.asarray([*eos_ids] + [-1] * (size - len(eos_ids)), np.int32)
