"""Which temperatures logits can be divided by; without JAX, so that settings are checked before it is imported."""

import math

from sva.utils.errors import UserError

_LEAST = 1e-6  # far below it float32 logits overflow, and it already draws the likeliest token


def check_temperature(name: str, value: float) -> None:
    """Raises UserError unless logits can be divided by this temperature."""
    if not value > 0:
        raise UserError(f"{name}={value} must be above 0; for the likeliest token use Greedy()")
    if not _LEAST <= value < math.inf:
        raise UserError(f"{name}={value} must be a finite number of at least {_LEAST}; 1 changes nothing")
