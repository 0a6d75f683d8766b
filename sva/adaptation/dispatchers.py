"""Dispatchers: for every row of a batch, how likely each label is the right one.

A dispatcher is a small frozen pytree: its arrays are traced and its settings static, so that it goes into the jitted
two-pass function as an argument and another one of its kind meets a compiled program. A `Choice` then turns the
probabilities into weights of the experts.

    Scored      the classification question, each label's log-probability; by the base or a classification expert
    Generated   the same question, answered freely and read (the paper's first pass)
    Router      a linear classifier over the base model's mean last hidden state
    Blend       a weighted mean of several dispatchers
    Fixed, Random, Oracle   the baselines: always the same, at random, always right
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from sva.adaptation.label_scoring import STEP, Choice, Hard, ScoringState, TokenBatch, after_prefix, label_scores
from sva.generation import chat
from sva.generation.decode import begin, decode
from sva.generation.lm import LM
from sva.generation.sampling import Greedy
from sva.models.cache import DecodeCache, KVSegment, resize
from sva.models.flops import head_flops, linear_flops, met_at, pair_flops
from sva.models.transformer import Transformer, apply, positions_of, variables
from sva.spectral.mixing import DeltaSlots, Slots, mixture
from sva.tasks.labels import OTHER, Label
from sva.utils import seeds
from sva.utils.errors import UserError
from sva.utils.padding import round_up


class DispatchBatch(NamedTuple):
    """B prompts as a dispatcher may read them."""

    questions: TokenBatch  # inside the classification question, what follows the shared instruction
    prompts: TokenBatch  # by themselves, as the second pass reads them
    right: Any  # [B] int32, the place of the right label where it is known; only `Oracle` reads it


@struct.dataclass
class ServingState:
    """A base model, the experts that rows mix, and the labels that these answer to."""

    model: Transformer = struct.field(pytree_node=False)
    params: Mapping[str, Any]
    bank: Mapping[str, Any]  # the model's nested tree of `Slots`
    num_slots: int = struct.field(pytree_node=False)  # E_max
    slots: jax.Array  # [C] int32, each label's slot in the bank; the base is 0, and so are spare places
    choice: Choice = struct.field(pytree_node=False, default=Hard())


class Work(NamedTuple):
    """Tokens and FLOPs of a pass for each row, without padding and without what is computed once for all batches."""

    read: Any  # [B] int32, tokens given
    drawn: Any  # [B] int32, tokens generated
    flops: Any  # [B] float32


class Verdict(NamedTuple):
    """A dispatcher's probabilities for each row, and the work that they took."""

    probs: Any  # [B, C] float32, over the labels; 0 in spare places
    work: Work


class Dispatcher(Protocol):
    """See the head of this file; a `flax.struct.dataclass`."""

    def __call__(self, serving: ServingState, rows: DispatchBatch) -> Verdict:
        """Probabilities of the labels for each row, under jit."""
        ...


@struct.dataclass
class Scored:
    """The labels' log-probabilities as answers to the classification question, calibrated: one prefill, no decoding."""

    scoring: ScoringState
    expert: jax.Array | None = None  # [E_max] mixture that scores (a classification expert's slot); None: the base

    @property
    def answer_tokens(self) -> int:
        """Tokens read behind each question, at most."""
        return int(np.max(self.scoring.label_depth)) + 1

    def __call__(self, serving: ServingState, rows: DispatchBatch) -> Verdict:
        """See `Dispatcher`."""
        adapter = None if self.expert is None else mixture(serving.bank, self.expert[None, :])
        scores = label_scores(serving.model, serving.params, self.scoring, rows.questions, adapter)
        states = jnp.sum(self.scoring.label_mask.any(axis=1), dtype=jnp.int32)
        read = _lengths(rows.questions) + states
        bank = None if adapter is None else serving.bank
        once = self.scoring.prefix
        return Verdict(
            jax.nn.softmax(scores - self.scoring.bias[None, :], axis=-1),
            work(serving.model, bank, read, jnp.zeros_like(read), past=once, unembedded=states + 1),
        )


@struct.dataclass
class Generated:
    """The label that the base model names first when it answers the classification question freely, as in the paper.

    Labels are found as tokens: in lower case, capitalised or in capitals, after a space or not. Where none is named the
    label is "other". The one named has probability 1.
    """

    scoring: ScoringState
    spellings: jax.Array  # [P, W] int32 tokens, -1 after the end
    owners: jax.Array  # [P] int32, whose label; C for spare rows
    other: jax.Array  # [] int32, the place of "other"
    eos_ids: jax.Array  # [K] int32
    max_new_tokens: int = struct.field(pytree_node=False, default=8)

    @property
    def answer_tokens(self) -> int:
        """Tokens read behind each question, at most."""
        return self.max_new_tokens

    def __call__(self, serving: ServingState, rows: DispatchBatch) -> Verdict:
        """See `Dispatcher`."""
        model, collections, steps = serving.model, variables(serving.model, serving.params, None), self.max_new_tokens
        ids, mask, token_indices = rows.questions
        positions, valid = after_prefix(self.scoring.prefix, mask)
        hidden, part = apply(
            model,
            collections,
            ids,
            positions,
            valid,
            [self.scoring.prefix],
            token_indices=token_indices,
            output_start=ids.shape[1] - 1,
        )
        logits = apply(model, collections, hidden[:, -1], method="unembed")
        count = ids.shape[0]
        keys = jnp.broadcast_to(jax.random.key(0), (count,))
        limit = jnp.full((count,), steps, jnp.int32)
        state, begun = begin(logits, positions[:, -1], limit, self.eos_ids, keys, Greedy())
        recent = DecodeCache(resize(part, ids.shape[1] + steps), jnp.asarray(ids.shape[1], jnp.int32))
        state, rest, _ = decode(
            model,
            collections,
            [self.scoring.prefix],
            recent,
            state,
            self.eos_ids,
            sampling=Greedy(),
            steps=steps - 1,
        )
        tokens = jnp.concatenate([begun[0][:, None], rest[0]], axis=1)
        named = self.named(tokens, serving.slots.shape[0])
        return Verdict(
            jax.nn.one_hot(named, serving.slots.shape[0]),
            work(model, None, _lengths(rows.questions), state.count, past=self.scoring.prefix, unembedded=state.count),
        )

    def named(self, tokens: jax.Array, places: int) -> jax.Array:
        """[B] the place of the label that tokens [B, N] name first, of equals the earliest place."""
        width = self.spellings.shape[1]
        padded = jnp.pad(tokens, ((0, 0), (0, width)), constant_values=-2)
        windows = padded[:, jnp.arange(tokens.shape[1])[:, None] + jnp.arange(width)[None, :]]  # [B, N, W]
        spelt = self.spellings[None, None]
        here = (windows[:, :, None, :] == spelt) | (spelt < 0)  # [B, N, P, W]
        order = jnp.arange(tokens.shape[1])[:, None] * (places + 1) + self.owners[None, :]
        none = tokens.shape[1] * (places + 1)
        is_label = here.all(axis=-1) & (self.owners < places)[None, None]
        first = jnp.where(is_label, order[None], none).min(axis=(1, 2))
        return jnp.where(first == none, self.other, first % (places + 1))


@struct.dataclass
class Router:
    """Multinomial logistic regression over the mean of the base model's last hidden states of the prompt alone."""

    weights: jax.Array  # [D, C] float32
    bias: jax.Array  # [C] float32; minus infinity for labels without an example and in spare places

    def __call__(self, serving: ServingState, rows: DispatchBatch) -> Verdict:
        """See `Dispatcher`."""
        states = embed(serving.model, serving.params, rows.prompts.ids, rows.prompts.mask)
        scores = jnp.matmul(states, self.weights, precision=jax.lax.Precision.HIGHEST) + self.bias[None, :]
        read = _lengths(rows.prompts)
        return Verdict(jax.nn.softmax(scores, axis=-1), work(serving.model, None, read, jnp.zeros_like(read)))


@struct.dataclass
class Blend:
    """A weighted mean of several dispatchers' probabilities, for all rows or for each: a batch may mix dispatchers."""

    members: tuple[Dispatcher, ...]  # K of them
    weights: jax.Array  # [1 or B, K], each row adding to 1

    def __call__(self, serving: ServingState, rows: DispatchBatch) -> Verdict:
        """See `Dispatcher`; all members run for all rows."""
        found = [member(serving, rows) for member in self.members]
        parts = [self.weights[:, k, None] * verdict.probs for k, verdict in enumerate(found)]
        return Verdict(sum(parts), jax.tree.map(lambda *x: sum(x), *(verdict.work for verdict in found)))


@struct.dataclass
class Fixed:
    """The same for every prompt: an expert everywhere, or with the choice `Soft` a mixture, as of all experts."""

    weights: jax.Array  # [C] float32

    def __call__(self, serving: ServingState, rows: DispatchBatch) -> Verdict:
        """See `Dispatcher`."""
        batch = rows.right.shape[0]
        return Verdict(jnp.broadcast_to(self.weights, (batch, self.weights.shape[0])), _no_work(batch))


@struct.dataclass
class Random:
    """A random label, drawn by the prompt's own tokens: the same prompt draws the same label in any batch."""

    key: jax.Array
    weights: jax.Array  # [C] float32, each label's chance

    def __call__(self, serving: ServingState, rows: DispatchBatch) -> Verdict:
        """See `Dispatcher`."""
        ids = rows.prompts.ids.astype(jnp.uint32)
        batch, length = ids.shape
        powers = jnp.uint32(0x9E3779B1) ** jnp.arange(length, 0, -1, dtype=jnp.uint32)  # padding, on the left, adds 0
        numbers = jnp.sum(ids * powers[None, :], axis=1, dtype=jnp.uint32)
        keys = seeds.of_rows(self.key, numbers)
        drawn = jax.vmap(jax.random.categorical, (0, None))(keys, jnp.log(self.weights))
        return Verdict(jax.nn.one_hot(drawn, self.weights.shape[0]), _no_work(batch))


@struct.dataclass
class Oracle:
    """The right label, as if the first pass never failed."""

    def __call__(self, serving: ServingState, rows: DispatchBatch) -> Verdict:
        """See `Dispatcher`."""
        probs = jax.nn.one_hot(rows.right, serving.slots.shape[0])
        return Verdict(probs, _no_work(rows.right.shape[0]))


def answer_tokens(dispatcher: Dispatcher) -> int | None:
    """Tokens that it reads behind a classification question, at most; None where it asks none."""
    members = getattr(dispatcher, "members", (dispatcher,))
    return max((one.answer_tokens for one in members if isinstance(one, Scored | Generated)), default=None)


def work(
    model: Transformer,
    bank: Any,
    read: jax.Array,
    drawn: jax.Array,
    *,
    past: KVSegment | None = None,
    unembedded: jax.Array | int = 0,
) -> Work:
    """The work of rows that read and draw so many tokens.

    Args:
      bank: the experts' tree of `Slots` where the rows run on a mixture; None for the base's own weights.
      read, drawn: [B] int32 tokens; the last one drawn is not read again.
      past: the prefix that every row attends to, counted in the cost of attention.
      unembedded: [B] states whose logits are computed.
    """
    tokens = (read + jnp.maximum(drawn - 1, 0)).astype(jnp.float32)
    seen = jnp.zeros((), jnp.float32) if past is None else jnp.sum(past.valid, dtype=jnp.float32)
    pairs = tokens * (seen + (tokens + 1) / 2)
    flops = tokens * mixed_flops(model, bank) + pairs * float(pair_flops(model.cfg))
    return Work(read, drawn, flops + jnp.asarray(unembedded, jnp.float32) * float(head_flops(model.cfg)))


def mixed_flops(model: Transformer, bank: Any) -> float:
    """FLOPs per token of all layer matmuls, each matrix in the form that the bank has it in."""
    total = linear_flops(model.cfg)
    found, _ = jax.tree_util.tree_flatten_with_path(bank, is_leaf=lambda x: isinstance(x, Slots))
    for path, slots in found:
        is_delta = isinstance(slots, DeltaSlots)
        u, vt = (slots.experts.u, slots.experts.vt) if is_delta else (slots.spectrum.u, slots.spectrum.vt)
        out, into, kept = u.shape[-2], vt.shape[-1], u.shape[-1]
        count = math.prod(u.shape[:-2]) * met_at(model.cfg, tuple(entry.key for entry in path))
        instead = 0 if is_delta else out * into
        total += 2 * count * (kept * (out + into) - instead)
    return float(total)


def _no_work(rows: int) -> Work:
    nothing = jnp.zeros(rows, jnp.int32)
    return Work(nothing, nothing, jnp.zeros(rows, jnp.float32))


def _lengths(prompts: TokenBatch) -> jax.Array:
    return jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)


def embed(model: Transformer, params: Mapping[str, Any], ids: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, D] float32 mean of the base model's last hidden states over each row's tokens."""
    hidden, _ = apply(model, variables(model, params, None), ids, *positions_of(mask))
    weights = mask.astype(jnp.float32)
    return jnp.einsum("BTD,BT->BD", hidden.astype(jnp.float32), weights) / weights.sum(axis=1, keepdims=True)


def generated(lm: LM, labels: Sequence[Label], scoring: ScoringState) -> Generated:
    """The dispatcher that reads a free answer; `scoring` as `label_scoring.prepare` makes it for the base model."""
    tokenizer = chat.need_tokenizer(lm)
    spelt = [
        (space + word, place)
        for place, label in enumerate(labels)
        for space in ("", " ")
        for word in (label.name, label.name.capitalize(), label.name.upper())
    ]
    rows = chat.tokenize(lm, [text for text, _ in spelt], follows=True, kind="label")
    pairs = [(tuple(row), place) for row, (_, place) in zip(rows, spelt, strict=True)]
    found = [pair for pair in dict.fromkeys(pairs) if pair[0] and tokenizer.unk_token_id not in pair[0]]
    width = round_up(max((len(tokens) for tokens, _ in found), default=1), STEP)
    size = round_up(len(found), 6 * STEP)
    spellings = np.full((size, width), -1, np.int32)
    owners = np.full(size, len(scoring.bias), np.int32)
    for row, (tokens, place) in enumerate(found):
        spellings[row, : len(tokens)] = tokens
        owners[row] = place
    other = [label.name for label in labels].index(OTHER)
    return Generated(
        scoring,
        jnp.asarray(spellings),
        jnp.asarray(owners),
        jnp.asarray(other, jnp.int32),
        jnp.asarray(chat.end_tokens(lm), jnp.int32),
    )


def fixed(labels: Sequence[Label], name: str, places: int) -> Fixed:
    """The expert of one label for every prompt; "other" is the base.

    Raises:
      UserError: no such label.
    """
    names = [label.name for label in labels]
    if name not in names:
        raise UserError(f"no expert carries the label {name!r}; there is {', '.join(names)}")
    return Fixed(jax.nn.one_hot(names.index(name), places))


def uniform(labels: Sequence[Label], places: int) -> Fixed:
    """Equal parts of every expert, adding to 1; with the choice `Soft` their average."""
    experts = np.array([label.name != OTHER for label in labels], np.float32)
    return Fixed(jnp.asarray(np.pad(experts / experts.sum(), (0, places - len(labels)))))


def at_random(labels: Sequence[Label], places: int, seed: int = 0) -> Random:
    """Every label, "other" among them, with the same chance."""
    chances = np.full(len(labels), 1 / len(labels), np.float32)
    return Random(seeds.key(seed), jnp.asarray(np.pad(chances, (0, places - len(labels)))))


def fit_router(states: jax.Array, owners: Sequence[int], places: int) -> Router:
    """The router that tells apart examples with states [n, D] of the labels at `owners` [n].

    States are standardised; cross-entropy plus 1e-3 times the squared weights, by 500 full steps of Adam.
    """
    owners_array = jnp.asarray(owners, jnp.int32)
    mean, scale = states.mean(axis=0), states.std(axis=0) + 1e-6
    present = np.isin(np.arange(places), np.asarray(owners))
    weights = _regress((states - mean[None, :]) / scale[None, :], owners_array, jnp.asarray(present), places)
    weights = weights / scale[:, None]
    bias = -jnp.matmul(mean, weights, precision=jax.lax.Precision.HIGHEST)
    return Router(weights, jnp.where(present, bias, -jnp.inf))


@partial(jax.jit, static_argnames=("places",))
def _regress(states: jax.Array, owners: jax.Array, present: jax.Array, places: int) -> jax.Array:
    """[D, C] weights without a bias: the states are centred."""
    optimiser = optax.adam(1e-2)

    def loss(weights: jax.Array) -> jax.Array:
        scores = jnp.where(present[None, :], states @ weights, -1e9)
        return optax.softmax_cross_entropy_with_integer_labels(scores, owners).mean() + 1e-3 * jnp.sum(weights**2)

    def step(carry: Any, _: None) -> Any:
        weights, state = carry
        updates, state = optimiser.update(jax.grad(loss)(weights), state)
        return (optax.apply_updates(weights, updates), state), None

    start = jnp.zeros((states.shape[1], places), jnp.float32)
    (weights, _), _ = jax.lax.scan(step, (start, optimiser.init(start)), length=500)
    return weights
