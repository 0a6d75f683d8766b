"""Spectra through HTTP: which matrices experts adapt, and what a mixture does to the singular values of one."""

from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sva.serving.bank import Bank
from sva.serving.bodies import LARGEST_WEIGHT
from sva.serving.errors import ApiError
from sva.serving.service import api_errors


class Spectra:
    """The endpoints of /v1/spectra."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank

    async def weights(self, request: Request) -> Response:
        """GET /v1/spectra: the weights whose singular values experts scale."""
        data = [{"weight": name, "object": "weight", "rank": rank} for name, rank in self._bank.ranks.items()]
        return JSONResponse({"object": "list", "data": data})

    async def spectrum(self, request: Request) -> Response:
        """GET /v1/spectra/{weight}?EXPERT=ALPHA&...: s, and the z of the mixture that the query names."""
        weight, mixture = request.path_params["weight"], _mixture(request)
        with api_errors():
            s, z = self._bank.spectrum(weight, mixture)
        told: dict[str, Any] = {"weight": weight, "object": "spectrum", "experts": mixture}
        return JSONResponse(told | {"s": _short(s), "z": _short(z)})


def _mixture(request: Request) -> dict[str, float]:
    """The weight of each expert in the query.

    Raises:
      ApiError: 400, a weight that is no number from 0 to 100, or an expert that is named twice.
    """
    found: dict[str, float] = {}
    for name, text in request.query_params.multi_items():
        if name in found:
            raise ApiError(400, f"{name[:100]} has two weights; give one", param=name[:100])
        try:
            alpha = float(text)
        except ValueError:
            alpha = float("nan")
        if not 0 <= alpha <= LARGEST_WEIGHT:
            sentence = f"{name[:100]}={text[:40]}: the weight of an expert is a number from 0 to {LARGEST_WEIGHT}"
            raise ApiError(400, sentence, param=name[:100])
        found[name] = alpha
    return found


def _short(values: np.ndarray) -> list[float]:
    """float32 values as the shortest numbers that read back as the same float32."""
    return values.astype(str).astype(float).tolist()
