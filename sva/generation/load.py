"""A language model out of a checkpoint, in floats or in int8."""

import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sva.generation.lm import LM
from sva.generation.loaded_model import DTYPES, KV_DTYPES
from sva.models import layout
from sva.models.checkpoint_formats import open_checkpoint
from sva.models.hub import resolve
from sva.models.load import load_params
from sva.models.moe_config import sparse_cuts
from sva.models.stacks import cut
from sva.models.tokenizer import load_tokenizer
from sva.models.transformer import Transformer
from sva.models.vocabulary import excess
from sva.models.weights import expected
from sva.parallel.processes import is_writer
from sva.parallel.sharding import notes
from sva.utils.errors import UserError
from sva.utils.matmul import Int8, quantise_weight
from sva.utils.trees import select

_LOADED = {**DTYPES, "int8": jnp.float32}  # of activations
_ONE_DEVICE = "int8 weights are for one device; on a mesh load float32 or bfloat16"


def load(
    name_or_path: str,
    dtype: str = "float32",
    *,
    kv_dtype: str | None = None,
    scan_layers: bool | None = None,
    layers: str | None = None,
    mesh: Mesh | None = None,
    without: str | None = None,
    progress: bool = True,
) -> LM:
    """A language model from a path (Hugging Face directory or GGUF file), a hub id or a known name.

    Args:
      name_or_path: see `sva.models.hub.resolve` for where it is looked for.
      dtype: "float32" or "bfloat16", of weights and activations; or "int8", matrices of int8 with one float32 scale a
        row (`sva.quantise`) and activations in float32.
      kv_dtype: "bfloat16" keeps keys and values in half the memory of float32, "int8" in little more than a quarter
        (with one float32 scale for every slot of every head), for generating and evaluating; by default they have the
        activations' dtype.
      scan_layers: one compiled layer for all; by default on a TPU only.
      layers: that adapters are for, e.g. "0-39" (see `sva.utils.trees.layer_numbers`); None for all. A scan is cut
        where they begin and end.
      mesh: from `sva.make_mesh`, to lay the weights on; what its axes do not divide is said on stderr. Work with the
        model under `jax.set_mesh(mesh)`.
      without: target weights (see `sva.utils.trees.select`), of `layers`, to leave out: their spectra stand in for
        them, so that a model too large for both is held once. `LM.z`, ones, then makes every call run factored;
        `merge` gives such an LM too.
      progress: show bars on stderr.
    Raises:
      UserError: nothing there, an unsupported architecture, or a damaged checkpoint.
    """
    if dtype not in _LOADED:
        raise UserError(f"dtype={dtype!r} is not supported; use one of {', '.join(_LOADED)}")
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        raise UserError(f"kv_dtype={kv_dtype!r} is not supported; use one of {', '.join(KV_DTYPES)}")
    path = resolve(name_or_path)
    checkpoint = open_checkpoint(path)
    is_scanned = jax.default_backend() == "tpu" if scan_layers is None else scan_layers
    scan = cut(layers, checkpoint.config.num_layers, sparse_cuts(checkpoint.config.moe))  # raises: no such layers
    kept = KV_DTYPES[kv_dtype] if kv_dtype else None
    model = Transformer(checkpoint.config, _LOADED[dtype], scan_layers=is_scanned and scan, kv_dtype=kept)
    if dtype == "int8" and mesh is not None:
        raise UserError(_ONE_DEVICE)
    convert = quantise_weight if dtype == "int8" else jax.device_put
    absent = select(expected(model.cfg), without, layers) if without else []
    for note in notes(layout.params(model), mesh) if mesh is not None and is_writer() else ():
        print(f"sva: {note}", file=sys.stderr)
    # The tokenizer is built meanwhile: most of that is the import of transformers.
    with ThreadPoolExecutor(1, "tokenizer") as pool:
        tokenizing = pool.submit(load_tokenizer, path)
        params, known = load_params(
            checkpoint, model, mesh=mesh, without=frozenset(absent), matrix=convert, progress=progress
        )
        tokenizer = tokenizing.result()
    ones = {name: np.ones(min(checkpoint.shapes[name]), np.float32) for name in absent} if absent else None
    if tokenizer is not None and (note := excess(tokenizer, model.cfg.vocab_size)):
        print(f"sva: {name_or_path}: {note}", file=sys.stderr)
    quantisation = _quantised(checkpoint.quantisation) if dtype == "int8" else checkpoint.quantisation
    return LM(model, params, tokenizer, str(name_or_path), quantisation, known, mesh, z=ones)


def quantise(lm: LM) -> LM:
    """An LM whose matrices, embeddings included, are int8 with one float32 scale a row; activations stay as they are.

    A quarter of the memory to hold and to read: for rollouts and evaluation at small batches. Experts and adapters
    made for `lm` fit it: they add their change to the rounded weights. `decompose` and `save` see the rounded
    weights as floats, `merge` rounds what it merged. What it costs in accuracy: experiments/studies/int8.

    Raises:
      UserError: the model lies on a mesh.
    """
    if lm.mesh is not None:
        raise UserError(_ONE_DEVICE)
    specs, stored = expected(lm.model.cfg), lm.stored_params()
    named = {
        name: quantise_weight(weight) if len(specs[name].shape) == 2 and not isinstance(weight, Int8) else weight
        for name, weight in stored.items()
    }
    quantisation = _quantised(lm.quantisation)
    return LM(lm.model, lm.model.nest(named), lm.tokenizer, lm.name, quantisation, lm.known_fingerprint, z=lm.z)


def _quantised(quantisation: str | None) -> str:
    """The weights' own quantisation and what became of them."""
    return "int8" if quantisation in (None, "int8") else f"{quantisation.removesuffix(', int8')}, int8"
