"""Log-likelihoods of given continuations of a prompt."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from sva.evaluation.option_rows import OptionRows, Tree, batches, option_rows, tree
from sva.generation import chat
from sva.generation.finite import check_finite
from sva.generation.lm import LM, fitting
from sva.generation.logprobs import score
from sva.generation.merge import adapted
from sva.models.transformer import Transformer, apply, positions_of, variables
from sva.parallel.processes import to_host
from sva.utils.errors import UserError
from sva.utils.padding import pad_rows

BATCH_TOKENS = 2048
_STATES = 128  # whose logits exist at once: 25 MB for SmolLM2's vocabulary, 66 MB for Llama 3's


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


@partial(jax.jit, static_argnames=("model",))
def target_logprobs(
    model: Transformer, params: Mapping[str, Any], rows: OptionRows, adapter: Mapping[str, Any] | None = None
) -> tuple[jax.Array, jax.Array]:
    """[Q] float32 nats, the log-probability of each target after the tokens that lead to it, and [Q] bool, whether
    no token is likelier there; of spare targets, anything.

    Logits exist for `_STATES` tokens at a time.
    """
    columns = jnp.arange(rows.ids.shape[1], dtype=jnp.int32)
    earlier = columns[:, None] >= columns[None, :]
    sees = earlier[None] & (columns[None, :, None] < rows.ends[:, None, :])
    hidden, _ = apply(model, variables(model, params, adapter), rows.ids, rows.depths, rows.valid, mask=sees)
    flat = hidden.reshape(-1, hidden.shape[-1])
    chunk = min(_STATES, len(rows.states))

    def read(number: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = jnp.minimum(number * chunk, len(rows.states) - chunk)  # the last chunk may overlap the one before
        states = jax.lax.dynamic_slice_in_dim(rows.states, start, chunk)
        logits = apply(model, {"params": params}, jnp.take(flat, states, axis=0, mode="clip"), method="unembed")
        place = rows.sources - start
        here = jnp.clip(place, 0, chunk - 1)
        chosen = logits[here, rows.targets]
        logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)[here]
        likeliest = chosen >= jnp.max(logits, axis=-1)[here]
        return jnp.where(here == place, logprobs, found[0]), jnp.where(here == place, likeliest, found[1])

    empty = jnp.zeros(rows.targets.shape, jnp.float32), jnp.zeros(rows.targets.shape, bool)
    return jax.lax.fori_loop(0, (rows.count + chunk - 1) // chunk, read, empty)


def option_logprobs(
    lm: LM,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    *,
    z: Mapping[str, Any] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[tuple[float, ...]]:
    """The log-probability (nats) of every option as what follows its prompt, end token not included.

    Plain text without a chat template, as public leaderboards score it; the tokens are those of `followed`. A prompt
    is read once, and so is what its options share at their start (`sva.evaluation.option_rows`).

    Args:
      z: effective z, {name: [R] or [B, R]}: one for all B prompts, or one a prompt. None: the model as it is.
      batch_tokens: tokens that are read together; at least one row.
    Raises:
      UserError: a prompt with an option is longer than the model's context, an option has no token of its own, a text
        holds a token without embedding, a log-probability is not finite, or a z does not fit.
    """
    pairs = [followed(lm, prompt, texts) for prompt, texts in zip(prompts, options, strict=True)]
    scores = token_scores(
        lm, [head for head, _ in pairs], [tails for _, tails in pairs], z=z, batch_tokens=batch_tokens
    )
    return [tuple(score.nats for score in each) for each in scores]


class Score(NamedTuple):
    """Of one continuation."""

    nats: float  # its log-probability
    is_greedy: bool  # whether greedy decoding would draw it: no token was likelier at any of its places


def token_scores(
    lm: LM,
    heads: Sequence[Sequence[int]],
    tails: Sequence[Sequence[Sequence[int]]],
    *,
    z: Mapping[str, Any] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[list[Score]]:
    """The scores of all continuations of each of B heads, token ids; none is empty. Settings as in `option_logprobs`.

    Raises:
      UserError: a head with a continuation is longer than the model's context, a log-probability is not finite, or a z
        does not fit.
    """
    trees = [tree(head, each) for head, each in zip(heads, tails, strict=True)]
    context = lm.model.cfg.max_position_embeddings
    for number, (head, each) in enumerate(zip(heads, tails, strict=True)):
        if (read := len(head) + max(map(len, each)) - 1) > context:  # the last token is never read
            raise UserError(
                f"prompt {number} and its longest continuation have {read} tokens to read, and the model's context is "
                f"{context}; shorten the prompt"
            )
    found = _read(lm, trees, lm.z if z is None else z, batch_tokens)
    scores = [[Score(float(nats.sum(dtype=np.float64)), bool(best.all())) for nats, best in each] for each in found]
    check_finite(lm, np.asarray([score.nats for each in scores for score in each]), "option")
    return scores


_Tokens = tuple[np.ndarray, np.ndarray]  # of one option: nats, and whether likeliest


def _read(lm: LM, trees: Sequence[Tree], z: Mapping[str, Any] | None, batch_tokens: int) -> list[list[_Tokens]]:
    """What `target_logprobs` finds for every token of every option of each tree; z as for `option_logprobs`."""
    by_row = {} if z is None else {name: np.asarray(x) for name, x in z.items() if np.ndim(x) == 2}
    params, adapter, spectra = lm.params, None, {}
    if z is not None:
        spectra = fitting(lm, z, len(trees))
        if not by_row:
            params, adapter = adapted(lm, spectra, z)
    found: list[list[_Tokens]] = [[] for _ in trees]
    cfg = lm.model.cfg
    is_alone = bool(by_row) or cfg.decoding_length < cfg.max_position_embeddings  # a row's length then turns positions
    for batch in batches([len(each.ids) for each in trees], batch_tokens, alone=is_alone):
        rows = option_rows(batch, trees)
        order = [number for numbers in batch.rows for number in numbers]
        if z is not None and by_row:
            of_rows = {name: pad_rows(x[order], len(rows.ids)) for name, x in by_row.items()}
            params, adapter = adapted(lm, spectra, {**z, **of_rows})
        nats, best = to_host(target_logprobs(lm.model, params, rows, adapter))
        ends = np.cumsum([count for number in order for count in trees[number].counts])
        parts = iter(zip(np.split(nats, ends), np.split(best, ends), strict=True))
        for number in order:
            found[number] = [next(parts) for _ in trees[number].counts]
    return found


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
