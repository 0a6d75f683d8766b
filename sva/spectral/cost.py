"""What each form of a layer costs, and the cheapest exact one."""

from typing import Literal

from sva.spectral.forms import Spectrum

Form = Literal["dense", "factored", "delta"]
Use = Literal["train", "one", "rows", "exact_base"]


def multiply_adds(spectrum: Spectrum, form: Form, k: int | None = None) -> int:
    """Of one token through this form; the delta form on k components, all R by default.

    Each number that a form holds takes part in one multiply-add a token, so this is also how many numbers a decode
    step reads for the matrix: `multiply_adds` times the size of a number are its bytes.
    """
    out, into, rank = spectrum.u.shape[-2], spectrum.vt.shape[-1], spectrum.s.shape[-1]
    components = rank if k is None else k
    if form == "dense":
        return out * into
    if form == "factored":
        return rank * (out + into + 1)
    return out * into + components * (out + into + 1)


def cheapest(spectrum: Spectrum, use: Use, *, moved: int | None = None, tokens: int | None = None) -> Form:
    """The form that gives U diag(s z) V^T exactly for the fewest multiply-adds a token.

    With m the smaller and M the larger side of W, and k components that z moves at all:

        dense     m M, and m^2 M once to merge     one product with W'
        factored  m (m + M)                        1 + m / M of dense: twice for a square W, 1.29 for 4096 x 14336
        delta     m M + k (m + M)                  less than factored where k < m^2 / (m + M): half of m if square

    - "one", a z for all rows and no gradient: dense, once the merge is spread over more than about M tokens; for
      fewer factored (or delta, where few components move).
    - "rows", a z for each row: there is no one W', so factored, or delta where few components move.
    - "train", gradients in z: as "rows". Dense would form W' and a gradient of its shape for every matrix to save, at
      best (square, many tokens), a quarter: 3 m M a token, forward and backward, against 4.
    - "exact_base": rows of the base in the batch must be the base bit for bit, which only delta gives.

    A truncated spectrum (R < m) is not W: the factored form would lose the rest, so it is left out of the choice.

    Args:
      spectrum: of the matrix; its layers may be stacked.
      use: see above.
      moved: k; all R by default.
      tokens: that one z is used for ("one" only); None: so many that merging costs nothing.
    """
    out, into, rank = spectrum.u.shape[-2], spectrum.vt.shape[-1], spectrum.s.shape[-1]
    delta = multiply_adds(spectrum, "delta", moved)
    if use == "exact_base":
        return "delta"
    costs: dict[Form, float] = {}
    if use == "one":
        merging = rank * out * into / tokens if tokens else 0.0
        costs["dense"] = multiply_adds(spectrum, "dense") + merging
    if rank == min(out, into):
        costs["factored"] = multiply_adds(spectrum, "factored")
    costs["delta"] = delta
    return min(costs, key=lambda form: costs[form])
