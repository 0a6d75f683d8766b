"""How likely a model finds given continuations of a prompt."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sva import chat
from sva.buckets import batch_bucket, length_bucket, pad_rows
from sva.lm import LM, check_prompts
from sva.logprobs import score
from sva.models.transformer import Transformer, apply, positions_of, variables


@partial(jax.jit, static_argnames=("model",))
def continuation_logprobs(
    model: Transformer,
    params: Mapping[str, Any],
    ids: jax.Array,
    mask: jax.Array,
    scored: jax.Array,
    adapter: Mapping[str, Any] | None = None,
) -> jax.Array:
    """[B] float32 nats: the summed log-probability of each row's scored tokens, given those before them.

    Args:
      ids, mask: [B, T] int32, padded on the right.
      scored: [B, T] int32, 1 for the tokens to sum over; never a row's first.
      adapter: of the rows, or None for the model alone.
    """
    hidden, _ = apply(model, variables(model, params, adapter), ids, *positions_of(mask))
    logprobs = score(
        lambda h: apply(model, {"params": params}, h, method="unembed"), hidden[:, :-1], ids[:, 1:]
    ).logprobs
    return jnp.sum(logprobs * scored[:, 1:], axis=1)


def option_logprobs(lm: LM, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
    """The log-probability (nats) of every option as what follows its prompt, end token not included.

    Plain text without a chat template, as public leaderboards score it. An option's tokens are those that prompt and
    option have together beyond the prompt's own.

    Raises:
      UserError: a prompt with an option is longer than the model's context.
    """
    tokenizer = chat.need_tokenizer(lm)
    rows, starts = [], []
    for prompt, texts in zip(prompts, options, strict=True):
        first = len(tokenizer(prompt)["input_ids"])
        for text in texts:
            rows.append(tokenizer(prompt + text)["input_ids"])
            starts.append(first)
    lengths = np.asarray([len(row) for row in rows])
    check_prompts(lengths, 1, lm.model.cfg.max_position_embeddings)
    places = np.arange(length_bucket(int(lengths.max())))[None, :]
    ids = np.zeros((len(rows), places.shape[1]), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    mask = (places < lengths[:, None]).astype(np.int32)
    scored = mask * (places >= np.asarray(starts)[:, None])
    size = batch_bucket(len(rows))
    padded = (pad_rows(x, size) for x in (ids, mask, scored.astype(np.int32)))
    sums = iter(np.asarray(continuation_logprobs(lm.model, lm.params, *padded)).tolist())
    return [tuple(next(sums) for _ in texts) for texts in options]
