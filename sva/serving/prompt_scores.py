"""Log-probs of a prompt's own tokens, with the likeliest ones at each place: what `echo` and harnesses ask for."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sva.generation.row_sampling import LIKELIEST
from sva.generation.sampling import likeliest
from sva.generation.weights import Weights
from sva.models.transformer import apply, positions_of
from sva.parallel.processes import to_host
from sva.utils.padding import pad_tokens, prompt_bucket

_STATES = 32  # whose logits exist at once; divides every prompt bucket


class PromptScores(NamedTuple):
    """Of a prompt of T tokens; nothing comes before the first one, so it has none."""

    logprobs: np.ndarray  # [T - 1] float32 nats, of each token after the first
    ids: np.ndarray  # [T - 1, K] int32, the likeliest tokens in its place
    likeliest: np.ndarray  # [T - 1, K] float32 nats


def prompt_scores(weights: Weights, prompt_ids: list[int], alphas: np.ndarray, count: int, copies: int) -> PromptScores:
    """The scores of one prompt under a mixture, alphas [E_max].

    Args:
      count: alternatives wanted; 1 or fewer gives the likeliest token alone, more gives `LIKELIEST`.
      copies: rows that a mesh divides; the prompt is repeated.
    """
    ids, mask = pad_tokens([prompt_ids] * copies, prompt_bucket(len(prompt_ids)), side="right")
    size = 1 if count <= 1 else LIKELIEST
    found = to_host(_scores(weights, ids, mask, np.stack([alphas] * copies), size=size))
    return PromptScores(*(x[: len(prompt_ids) - 1] for x in found))


@partial(jax.jit, static_argnames=("size",))
def _scores(weights: Weights, ids: jax.Array, mask: jax.Array, alphas: jax.Array, *, size: int):
    """(log-probs [T], ids [T, size], log-probs [T, size]) of what follows each token of the first row."""
    hidden, _ = apply(weights.model, weights.collections(alphas), ids, *positions_of(mask))
    width = hidden.shape[1]
    states = hidden[0].reshape(width // _STATES, _STATES, hidden.shape[2])
    targets = jnp.roll(ids[0], -1).reshape(width // _STATES, _STATES)

    def read(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = apply(weights.model, {"params": weights.params}, part[0], method="unembed")
        total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, part[1][:, None], axis=-1)[:, 0] - total
        if size == 1:
            ids, values = likeliest(logits)[:, None], jnp.max(logits, axis=-1, keepdims=True)
        else:
            values, ids = jax.lax.top_k(logits, size)
        return chosen, ids, values - total[:, None]

    logprobs, ids, values = jax.lax.map(read, (states, targets))
    return logprobs.reshape(width), ids.reshape(width, size), values.reshape(width, size)
