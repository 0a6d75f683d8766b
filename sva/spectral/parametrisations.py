"""Parametrisations: what an expert stores, and what it stands for in each matrix W = U diag(s) V^T.

| spelt                | weight                                         | numbers trained a matrix | source           |
|----------------------|------------------------------------------------|--------------------------|------------------|
| `linear`             | U diag(s z) V^T                                | R                        | arXiv 2501.06252 |
| `sigmoid_nuclear`    | U diag(s z) V^T, z = c sigmoid(p)              | R                        | its public code  |
| `top_k:k=64`         | U diag(s z) V^T, z = 1 but for the k largest s | k                        |                  |
| `tail_only:k=64`     | U diag(s z) V^T, z = 1 but for the k smallest  | k                        |                  |
| `banded:width=2`     | U (diag(s) + M) V^T, M of 2 w + 1 diagonals    | (2 w + 1) R - w (w + 1)  | arXiv 2405.19597 |
| `core:r=16`          | W + U_r diag(s_r) C V_r^T                      | r^2                      | arXiv 2405.17604 |
| `projected:n=13,r=2` | W + U_r diag(s_r) (sum_i v_i P_i) V_r^T        | n for all together       | arXiv 2602.04118 |
| `lora:r=16,alpha=32` | W + (alpha / r) B A; `rslora`, `dora`          | r (D_in + D_out)         | arXiv 2106.09685 |
| `ia3`                | diag(l) W, or W diag(l)                        | D_out or D_in            | arXiv 2205.05638 |
| `full`               | W + D                                          | D_out D_in               |                  |

R = min(D_out, D_in) singular values, c = sum(s) / sum(s sigmoid(p)), w the width. Every member starts at the base: the
first four at z = 1, up to the rounding of U diag(s) V^T (about 1e-6 relative in float32); SVFT's bands, LoRA-XS's core
and TinyLoRA's v at 0, bit for bit. The first four yield an effective z, which is what inference mixes and gives to
single rows; the others are merged. The last three need no decomposition and are said in `sva.adapters`, as is the
protocol of all, `sva.adapters.family.Family`.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sva.adapters import spelling
from sva.adapters.draws import seed_of, uniform
from sva.adapters.family import Family, Matrix, PerMatrix, is_info
from sva.adapters.full import Full
from sva.adapters.ia3 import IA3
from sva.adapters.lora import DoRA, LoRA, RsLoRA
from sva.spectral.forms import Bands, Core, Spectrum, Z
from sva.utils.by_name import ByName
from sva.utils.errors import UserError

Frozen = Spectrum | Matrix
"""What stays fixed of a target weight: its spectrum, or for a member that reads none what it may know of W."""


class MatrixInfo(NamedTuple):
    """What a parametrisation may know of a decomposed matrix. Of scanned layers both are stacked: [L, R] and [L]."""

    s: Any  # [R], the singular values, descending
    seed: Any  # [] uint32, a number of the matrix's own


def matrix_infos(frozen: Mapping[str, Frozen]) -> dict[str, Any]:
    """{name: MatrixInfo of a spectrum, or the Matrix itself} of what is keyed by weight name."""
    values = singular_values(frozen)
    return {name: MatrixInfo(values[name], seed_of(name)) if name in values else frozen[name] for name in frozen}


def singular_values(frozen: Mapping[str, Frozen]) -> Mapping[str, Any]:
    """{name: s [R]} of the spectra keyed by weight name, without a slice of their stacks where layers are stacked."""
    if isinstance(frozen, ByName):
        return frozen.map(lambda spectrum: spectrum.s)
    return {name: x.s for name, x in frozen.items() if isinstance(x, Spectrum)}


def require_values(member: Family, size: int, s: Any) -> None:
    """Raises UserError unless s [..., R] has at least `size` singular values."""
    if s.shape[-1] < size:
        raise UserError(f"{member} needs {size} singular values, a target matrix has {s.shape[-1]}; lower the setting")


class Spectral(PerMatrix):
    """A member that treats each decomposed matrix by itself: two functions of raw values and of s."""

    @abc.abstractmethod
    def init(self, s: jax.Array) -> jax.Array:
        """Raw float32 values of the base model, from s [..., R]."""

    @abc.abstractmethod
    def matrix_z(self, raw: jax.Array, s: jax.Array) -> Z:
        """z of raw values, given s [..., R]."""

    def first(self, info: MatrixInfo) -> jax.Array:
        """`init` of the singular values."""
        return self.init(info.s)

    def one_z(self, raw: jax.Array, info: MatrixInfo) -> Z:
        """`matrix_z` with the singular values."""
        return self.matrix_z(raw, info.s)


class Diagonal(Spectral):
    """A member whose z is an effective z, so that its experts can be mixed and given to single rows."""

    @abc.abstractmethod
    def matrix_z(self, raw: jax.Array, s: jax.Array) -> jax.Array:
        """Effective z [..., R] float32."""


@dataclasses.dataclass(frozen=True)
class Linear(Diagonal):
    """z itself is trained, from ones: the paper's formula (arXiv 2501.06252, section 3.1)."""

    name = "linear"
    centre = 1.0

    def init(self, s: jax.Array) -> jax.Array:
        """Ones [..., R]."""
        return jnp.ones(s.shape, jnp.float32)

    def matrix_z(self, raw: jax.Array, s: jax.Array) -> jax.Array:
        """raw."""
        del s
        return raw.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class SigmoidNuclear(Diagonal):
    """z = c sigmoid(p), c = sum(s) / sum(s sigmoid(p)): the public code, whose rescaling keeps the nuclear norm.

    c is differentiated through, so any constant p is the identity and the gradient along "all of z" is zero.
    Deviation: the public code draws p ~ N(0.1, 0.01^2) and so starts near the base; here p starts at 0.1, at the
    base, unless `train.init_noise` adds such noise.
    """

    name = "sigmoid_nuclear"

    def init(self, s: jax.Array) -> jax.Array:
        """0.1 everywhere [..., R]."""
        return jnp.full(s.shape, 0.1, jnp.float32)

    def matrix_z(self, raw: jax.Array, s: jax.Array) -> jax.Array:
        """c sigmoid(raw)."""
        gate = jax.nn.sigmoid(raw.astype(jnp.float32))
        s = s.astype(jnp.float32)
        weighted = jnp.sum(s * gate, axis=-1, keepdims=True)
        total = jnp.sum(s, axis=-1, keepdims=True)
        # A matrix of zeros has no nuclear norm to keep: z is then the gate itself, and finite.
        return gate * jnp.where(total > 0, total / jnp.where(total > 0, weighted, 1.0), 1.0)


@dataclasses.dataclass(frozen=True)
class TopK(Diagonal):
    """z of the k largest singular values is trained, from ones; the others keep theirs."""

    k: int

    name = "top_k"
    centre = 1.0

    def init(self, s: jax.Array) -> jax.Array:
        """Ones [..., k]."""
        require_values(self, self.k, s)
        return jnp.ones((*s.shape[:-1], self.k), jnp.float32)

    def matrix_z(self, raw: jax.Array, s: jax.Array) -> jax.Array:
        """raw, then ones."""
        return jnp.concatenate([raw.astype(jnp.float32), _ones(s, self.k)], axis=-1)


@dataclasses.dataclass(frozen=True)
class TailOnly(Diagonal):
    """z of the k smallest singular values is trained, from ones; the others keep theirs."""

    k: int

    name = "tail_only"
    centre = 1.0

    def init(self, s: jax.Array) -> jax.Array:
        """Ones [..., k]."""
        require_values(self, self.k, s)
        return jnp.ones((*s.shape[:-1], self.k), jnp.float32)

    def matrix_z(self, raw: jax.Array, s: jax.Array) -> jax.Array:
        """Ones, then raw."""
        return jnp.concatenate([_ones(s, self.k), raw.astype(jnp.float32)], axis=-1)


def _ones(s: jax.Array, k: int) -> jax.Array:
    """The z of all but k of s [..., R]."""
    return jnp.ones((*s.shape[:-1], s.shape[-1] - k), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Banded(Spectral):
    """W' = U (S + M) V^T, M zero but for its main diagonal and `width` diagonals on either side, from M = 0.

    SVFT (arXiv 2405.19597), its banded pattern. Deviation: the paper's M has the shape of W; here it is [R, R], since
    further rows or columns would need singular vectors that a thin decomposition does not have. Raw values are the
    diagonals one after another, from the lowest to the highest, without padding.
    """

    width: int

    name = "banded"

    def init(self, s: jax.Array) -> jax.Array:
        """Zeros [..., (2 width + 1) R - width (width + 1)]."""
        require_values(self, self.width + 1, s)
        return jnp.zeros((*s.shape[:-1], sum(self._lengths(s.shape[-1]))), jnp.float32)

    def matrix_z(self, raw: jax.Array, s: jax.Array) -> Bands:
        """The same diagonals as rows, moved to where they begin in M."""
        ends = np.cumsum(self._lengths(s.shape[-1]))[:-1]
        lead = ((0, 0),) * (raw.ndim - 1)
        diagonals = jnp.split(raw.astype(jnp.float32), ends, axis=-1)
        offsets = range(-self.width, self.width + 1)
        rows = [
            jnp.pad(diagonal, (*lead, (max(-offset, 0), max(offset, 0))))
            for offset, diagonal in zip(offsets, diagonals, strict=True)
        ]
        return Bands(jnp.stack(rows, axis=-2))

    def _lengths(self, size: int) -> list[int]:
        return [size - abs(offset) for offset in range(-self.width, self.width + 1)]


@dataclasses.dataclass(frozen=True)
class Cored(Spectral):
    """W' = W + U_r diag(s_r) C V_r^T, C [r, r] between the r leading singular vectors, from C = 0.

    LoRA-XS (arXiv 2405.17604). Deviation: the paper draws C from a narrow normal distribution and so starts near the
    base; zeros start at it, and their gradient is no zero, because both sides of C are frozen.
    """

    r: int

    name = "core"

    def init(self, s: jax.Array) -> jax.Array:
        """Zeros [..., r, r]."""
        require_values(self, self.r, s)
        return jnp.zeros((*s.shape[:-1], self.r, self.r), jnp.float32)

    def matrix_z(self, raw: jax.Array, s: jax.Array) -> Core:
        """diag(s_r) C."""
        return Core(s[..., : self.r, None].astype(jnp.float32) * raw.astype(jnp.float32))


SHARED = "shared"  # the key of raw values that belong to no single matrix


@dataclasses.dataclass(frozen=True)
class Projected(Family):
    """W' = W + U_r diag(s_r) (sum_i v_i P_i) V_r^T: n numbers v, from 0, for all matrices together.

    TinyLoRA (arXiv 2602.04118), everything tied. Each matrix has P_i [r, r] of its own, fixed and random: uniform
    with variance 1, a hash of the weight's name and the entry's place. Deviation: the paper draws normal numbers from
    a library's generator; integers hashed are the same with every version and on every device, so an expert file
    needs no P.
    """

    n: int
    r: int

    name = "projected"

    def start(self, infos: Any) -> dict[str, jax.Array]:
        """{"shared": zeros [n]}."""
        for info in jax.tree.leaves(infos, is_leaf=is_info):
            require_values(self, self.r, info.s)
        return {SHARED: jnp.zeros(self.n, jnp.float32)}

    def z(self, raw: Any, infos: Any) -> Any:
        """A tree of `Core` as `infos`."""
        v = raw[SHARED].astype(jnp.float32)

        def one(info: MatrixInfo) -> Core:
            p = projections(info.seed, (self.n, self.r, self.r))
            mixed = jnp.einsum("N,...NIJ->...IJ", v, p, precision=jax.lax.Precision.HIGHEST)
            return Core(info.s[..., : self.r, None].astype(jnp.float32) * mixed)

        return jax.tree.map(one, infos, is_leaf=is_info)


def projections(seed: Any, shape: tuple[int, ...]) -> jax.Array:
    """[..., *shape] float32 numbers of mean 0 and variance 1, uniform, fixed by seed [...] uint32 for ever."""
    return uniform(seed, shape, 3**0.5)


LINEAR = Linear()
SIGMOID_NUCLEAR = SigmoidNuclear()

_BY_NAME: dict[str, type[Family]] = {
    member.name: member
    for member in (Linear, SigmoidNuclear, TopK, TailOnly, Banded, Cored, Projected, LoRA, RsLoRA, DoRA, IA3, Full)
}
EXAMPLES = tuple(_BY_NAME[example.name](**example.settings) for example in spelling.EXAMPLES.values())


def family(text: str) -> Family:
    """The parametrisation spelt so: a name, and after a colon its settings, e.g. `core:r=16`.

    Raises:
      UserError: no such parametrisation (all are listed), a setting that it lacks, misses or cannot take.
    """
    name, settings = spelling.parse(text)
    return _BY_NAME[name](**settings)


def count(member: Family, infos: Any) -> int:
    """How many numbers are trained. Only shapes are looked at: s may be a jax.ShapeDtypeStruct."""
    return sum(int(np.prod(shape)) for shape in _shapes(jax.eval_shape(member.start, infos)).values())


def check_raw(member: Family, raw: Any, infos: Any) -> None:
    """Raises UserError unless raw has the keys and the shapes that `member` trains on these matrices."""
    wanted, found = _shapes(jax.eval_shape(member.start, infos)), _shapes(raw)
    for path, shape in wanted.items():
        if path not in found:
            raise UserError(f"raw has no {path}, which {member} trains here; give all {len(wanted)} of its entries")
        if found[path] != shape:
            raise UserError(f"{path}: raw has shape {list(found[path])}, {member} needs {list(shape)}")
    for path in found:
        if path not in wanted:
            raise UserError(f"raw holds {path}, which is none of the {len(wanted)} entries that {member} trains here")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf) for path, leaf in leaves}
