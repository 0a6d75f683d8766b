"""Log-probabilities that are NaN or infinite: an error that names the cause, before anything is made of them."""

import jax.numpy as jnp
import numpy as np

from sva.generation.loaded_model import LoadedModel
from sva.utils.errors import UserError


def check_finite(lm: LoadedModel, values: np.ndarray, what: str, first: int = 0) -> None:
    """Raises UserError where `lm` gave a log-probability, or what is computed as it is, that is not finite: the cause.

    Args:
      values: host array, one row a prompt.
      what: a row is of, for the message.
      first: the number of the first row.
    """
    finite = np.isfinite(values)
    if not finite.all():
        place = np.argwhere(~finite)[0]
        value = values[tuple(place)]
        raise UserError(f"{what} {first + int(place[0])}: the model gives {value}: {cause(lm)}")


def cause(lm: LoadedModel) -> str:
    """Why a model gives NaN or infinite values: a weight that holds some, or else its activations."""
    for name, weight in lm.named_params().items():
        if not bool(jnp.isfinite(weight).all()):
            return (
                f"{name} of {lm.name} holds NaN or infinite values; fetch the checkpoint again, or merge another expert"
            )
    return (
        f"every weight of {lm.name} is finite, so activations overflow; an expert or a mixture whose z is too large "
        "does that: train it with a smaller train.lr, or lower its alphas"
    )
