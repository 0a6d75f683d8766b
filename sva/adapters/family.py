"""The protocol of what is trained: a member says what its raw values start from and do to each target weight.

    raw    what is trained: a tree of float32 arrays by weight name, one array or {part: array} a weight
    info   what stays fixed of a weight and the member may know: `Matrix`, or `sva.spectral.parametrisations.MatrixInfo`
    z      what raw values do to a weight: an `Adapter`, or what `sva.spectral.forms` runs and merges with a spectrum

A member is a frozen dataclass of its settings, so it is hashable (static under jit), and its methods are pure
functions over whole trees, keyed by weight name or nested as the model's, where scanned layers are stacked: every
array of an info, of raw and of z then has L in front.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from sva.adapters import spelling
from sva.utils.errors import UserError


class LinearAdapter(Protocol):
    """What a linear layer accepts in place of its plain product.

    The layer adds its bias b afterwards: an adapter that scales outputs, b included, holds a copy and adds (l - 1) b.
    """

    def __call__(self, x: jax.Array, w: Any) -> jax.Array:
        """[B, T, D_out] from x [B, T, D_in] and the layer's frozen w [D_out, D_in], an array or `Int8`."""
        ...


class Adapter(abc.ABC):
    """What a member that needs no spectrum does to one weight: a `LinearAdapter` that merges itself."""

    @abc.abstractmethod
    def __call__(self, x: jax.Array, w: Any) -> jax.Array:
        """See `LinearAdapter`."""

    @abc.abstractmethod
    def merge(self, w: jax.Array) -> jax.Array:
        """[D_out, D_in] float32, the adapted weight of w [D_out, D_in] float32."""

    def merged_bias(self) -> jax.Array | None:
        """[D_out], the adapted bias of the layer; None where it stays."""
        return None


@struct.dataclass
class Matrix:
    """What stays fixed of a target weight that is not decomposed; of scanned layers the arrays are stacked."""

    seed: Any  # [] uint32, of the weight's name and of the run's seed
    shape: tuple[int, int] = struct.field(pytree_node=False)  # (D_out, D_in)
    kind: str = struct.field(pytree_node=False)  # the module's own name, e.g. down_proj
    norms: Any = None  # [D_out] float32 lengths of the rows, for a member that reads them
    bias: Any = None  # [D_out], for a member that reads it, where the layer has one


@dataclasses.dataclass(frozen=True)
class Family(abc.ABC):
    """One parametrisation, over whole trees keyed by weight name or nested as the model's."""

    name: ClassVar[str]
    centre: ClassVar[float] = 0.0  # raw value from which `train.bound` is measured
    reads: ClassVar[tuple[str, ...]] = ("spectrum",)  # of each weight: its spectrum, or `norms` or `bias` of `Matrix`

    sides: ClassVar[Mapping[str, tuple[str | None, ...]]] = {}
    """Along which side of W each axis of a raw array lies, "out", "in" or neither, by part ("" where there is one);
    on a mesh it is divided as W is there. Parts that are left out are repeated on every device."""

    def __post_init__(self) -> None:
        spelling.check(self.name, self._settings())

    def __str__(self) -> str:
        """As configurations and expert files spell it, e.g. `projected:n=13,r=2`."""
        return str(spelling.Spelling(self.name, self._settings()))

    @property
    def has_spectra(self) -> bool:
        """Whether weights are decomposed for it."""
        return "spectrum" in self.reads

    @abc.abstractmethod
    def start(self, infos: Any) -> Any:
        """The raw tree, float32, from which training starts: the base model.

        Raises:
          UserError: a matrix has too few singular values, rows or columns for the settings.
        """

    @abc.abstractmethod
    def z(self, raw: Any, infos: Any) -> Any:
        """z of each matrix, float32, in a tree as `infos`; raw values may have any floating dtype."""

    @property
    def has_noise(self) -> bool:
        """Whether training draws random numbers in each layer, as dropout does."""
        return False

    def noisy(self, z: Any, infos: Any, seed: jax.Array) -> Any:
        """z as training runs it, with noise drawn from a seed [] uint32."""
        del infos, seed
        return z

    def _settings(self) -> dict[str, float]:
        return dataclasses.asdict(self)


class PerMatrix(Family):
    """A member that treats each matrix by itself: two functions of one matrix, lifted here to whole trees."""

    @abc.abstractmethod
    def first(self, info: Any) -> Any:
        """Raw float32 values of the base model."""

    @abc.abstractmethod
    def one_z(self, raw: Any, info: Any) -> Any:
        """z of raw values."""

    def start(self, infos: Any) -> Any:
        """A tree as `infos`."""
        return jax.tree.map(self.first, infos, is_leaf=is_info)

    def z(self, raw: Any, infos: Any) -> Any:
        """`one_z` of every matrix; raw is a tree as `infos`."""
        return jax.tree.map(lambda info, raw: self.one_z(raw, info), infos, raw, is_leaf=is_info)


def is_info(x: Any) -> bool:
    """Whether x is one matrix's info, of whatever kind: what has a seed."""
    return hasattr(x, "seed")


def lead(info: Matrix) -> tuple[int, ...]:
    """(L,) where scanned layers are stacked, else ()."""
    return jnp.shape(info.seed)


def require_rank(member: Family, r: int, info: Matrix) -> None:
    """Raises UserError for a rank above the matrix's own."""
    if r > min(info.shape):
        raise UserError(
            f"{member} is of a higher rank than a target matrix: {info.kind} is {info.shape[0]} x {info.shape[1]}; "
            f"lower r to {min(info.shape)} or less"
        )
