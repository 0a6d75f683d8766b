"""The first pass: which expert does each prompt need?

Every label (an expert's, and "other" for the base model) is an answer to one classification question. Scored, the
default, its log-probability is read off a single prefill: the question's instruction is a prefix that is computed
once, and the tokens of all labels follow the prompt at the same time, each seeing the prompt and its own label's
earlier tokens only. Generated, as in the paper, the model answers freely and the answer is read.

    cache:   [ instruction ............ ]                 shared by all rows, computed once
    row:                                 [ prompt ... ]   left padded
    labels:                                            [ a1 a2 | b1 | c1 c2 c3 ]
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sva.generation import chat
from sva.generation.decode import prefill_prefix
from sva.generation.lm import LM
from sva.generation.logprobs import chosen
from sva.generation.prompts import longest_row
from sva.models.cache import KVSegment
from sva.models.transformer import Transformer, apply, positions_of, variables
from sva.parallel.sharding import is_divided, rows_bucket
from sva.tasks.labels import OTHER, Label, instruction
from sva.utils.errors import UserError
from sva.utils.padding import length_bucket, packed_token_indices, pad_rows, pad_tokens, round_up

STEP, PREFIX_STEP = 8, 128  # see `ScoringState`
_MARK = "\N{REPLACEMENT CHARACTER}"
# Prompts with nothing to classify; what they favour is the labels' own pull (arXiv 2102.09690, section 4).
CONTENT_FREE = ("N/A", "...", "Hello.", "Please answer the question.")


@struct.dataclass
class ScoringState:
    """The arrays that scoring needs: made once by `prepare`, for one model and one set of labels.

    Every size has room to spare, the instruction in steps of 128 tokens and the others in steps of 8, so that one label
    more meets a compiled program unless it passes a step.
    """

    prefix: KVSegment  # of one row, the instruction
    label_ids: jax.Array  # [M] int32, the labels' tokens one after another, end tokens left out; some spare
    label_depth: jax.Array  # [M] int32, place of a token in its label
    label_mask: jax.Array  # [M, M] bool, which label tokens each one sees
    target_from: jax.Array  # [Q] int32, index of the state that predicts each scored token; -1 is the prompt's last
    target_ids: jax.Array  # [Q] int32, the scored tokens, end tokens among them
    target_label: jax.Array  # [Q] int32, whose label a scored token belongs to; C for spare ones
    bias: jax.Array  # [C] float32 nats, taken off each label's log-probability; infinite for spare places


class TokenBatch(NamedTuple):
    """One batch of token ids, padded on the left: prompts, or classification questions after the instruction."""

    ids: Any  # [B, T] int32
    mask: Any  # [B, T] int32
    token_indices: Any = None  # [N] int32 of B * T, as `Transformer` takes them; None: not packed


def after_prefix(prefix: KVSegment, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(positions, valid), as of `positions_of`, of rows that follow the shared instruction."""
    positions, valid = positions_of(mask)
    return jnp.sum(prefix.valid, dtype=jnp.int32) + positions, valid


def label_scores(
    model: Transformer,
    params: Mapping[str, Any],
    scoring: ScoringState,
    questions: TokenBatch,
    adapter: Mapping[str, Any] | None = None,
) -> jax.Array:
    """[B, C] float32 log-probability (nats) of each label, its end token included, as the answer to each row.

    Places without a label hold 0.

    Args:
      questions: B rows, the text after the instruction up to where the answer starts.
      adapter: of the classification expert, the one that `prepare` was given; None for the base.
    """
    collections = variables(model, params, adapter)
    ids = questions.ids
    batch, length = ids.shape
    labels = scoring.label_ids.shape[0]
    positions, valid = after_prefix(scoring.prefix, questions.mask)
    after = positions[:, -1:] + 1 + scoring.label_depth[None, :]
    all_ids = jnp.concatenate([ids, jnp.broadcast_to(scoring.label_ids, (batch, labels))], axis=1)
    all_positions = jnp.concatenate([positions, after], axis=1)
    all_valid = jnp.concatenate([valid, jnp.ones((batch, labels), bool)], axis=1)
    # What each of the T + M new tokens sees of the others: earlier tokens of its prompt, its own label's.
    causal = jnp.tril(jnp.ones((length, length), bool))
    sees_prompt = jnp.concatenate([causal, jnp.ones((labels, length), bool)])
    sees_label = jnp.concatenate([jnp.zeros((length, labels), bool), scoring.label_mask])
    visible = jnp.concatenate(
        [sees_prompt[None] & valid[:, None, :], jnp.broadcast_to(sees_label, (batch, *sees_label.shape))], axis=2
    )
    token_indices = None
    if questions.token_indices is not None:
        starts = jnp.arange(batch, dtype=jnp.int32)[:, None] * (length + labels)
        own = starts + length + jnp.arange(labels, dtype=jnp.int32)[None, :]
        token_indices = jnp.concatenate(
            [questions.token_indices + questions.token_indices // length * labels, own.reshape(-1)]
        )
    hidden, _ = apply(
        model,
        collections,
        all_ids,
        all_positions,
        all_valid,
        [scoring.prefix],
        mask=visible,
        token_indices=token_indices,
        output_start=length - 1,  # the prompt's last, then one a label token
    )
    picked = chosen(
        lambda h: apply(model, collections, h, method="unembed"), hidden, scoring.target_from + 1, scoring.target_ids
    )
    return jax.ops.segment_sum(picked.T, scoring.target_label, num_segments=scoring.bias.shape[0]).T


class Choice(Protocol):
    """Weights of the experts from the probabilities of their labels: a frozen dataclass, static under jit."""

    def __call__(self, probs: jax.Array) -> jax.Array:
        """[B, C] weights of the labels' experts from probs [B, C]; what falls to "other" adds nothing to the base."""
        ...


@dataclasses.dataclass(frozen=True)
class Hard:
    """The likeliest label's expert, the earlier one among equals: the paper's choice."""

    def __call__(self, probs: jax.Array) -> jax.Array:
        """See `Choice`; one weight of a row is 1."""
        return jax.nn.one_hot(jnp.argmax(probs, axis=-1), probs.shape[-1])


@dataclasses.dataclass(frozen=True)
class Soft:
    """Every expert as much as its label is likely. Not in the paper."""

    def __call__(self, probs: jax.Array) -> jax.Array:
        """See `Choice`."""
        return probs


@dataclasses.dataclass(frozen=True)
class Threshold:
    """The likeliest label's expert where its probability is at least `least`, the base where it is not."""

    least: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.least <= 1:
            raise UserError(f"threshold={self.least} is not a probability; give one from 0 (always sure) to 1")

    def __call__(self, probs: jax.Array) -> jax.Array:
        """See `Choice`; a row that is not sure has no weight at all."""
        return Hard()(probs) * (jnp.max(probs, axis=-1, keepdims=True) >= self.least)


def choice(name: str) -> Choice:
    """The choice of a name: hard, soft, or a probability as the threshold.

    Raises:
      UserError: no such choice, or a number that is not a probability.
    """
    if name in ("hard", "soft"):
        return Hard() if name == "hard" else Soft()
    try:
        return Threshold(float(name))
    except ValueError:
        raise UserError(f"--choice {name} is not known; use hard, soft or a probability such as 0.5") from None


def decide(probs: jax.Array, slots: jax.Array, num_slots: int, choose: Choice = Hard()) -> jax.Array:
    """Alphas [B, E_max] over a bank of `num_slots` slots: what the choice makes of probs [B, C] of labels in `slots`.

    The base's slot, 0, gets nothing.
    """
    weights = jnp.where(slots[None, :] == 0, 0, choose(probs))
    return jnp.matmul(weights, jax.nn.one_hot(slots, num_slots), precision=jax.lax.Precision.HIGHEST)


_scores = jax.jit(label_scores, static_argnames=("model",))


@dataclasses.dataclass(frozen=True)
class Template:
    """The classification question around a prompt, cut where the shared prefix ends.

    The space before the prompt belongs to what follows the cut: byte-level tokenizers join it to the next word, and
    cut elsewhere the model would read other tokens than it does when the question is asked in one piece.
    """

    before: chat.Rendered
    space: str
    after: str


def template(lm: LM, labels: Sequence[Label]) -> Template:
    """The rendered classification question for these labels."""
    question = chat.render(lm, instruction(labels, _MARK))
    before, *after = question.split(_MARK)
    if len(after) != 1:
        raise UserError(f"{lm.name}: its chat template writes a question {len(after)} times; two passes need it once")
    prefix = before.rstrip(" ")
    return Template(chat.Rendered(prefix, question.bos), before[len(prefix) :], after[0])


def encode(lm: LM, form: Template, questions: Sequence[str]) -> TokenBatch:
    """The tokens after the shared prefix, in buckets; spare rows repeat the first and are not packed.

    Where a mesh divides the rows nothing is: the model reads them whole there.
    """
    rows = chat.tokenize(lm, [form.space + question + form.after for question in questions], follows=True)
    ids, mask = pad_tokens(rows, length_bucket(max(len(row) for row in rows)))
    size = rows_bucket(len(rows))
    ids, mask, real = pad_rows(ids, size), pad_rows(mask, size), np.pad(mask, ((0, size - len(rows)), (0, 0)))
    places = None if is_divided() else packed_token_indices(real)
    return TokenBatch(*jax.tree.map(jnp.asarray, (ids, mask, places)))


def check_fits(lm: LM, form: Template, questions: Sequence[str], answer_tokens: int) -> None:
    """Raises UserError for a question that is too long for the first pass, with its instruction and what answers it."""
    cfg, lengths = lm.model.cfg, _lengths(lm, form, questions)
    if max(lengths) + answer_tokens > cfg.decoding_length:
        raise UserError(
            f"the question {questions[int(np.argmax(lengths))][:40]!r} ... is too long for the first pass: "
            f"{max(lengths)} tokens with its instruction, and {longest_row(cfg)}; shorten it, or name an expert"
        )


def end_that_fits(lm: LM, form: Template, question: str, answer_tokens: int) -> str:
    """The question without the beginning that `check_fits` refuses; whole where its instruction alone is too long."""
    end = question
    while (over := _lengths(lm, form, [end])[0] + answer_tokens - lm.model.cfg.decoding_length) > 0:
        tokens = chat.need_tokenizer(lm).backend_tokenizer.encode(end, add_special_tokens=False)
        if over >= len(tokens):
            return question
        end = end[max(tokens.offsets[over][0], 1) :]  # several tokens may lie in one character
    return end


def _lengths(lm: LM, form: Template, questions: Sequence[str]) -> list[int]:
    """Tokens of each question with its instruction."""
    (before,) = chat.tokenize(lm, [form.before])
    rows = chat.tokenize(lm, [form.space + question + form.after for question in questions], follows=True)
    return [len(before) + len(row) for row in rows]


def prepare(
    lm: LM,
    labels: Sequence[Label],
    *,
    adapter: Mapping[str, Any] | None = None,
    calibrate: bool = True,
) -> ScoringState:
    """The arrays that score these labels.

    Args:
      labels: C labels; one is "other".
      adapter: of the classification expert, or None for the base model (the paper's prompt dispatcher).
      calibrate: take off each label's mean log-probability under prompts without content.
    Raises:
      UserError: no label but "other", two labels of one name, no "other", or a model without an end token.
    """
    names = [label.name for label in labels]
    _check_names(names)
    spelt = chat.tokenize(lm, names, follows=True, kind="label")
    form = template(lm, labels)
    prefix = chat.tokenize(lm, [form.before])[0]
    end = chat.answer_end(lm)
    if not end:
        raise UserError(f"{lm.name} names no end token, which ends a label; set eos_token_id in its config.json")
    segment = prefill_prefix(
        lm.model,
        variables(lm.model, lm.params, adapter),
        *pad_tokens([prefix], round_up(len(prefix), PREFIX_STEP), side="right"),
    )
    scoring = _scoring_state(segment, spelt, end)
    if not calibrate:
        return scoring
    scores = _scores(lm.model, lm.params, scoring, encode(lm, form, CONTENT_FREE), adapter)[: len(CONTENT_FREE)]
    pull = jax.nn.log_softmax(scores - scoring.bias[None, :], axis=-1).mean(axis=0)
    return dataclasses.replace(scoring, bias=jnp.where(jnp.isfinite(scoring.bias), pull, jnp.inf))


def _check_names(names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"two experts carry the label {twice!r}; give one another: sva expert relabel FILE --label WORD -o NEW"
        )
    if OTHER not in names or len(names) < 2:
        raise UserError(f"dispatch needs {OTHER!r} and at least one expert's label; got {', '.join(names) or 'none'}")


def _scoring_state(prefix: KVSegment, spelt: Sequence[Sequence[int]], end: Sequence[int]) -> ScoringState:
    """The labels' tokens packed one after another, each label's own and its end scored, without calibration.

    Args:
      prefix: the instruction, prefilled.
      spelt: the tokens of each of C labels.
      end: the tokens that end every label.
    """
    ids, depth, owner, target_from, target_ids, target_label = [], [], [], [], [], []
    for number, tokens in enumerate(spelt):
        for place, token in enumerate([*tokens, *end]):
            target_from.append(len(ids) - 1 if place else -1)
            target_ids.append(token)
            target_label.append(number)
            if place < len(tokens):
                ids.append(token)
                depth.append(place)
                owner.append(number)
    places, states = round_up(len(spelt), STEP), round_up(len(ids), STEP)
    targets = places + states  # a label has a token to score for each of its own, and its end
    same = np.asarray(owner)[:, None] == np.asarray(owner)[None, :]
    return ScoringState(
        prefix=prefix,
        label_ids=_padded(ids, states),
        label_depth=_padded(depth, states),
        label_mask=jnp.asarray(np.pad(same & np.tril(np.ones_like(same)), (0, states - len(ids)))),
        target_from=_padded(target_from, targets, -1),
        target_ids=_padded(target_ids, targets),
        target_label=_padded(target_label, targets, places),
        bias=jnp.where(np.arange(places) < len(spelt), 0, jnp.inf),
    )


def _padded(values: Sequence[int], size: int, spare: int = 0) -> jax.Array:
    """[size] int32: `values`, then `spare`."""
    return jnp.asarray([*values, *[spare] * (size - len(values))], jnp.int32)
