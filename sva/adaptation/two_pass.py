"""Two passes as one jitted function: decide which expert each prompt needs, then answer with it.

Transformer-Squared (arXiv 2501.06252), section 3.2. All prompts of a batch run at once, each with its own mixture of
the bank's experts; shapes depend only on the batch, the prompt buckets, how much of the questions is padding (three
sizes: `packed_token_indices`), max_new_tokens, E_max, the components that the bank keeps and the kind of the
dispatcher, so another batch, another expert or another mixture meets a compiled program.
"""

from typing import Any, NamedTuple

import jax
from flax import struct

from sva.adaptation.dispatchers import DispatchBatch, Dispatcher, ServingState, Work
from sva.adaptation.label_scoring import TokenBatch, decide
from sva.generation.decode import Generation, PromptBatch, generate
from sva.generation.sampling import Sampling
from sva.spectral.mixing import mixture
from sva.utils.errors import UserError


@struct.dataclass
class Request:
    """Prompts to continue; the fields are those of `generate`."""

    prompts: TokenBatch
    limit: Any  # [] int32
    eos_ids: Any  # [K] int32
    keys: jax.Array  # [B]
    max_new_tokens: int = struct.field(pytree_node=False)
    sampling: Sampling = struct.field(pytree_node=False)


class Decision(NamedTuple):
    """The first pass's decision for each row."""

    probs: Any  # [B, C] float32, over the labels; 0 in places that no label has
    alphas: Any  # [B, E_max] float32, each expert's weight; the base's slot is 0
    work: Work


class TwoPass(NamedTuple):
    """The results of both passes."""

    decision: Decision
    generation: Generation


@jax.jit
def second_pass(serving: ServingState, alphas: jax.Array, request: Request) -> Generation:
    """Answers of the second pass alone, under the given mixtures: alphas [B, E_max].

    Raises:
      UserError: alphas of another size.
    """
    if (alphas.shape[0], alphas.shape[-1]) != (len(request.keys), serving.num_slots):
        wanted = [len(request.keys), serving.num_slots]
        raise UserError(f"alphas have shape {list(alphas.shape)}; these prompts and this bank need {wanted}")
    return generate(
        serving.model,
        serving.params,
        PromptBatch(request.prompts.ids, request.prompts.mask, request.keys, request.limit),
        request.eos_ids,
        mixture(serving.bank, alphas),
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
    )


@jax.jit
def first_pass(serving: ServingState, dispatcher: Dispatcher, rows: DispatchBatch) -> Decision:
    """The decision of the first pass alone; arguments as in `two_pass`."""
    verdict = dispatcher(serving, rows)
    return Decision(
        verdict.probs, decide(verdict.probs, serving.slots, serving.num_slots, serving.choice), verdict.work
    )


@jax.jit
def two_pass(serving: ServingState, dispatcher: Dispatcher, rows: DispatchBatch, request: Request) -> TwoPass:
    """Decision and answers of both passes over one batch.

    Args:
      serving: the base model and its experts.
      dispatcher: classifies each prompt (`sva.adaptation.dispatchers`).
      rows: the B prompts as a dispatcher reads them (`AdaptiveLM.rows`).
      request: the same prompts, B rows, and how to continue them.
    """
    decision = first_pass(serving, dispatcher, rows)
    return TwoPass(decision, second_pass(serving, decision.alphas, request))
