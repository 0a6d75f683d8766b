"""What stays fixed of the target weights while an expert is trained or read: spectra, or what its member needs else."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from sva.adapters.draws import seed_of
from sva.adapters.family import Family, Matrix
from sva.generation.decompose import spectra_of
from sva.generation.loaded_model import LoadedModel
from sva.generation.merge import merge
from sva.models.weights import expected
from sva.parallel.sharding import place, replicated
from sva.spectral.expert import Expert
from sva.spectral.parametrisations import Frozen
from sva.utils.errors import UserError
from sva.utils.matmul import floats

_Model = TypeVar("_Model", bound=LoadedModel)


def frozen(lm: LoadedModel, expert: Expert, *, progress: bool = True) -> dict[str, Frozen]:
    """What `expert.z` reads of the weights that the expert adapts.

    Raises:
      UserError: the model has no linear layer of such a name.
    """
    return frozen_of(lm, expert.member, expert.names, progress=progress)


def merge_expert(lm: _Model, expert: Expert, *, progress: bool = True) -> _Model:
    """`sva.merge` of one expert, of any parametrisation."""
    about = frozen(lm, expert, progress=progress)
    return merge(lm, about, expert.z(about))


def frozen_of(
    lm: LoadedModel, member: Family, names: Sequence[str], *, seed: int = 0, progress: bool = True
) -> dict[str, Frozen]:
    """{weight name: its Spectrum, or for a member that reads none its Matrix}; nothing is decomposed for the latter.

    Args:
      seed: of the run, for members that start from random numbers.
    Raises:
      UserError: the model has no linear layer with a weight of such a name, or was loaded without it.
    """
    if member.has_spectra:
        return dict(spectra_of(lm, names, progress=progress))
    shapes = {name: leaf.shape for name, leaf in expected(lm.model.cfg).items()}
    for name in names:
        if len(shapes.get(name, ())) != 2:
            what = f"has {len(shapes[name])} dimensions" if name in shapes else "is not there"
            raise UserError(f"{lm.name}: {name} {what}, {member} adapts matrices; is the expert for another model?")
    weights = lm.stored_params()
    if missing := [name for name in names if name not in weights]:
        raise UserError(f"{lm.name} was loaded without {missing[0]}, which {member} adapts; load it with its weights")
    found = {}
    for name in names:
        module = name.removesuffix(".weight")
        norms = _norms(weights[name]) if "norms" in member.reads else None
        bias = weights.get(f"{module}.bias") if "bias" in member.reads else None
        kind = module.rpartition(".")[2]
        out, into = shapes[name]
        found[name] = Matrix(seed_of(f"{seed} {name}"), (out, into), kind, norms, bias)
    if lm.mesh is not None:
        everywhere = replicated(lm.mesh)
        found = place(found, jax.tree.map(lambda _: everywhere, found))
    return found


@jax.jit
def _norms(w: Any) -> jax.Array:
    """[D_out] float32 lengths of the rows of w."""
    return jnp.linalg.norm(floats(w, jnp.float32).astype(jnp.float32), axis=1)
