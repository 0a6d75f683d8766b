"""Log-likelihoods of given continuations of a prompt."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sva.generation import chat
from sva.generation.finite import check_finite
from sva.generation.lm import LM
from sva.generation.logprobs import score
from sva.generation.prompts import check_prompts
from sva.models.transformer import Transformer, apply, positions_of, variables
from sva.parallel.processes import to_host
from sva.parallel.sharding import rows_bucket
from sva.utils.errors import UserError
from sva.utils.padding import length_bucket, pad_rows, pad_tokens


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
    chex.assert_rank(ids, 2)
    chex.assert_equal_shape([ids, mask, scored])
    hidden, _ = apply(model, variables(model, params, adapter), ids, *positions_of(mask))
    logprobs = score(
        lambda h: apply(model, {"params": params}, h, method="unembed"), hidden[:, :-1], ids[:, 1:]
    ).logprobs
    return jnp.sum(logprobs * scored[:, 1:], axis=1)


def option_logprobs(lm: LM, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> list[tuple[float, ...]]:
    """The log-probability (nats) of every option as what follows its prompt, end token not included.

    Plain text without a chat template, as public leaderboards score it; the tokens are those of `followed`.

    Raises:
      UserError: a prompt with an option is longer than the model's context, an option has no token of its own, a text
        holds a token without embedding, or a log-probability is not finite.
    """
    rows, starts = [], []
    for prompt, texts in zip(prompts, options, strict=True):
        heads, tails = followed(lm, prompt, texts)
        rows += [[*heads, *tail] for tail in tails]
        starts += [len(heads)] * len(tails)
    lengths = np.asarray([len(row) for row in rows])
    check_prompts(lengths, 1, lm.model.cfg.max_position_embeddings)
    ids, mask = pad_tokens(rows, length_bucket(int(lengths.max())), side="right")
    scored = mask * (np.arange(mask.shape[1])[None, :] >= np.asarray(starts)[:, None])
    size = rows_bucket(len(rows))
    padded = (pad_rows(x, size) for x in (ids, mask, scored.astype(np.int32)))
    sums = to_host(continuation_logprobs(lm.model, lm.params, *padded))[: len(rows)]
    check_finite(lm, sums, "option")
    each = iter(sums.tolist())
    return [tuple(next(each) for _ in texts) for texts in options]


def followed(lm: LM, prompt: str, texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """(the prompt's token ids, those of each text behind it): the prompt's stay the same whatever follows.

    They are those of prompt and text in one piece, as public leaderboards take them. Where the border would be joined
    into one token, the text's own follow instead, so that all options are scored after the same tokens and whole.

    Raises:
      UserError: a text has no token, or nothing stands before its first one.
    """
    (head,) = chat.tokenize(lm, [prompt])
    tails = []
    for text, whole in zip(texts, chat.tokenize(lm, [prompt + text for text in texts]), strict=True):
        tail = whole[len(head) :] if whole[: len(head)] == head else _alone(lm, text)
        if not tail or not head:
            lacking = f"the option {text!r}" if head else f"the prompt before the option {text!r}"
            raise UserError(f"{lacking} has no token, so it cannot be scored; give it some text")
        tails.append(tail)
    return head, tails


def _alone(lm: LM, text: str) -> list[int]:
    """The token ids of a text inside a line: SentencePiece marks a first word as if a space stood before it."""
    line, whole = chat.tokenize(lm, ["\n", f"\n{text}"], follows=True)
    return whole[len(line) :] if whole[: len(line)] == line else chat.tokenize(lm, [text], follows=True)[0]
