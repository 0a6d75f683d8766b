"""Two passes as one jitted function: decide which expert each prompt needs, then answer with it.

Transformer-Squared (arXiv 2501.06252), section 3.2. All prompts of a batch run at once, each with its own mixture of
the bank's experts; shapes depend only on the batch, the prompt buckets, max_new_tokens, the number of labels, E_max
and the components that the bank keeps, so another batch, another expert or another mixture meets a compiled program.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax import struct

from sva.dispatch import Choice, Decision, FirstPass, Hard, decide, label_scores
from sva.generate import Generation, generate
from sva.models.transformer import Transformer
from sva.sampling import Sampling
from sva.spectral.slots import mixture


class Prompts(NamedTuple):
    """One batch of prompts as [B, T] int32 ids and masks, padded on the left."""

    ids: Any
    mask: Any


@struct.dataclass
class Served:
    """A base model and the experts that rows mix."""

    model: Transformer = struct.field(pytree_node=False)
    params: Mapping[str, Any]
    bank: Mapping[str, Any]  # the model's nested tree of `Slots`
    num_slots: int = struct.field(pytree_node=False)  # E_max
    classifier: jax.Array | None = None  # [E_max] mixture of the first pass (a classification expert); None: the base
    choice: Choice = struct.field(pytree_node=False, default=Hard())  # what the first pass makes of probabilities


@struct.dataclass
class Request:
    """Prompts to continue; the fields are those of `generate`."""

    prompts: Prompts
    limit: Any  # [] int32
    eos_ids: Any  # [K] int32
    keys: jax.Array  # [B]
    max_new_tokens: int = struct.field(pytree_node=False)
    sampling: Sampling = struct.field(pytree_node=False)


class TwoPass(NamedTuple):
    """What both passes gave."""

    decision: Decision
    generation: Generation


@jax.jit
def answer(served: Served, alphas: jax.Array, request: Request) -> Generation:
    """The second pass alone, with the mixtures given: alphas [B, E_max]."""
    return generate(
        served.model,
        served.params,
        *request.prompts,
        request.limit,
        request.eos_ids,
        request.keys,
        mixture(served.bank, alphas),
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
    )


@jax.jit
def choose(served: Served, first: FirstPass, asked: Prompts) -> Decision:
    """The first pass alone; arguments as in `two_pass`."""
    adapter = None if served.classifier is None else mixture(served.bank, served.classifier[None, :])
    scores = label_scores(served.model, served.params, first, *asked, adapter)
    return decide(scores, first, served.num_slots, served.choice)


@jax.jit
def two_pass(served: Served, first: FirstPass, asked: Prompts, request: Request) -> TwoPass:
    """Both passes over one batch.

    Args:
      served: the base model and its experts.
      first: from `dispatch.prepare`, with the adapter that `served.classifier` makes.
      asked: the prompts inside the classification question (`dispatch.encode`), B rows.
      request: the same prompts by themselves, B rows, and how to continue them.
    """
    decision = choose(served, first, asked)
    return TwoPass(decision, answer(served, decision.alphas, request))
