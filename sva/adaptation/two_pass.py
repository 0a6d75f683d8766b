"""Two passes as one jitted function: decide which expert each prompt needs, then answer with it.

Transformer-Squared (arXiv 2501.06252), section 3.2. All prompts of a batch run at once, each with its own mixture of
the bank's experts; shapes depend only on the batch, the prompt buckets, max_new_tokens, E_max, the components that
the bank keeps and the kind of the dispatcher, so another batch, another expert or another mixture meets a compiled
program.
"""

from typing import Any, NamedTuple

import jax
from flax import struct

from sva.adaptation.dispatchers import Dispatcher, Rows, Served, Work
from sva.adaptation.label_scoring import Prompts, decide
from sva.generation.decode import Generation, PromptBatch, generate
from sva.generation.sampling import Sampling
from sva.spectral.mixing import mixture
from sva.utils.errors import UserError


@struct.dataclass
class Request:
    """Prompts to continue; the fields are those of `generate`."""

    prompts: Prompts
    limit: Any  # [] int32
    eos_ids: Any  # [K] int32
    keys: jax.Array  # [B]
    max_new_tokens: int = struct.field(pytree_node=False)
    sampling: Sampling = struct.field(pytree_node=False)


class Decision(NamedTuple):
    """What the first pass decided for each row."""

    probs: Any  # [B, C] float32, over the labels; 0 in places that no label has
    alphas: Any  # [B, E_max] float32, each expert's weight; the base's slot is 0
    work: Work


class TwoPass(NamedTuple):
    """What both passes gave."""

    decision: Decision
    generation: Generation


@jax.jit
def answer(served: Served, alphas: jax.Array, request: Request) -> Generation:
    """The second pass alone, with the mixtures given: alphas [B, E_max].

    Raises:
      UserError: alphas of another size.
    """
    if (alphas.shape[0], alphas.shape[-1]) != (len(request.keys), served.num_slots):
        wanted = [len(request.keys), served.num_slots]
        raise UserError(f"alphas have shape {list(alphas.shape)}; these prompts and this bank need {wanted}")
    return generate(
        served.model,
        served.params,
        PromptBatch(*request.prompts, request.keys, request.limit),
        request.eos_ids,
        mixture(served.bank, alphas),
        max_new_tokens=request.max_new_tokens,
        sampling=request.sampling,
    )


@jax.jit
def choose(served: Served, dispatcher: Dispatcher, rows: Rows) -> Decision:
    """The first pass alone; arguments as in `two_pass`."""
    verdict = dispatcher(served, rows)
    return Decision(verdict.probs, decide(verdict.probs, served.slots, served.num_slots, served.choice), verdict.work)


@jax.jit
def two_pass(served: Served, dispatcher: Dispatcher, rows: Rows, request: Request) -> TwoPass:
    """Both passes over one batch.

    Args:
      served: the base model and its experts.
      dispatcher: who says what each prompt is (`sva.adaptation.dispatchers`).
      rows: what it may look at, of B prompts (`AdaptiveLM.rows`).
      request: the same prompts, B rows, and how to continue them.
    """
    decision = choose(served, dispatcher, rows)
    return TwoPass(decision, answer(served, decision.alphas, request))
