"""A loaded language model, and what one does with it: `load`, `decompose`, `merge`."""

import dataclasses
import sys
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from sva.generation import decode as generation
from sva.generation.decode import Generation
from sva.generation.finite import check_finite
from sva.generation.sampling import Greedy, Sampling
from sva.models import layout
from sva.models.checkpoint import Checkpoint, match, open_checkpoint
from sva.models.export import save_checkpoint
from sva.models.hub import resolve
from sva.models.load import digest, fingerprint, load_params
from sva.models.tokenizer import load_tokenizer
from sva.models.transformer import Transformer, logits
from sva.models.vocabulary import check_ids, excess
from sva.models.weights import expected, split_name, unnest
from sva.parallel.processes import to_host
from sva.parallel.sharding import notes, place, shardings
from sva.spectral import forms, store
from sva.spectral.cost import cheapest
from sva.spectral.expert import check_vectors, check_z
from sva.spectral.forms import Factored, LinearAdapter, Spectrum
from sva.spectral.store import Record
from sva.spectral.svd import require_whole
from sva.utils.errors import UserError
from sva.utils.matmul import Int8, floats, quantise_weight
from sva.utils.padding import batch_bucket, budget_bucket, common_prefix, drop_prefix, left_pad, length_bucket, pad_rows
from sva.utils.paths import spectra_dir
from sva.utils.trees import select

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
KV_DTYPES = {**DTYPES, "int8": jnp.int8}
_LOADED = {**DTYPES, "int8": jnp.float32}  # of activations


@dataclasses.dataclass(frozen=True)
class LM:
    """A model, its weights and its tokenizer.

    `model` is frozen and hashable (static under jit), `params` its linen tree (traced). An LM itself never enters
    jit, nor is it closed over.
    """

    model: Transformer
    params: Mapping[str, Any]
    tokenizer: Any  # a transformers PreTrainedTokenizerFast, or None
    name: str
    quantisation: str | None = None  # of the file that the weights came from
    known_fingerprint: str | None = dataclasses.field(default=None, repr=False)
    mesh: Mesh | None = None  # on which the params lie by the rules of `sva.parallel.sharding`; None: one device
    spectra: dict[str, Spectrum] = dataclasses.field(default_factory=dict, repr=False, compare=False)  # read so far
    z: Mapping[str, Any] | None = dataclasses.field(default=None, repr=False)  # of calls that give none

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 over every weight as stored; of weights made in memory, as `save` would store them."""
        if self.known_fingerprint:
            return self.known_fingerprint
        return fingerprint((name, digest(np.asarray(weight))) for name, weight in self.named_params().items())

    def named_params(self) -> dict[str, jax.Array]:
        """The weights that it holds, by checkpoint name; those kept as int8 as the floats they stand for."""
        return {name: floats(weight, self.model.dtype) for name, weight in _held(self).items()}

    def logits(self, input_ids: Any, attention_mask: Any, z: Mapping[str, Any] | None = None) -> jax.Array:
        """[B, T, V] float32 logits, with the effective z ({name: [R] or [B, R]}) where one is given.

        See `sva.logits`. Raises UserError for a token id outside the vocabulary or a z that does not fit.
        """
        ids, mask = self._check(input_ids, attention_mask)
        params, adapter = self.params, None
        z = self.z if z is None else z
        if z is not None:
            params, adapter = adapted(self, _fitting(self, z, len(ids)), z, tokens=ids.size)
        return logits(self.model, params, ids, mask, adapter)

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any,
        max_new_tokens: int,
        eos_ids: Sequence[int] = (),
        sampling: Sampling | None = None,
        key: jax.Array | None = None,
        z: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Continues each prompt until one of `eos_ids` or for max_new_tokens tokens.

        Shapes are bucketed: batches and lengths of one bucket share one compiled program. What all prompts have in
        common at their start, as a chat template's system message, is read once (in steps of 8 tokens), unless each
        row has a z of its own.

        Args:
          input_ids: [B, T] int.
          attention_mask: [B, T] int, 0 for padding, on either side.
          max_new_tokens: at least 1.
          eos_ids: tokens that end a row; none for always max_new_tokens.
          sampling: a strategy of `sva.generation.sampling`; Greedy by default.
          key: one typed key, or one a row [B]; needed by every strategy but Greedy. Of one key, row i takes
            fold_in(key, i).
          z: effective z, {name: [R] or [B, R]}; one for all rows is merged into the weights once, one a row runs in
            the factored form.
        Returns:
          Generation: tokens [B, max_new_tokens], logprobs [B, max_new_tokens], lengths [B], host arrays.
        Raises:
          UserError: an empty prompt, prompts that do not leave max_new_tokens of the context, a token id outside the
            vocabulary, a missing key, or a log-probability that is not finite.
        """
        sampling = sampling or Greedy()
        ids, mask = self._check(input_ids, attention_mask)
        check_prompts(mask.sum(axis=1), max_new_tokens, self.model.cfg.max_position_embeddings)
        rows = batch_bucket(len(ids))
        keys = row_keys(key, len(ids), rows, sampling)
        params, adapter = self.params, None
        z = self.z if z is None else z
        if z is not None:
            spectra = _fitting(self, z, len(ids))
            z = {name: pad_rows(np.asarray(x), rows) if np.ndim(x) == 2 else x for name, x in z.items()}
            params, adapter = adapted(self, spectra, z)
        ids, mask = left_pad(ids, mask, length_bucket(int(mask.sum(axis=1).max())))
        rows_ids = [row[keep] for row, keep in zip(ids, mask.astype(bool), strict=True)]
        shared = common_prefix(rows_ids) if adapter is None else 0
        prefix_ids = rows_ids[0][:shared]
        ids, mask = left_pad(ids, drop_prefix(mask, shared), ids.shape[1] - shared)
        ids, mask = pad_rows(ids, rows), pad_rows(mask, rows)
        out = generation.generate(
            self.model,
            params,
            ids,
            mask,
            jnp.asarray(max_new_tokens, jnp.int32),
            pad_eos(eos_ids),
            keys,
            adapter,
            prefix_ids=prefix_ids if shared else None,
            max_new_tokens=budget_bucket(max_new_tokens),
            sampling=sampling,
        )
        tokens, logprobs, lengths = (x[: np.shape(input_ids)[0]] for x in to_host(out))  # sliced on the host:
        check_finite(self, logprobs, "prompt")
        return Generation(tokens[:, :max_new_tokens], logprobs[:, :max_new_tokens], lengths)  # nothing to compile

    def save(self, directory: str | Path) -> None:
        """Writes a Hugging Face checkpoint (config, safetensors, tokenizer) that transformers loads.

        Raises:
          UserError: the directory is not empty, or the disk is full.
        """
        tensors = ((name, np.asarray(weight)) for name, weight in self.named_params().items())
        save_checkpoint(directory, self.model.cfg, tensors, self.tokenizer)

    def _check(self, input_ids: Any, attention_mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask as host arrays, once they make sense."""
        ids, mask = np.asarray(input_ids), np.asarray(attention_mask)
        cfg = self.model.cfg
        if ids.ndim != 2 or ids.shape != mask.shape or ids.shape[0] == 0:
            raise UserError(f"input_ids and attention_mask must both be [B, T]; got {ids.shape} and {mask.shape}")
        if ids.dtype.kind not in "iu":
            raise UserError(f"input_ids must be whole numbers, not {ids.dtype}")
        check_ids(ids, cfg.vocab_size, self.tokenizer)
        return ids.astype(np.int32), mask.astype(np.int32)


def load(
    name_or_path: str,
    dtype: str = "float32",
    *,
    kv_dtype: str | None = None,
    scan_layers: bool | None = None,
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
      mesh: from `sva.make_mesh`, to lay the weights on; what its axes do not divide is said on stderr. Work with the
        model under `jax.set_mesh(mesh)`.
      without: target weights (see `sva.utils.trees.select`) to leave out: their spectra stand in for them, so that a
        model too large for both is held once. `LM.z`, ones, then makes every call run factored; `merge` gives such an
        LM too.
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
    scan = jax.default_backend() == "tpu" if scan_layers is None else scan_layers
    kept = KV_DTYPES[kv_dtype] if kv_dtype else None
    model = Transformer(checkpoint.config, _LOADED[dtype], scan_layers=scan, kv_dtype=kept)
    if dtype == "int8" and mesh is not None:
        raise UserError("int8 weights are for one device; on a mesh load float32 or bfloat16")
    convert = quantise_weight if dtype == "int8" else jnp.asarray
    absent = select(expected(model.cfg), without) if without else []
    for note in [] if mesh is None else notes(layout.params(model), mesh):
        print(f"sva: {note}", file=sys.stderr)
    params, known = load_params(
        checkpoint, model, mesh=mesh, without=frozenset(absent), matrix=convert, progress=progress
    )
    ones = {name: np.ones(min(checkpoint.shapes[name]), np.float32) for name in absent} if absent else None
    tokenizer = load_tokenizer(path)
    if tokenizer is not None and (note := excess(tokenizer, model.cfg.vocab_size)):
        print(f"sva: {name_or_path}: {note}", file=sys.stderr)
    quantisation = _noted(checkpoint.quantisation) if dtype == "int8" else checkpoint.quantisation
    return LM(model, params, tokenizer, str(name_or_path), quantisation, known, mesh, z=ones)


def quantise(lm: LM) -> LM:
    """An LM whose matrices, embeddings included, are int8 with one float32 scale a row; activations stay as they are.

    A quarter of the memory to hold and to read: for rollouts and evaluation at small batches. Experts and adapters
    made for `lm` fit it: they add their change to the rounded weights. `decompose` and `save` see the rounded
    weights as floats, `merge` rounds what it merged. What it costs in accuracy: experiments/studies/int8.
    """
    specs, held = expected(lm.model.cfg), _held(lm)
    named = {
        name: quantise_weight(weight) if len(specs[name].shape) == 2 and not isinstance(weight, Int8) else weight
        for name, weight in held.items()
    }
    quantisation = _noted(lm.quantisation)
    return LM(lm.model, lm.model.nest(named), lm.tokenizer, lm.name, quantisation, lm.known_fingerprint, z=lm.z)


def _noted(quantisation: str | None) -> str:
    """The weights' own quantisation and what became of them."""
    return "int8" if quantisation in (None, "int8") else f"{quantisation.removesuffix(', int8')}, int8"


def _held(lm: LM) -> dict[str, Any]:
    """The weights by checkpoint name, as they are held."""
    return unnest(lm.params, layout.held(lm.model, lm.params), scan=lm.model.scan_layers)


def decompose(lm: LM, targets: str = "mlp", *, rank: int | None = None, progress: bool = True) -> dict[str, Spectrum]:
    """{weight name: Spectrum(u [D_out, R], s [R], vt [R, D_in])} of the target weights, s descending.

    u and vt have the model's dtype, s is float32. Computed once for each base model and kept under the cache
    directory (`sva.utils.paths.cache_dir`), where `sva decompose` puts them without loading the model.

    Args:
      lm: the base model.
      targets: see `sva.utils.trees.select`.
      rank: components to keep, R = min(rank, D_out, D_in). A truncated spectrum serves the delta form, in which the
        dropped components keep z = 1, and `merge`; `factored` and `reinforce_loss` need all and refuse it.
      progress: show a bar on stderr.
    Raises:
      UserError: `targets` matches nothing, rank is below 1, or a weight holds NaN or infinite values.
    """
    names = select(expected(lm.model.cfg), targets)
    return spectra_of(lm, names, progress=progress) if rank is None else _spectra(lm, names, rank, progress)


def decompose_checkpoint(
    name_or_path: str,
    targets: str = "mlp",
    dtype: str = "float32",
    *,
    rank: int | None = None,
    share: tuple[int, int] = (0, 1),
    progress: bool = True,
) -> tuple[Path, list[Record]]:
    """Puts into the cache what `decompose` of the loaded model would, one matrix in memory at a time for each worker.

    The model is not loaded: its weights are read once for the fingerprint, one by one, and the targets once more.

    Args:
      name_or_path: as in `load`.
      targets, rank: as in `decompose`.
      dtype: of the model that will use the spectra; the weights are rounded to it first, as loading does.
      share: (i, n): this process takes every n-th matrix from the i-th on, counted among those of like shape, so that
        n processes or hosts with one cache directory share the work evenly.
      progress: show a bar on stderr.
    Returns:
      The cache's directory, and the record of each matrix of this share, in the checkpoint's order.
    Raises:
      UserError: as `load` and `decompose`; a share that does not exist.
    """
    index, count = share
    if not 0 <= index < count:
        raise UserError(
            f"share {index}/{count} does not exist; {count} processes take 0/{count} to {count - 1}/{count}"
        )
    checkpoint = open_checkpoint(resolve(name_or_path))
    specs = expected(checkpoint.config)
    match({name: spec.shape for name, spec in specs.items()}, checkpoint.shapes, checkpoint.path)
    names = select(specs, targets)
    mine = sorted(names, key=lambda name: specs[name].shape)[index::count]
    known = fingerprint(
        (name, digest(checkpoint.read(name)))
        for name in tqdm(specs, "fingerprint", unit="weight", file=sys.stderr, disable=not progress, leave=False)
    )

    held = np.dtype(DTYPES[dtype])
    sources = {name: store.Source(specs[name].shape, partial(_read, checkpoint, name, held)) for name in mine}
    directory = _spectra_dir(known, dtype, rank)
    records = {
        record.name: record
        for record, _ in store.stream(sources, known, directory, dtype=dtype, rank=rank, progress=progress)
    }
    return directory, [records[name] for name in names if name in records]


def spectra_of(lm: LM, names: Sequence[str], *, progress: bool = True) -> dict[str, Spectrum]:
    """`decompose` for weights given by name.

    Raises:
      UserError: the model has no linear layer with a weight of such a name.
    """
    missing = [name for name in names if name not in lm.spectra]
    if missing:
        adaptable = set(select(expected(lm.model.cfg), "all"))
        unknown = [name for name in missing if name not in adaptable]
        if unknown:
            raise UserError(f"{lm.name} has no linear layer {unknown[0]} to adapt; is the expert for another model?")
        lm.spectra.update(_spectra(lm, missing, None, progress))
    return {name: lm.spectra[name] for name in names}


def _spectra(lm: LM, names: Sequence[str], rank: int | None, progress: bool) -> dict[str, Spectrum]:
    """Spectra in the model's dtype, out of the store, on the model's devices; one matrix at a time is on the host."""
    dtype = np.dtype(lm.model.dtype)
    is_shared = lm.mesh is not None and lm.mesh.is_multi_process
    weights = {} if is_shared else _held(lm)
    kept = "int8" if any(isinstance(weights.get(name), Int8) for name in names) else dtype.name
    directory = _spectra_dir(lm.fingerprint, kept, rank)
    settings: dict[str, Any] = {"dtype": dtype.name, "rank": rank, "progress": progress}
    if not weights.keys() >= set(names):
        # This process holds parts of the weights at most: it decomposes its share of them out of the checkpoint.
        checkpoint = open_checkpoint(resolve(lm.name))
        shapes = {name: spec.shape for name, spec in expected(lm.model.cfg).items()}
        sources = {name: store.Source(shapes[name], partial(_read, checkpoint, name, dtype)) for name in names}
        mine = {name: sources[name] for name in list(names)[jax.process_index() :: jax.process_count()]}
        for _ in store.stream(mine, lm.fingerprint, directory, **settings):
            pass
        if is_shared:
            multihost_utils.sync_global_devices("sva: spectra")
    else:
        sources = {
            name: store.Source(
                weights[name].shape, lambda name=name: np.asarray(floats(weights[name], jnp.float32), np.float32)
            )
            for name in names
        }
    placed = {
        record.name: _on_devices(lm, record.name, Spectrum(u.astype(dtype), s, vt.astype(dtype)))
        for record, (u, s, vt) in store.stream(sources, lm.fingerprint, directory, **settings)
    }
    return {name: placed[name] for name in names}


def _on_devices(lm: LM, name: str, spectrum: Spectrum) -> Spectrum:
    if lm.mesh is None:
        return jax.tree.map(jnp.asarray, spectrum)
    leaves = layout.spectrum(expected(lm.model.cfg)[name], len(spectrum.s))
    return place(spectrum, shardings(leaves, lm.mesh))


def _read(checkpoint: Checkpoint, name: str, dtype: np.dtype) -> np.ndarray:
    """A weight in float32, rounded first to the dtype that the model holds it in."""
    return checkpoint.read(name).astype(dtype, copy=False).astype(np.float32, copy=False)


def _spectra_dir(known: str, dtype: str, rank: int | None) -> Path:
    return spectra_dir() / f"{known[:16]}-{dtype}{'' if rank is None else f'-rank{rank}'}"


def _fitting(lm: LM, z: Mapping[str, Any], rows: int) -> dict[str, Spectrum]:
    spectra = spectra_of(lm, list(z))
    check_vectors(z, spectra, rows)
    return spectra


def factored(spectra: Mapping[str, Spectrum], z: Mapping[str, Any]) -> dict[str, Factored]:
    """The adapter {name: Factored} of an effective z, {name: [R]} or {name: [B, R]}.

    Raises:
      UserError: a truncated spectrum.
    """
    require_whole({name: spectra[name] for name in z})
    return {name: Factored(spectra[name], jnp.asarray(x)) for name, x in z.items()}


def shared_form(model: Transformer, name: str) -> Hashable:
    """What the weights that must take one form have in common: the kind of layer where layers are stacked."""
    layer, path = split_name(name)
    return path if model.scan_layers and layer is not None else name


def require_weights(lm: LM, who: str) -> None:
    """Raises UserError for a model that was loaded `without` its target weights, which `who` needs."""
    if lm.z is not None:
        raise UserError(f"{lm.name} was loaded without its target weights, which {who} needs; load it with them")


def adapted(
    lm: LM, spectra: Mapping[str, Spectrum], z: Mapping[str, Any], *, tokens: int | None = None
) -> tuple[Mapping[str, Any], dict[str, LinearAdapter] | None]:
    """(params, adapter) that run an effective z, every matrix in its cheapest exact form (`cost.cheapest`).

    Args:
      z: {name: [R] or [B, R]}.
      tokens: that z is used for; None for many.
    Returns:
      The base's params with merged weights where the form is dense, and adapters for the rest or None.
    """
    held = layout.held(lm.model, lm.params)
    by_row = {shared_form(lm.model, name): len(x) for name, x in z.items() if np.ndim(x) == 2}
    merged, adapter = {}, {}
    for name, x in z.items():
        rows = by_row.get(shared_form(lm.model, name))
        form = cheapest(spectra[name], "rows" if rows else "one", tokens=tokens) if name in held else "factored"
        if form == "dense":
            merged[name] = x
            continue
        x = jnp.asarray(x) if rows is None else jnp.broadcast_to(x, (rows, np.shape(x)[-1]))
        adapter[name] = Factored(spectra[name], x) if form == "factored" else forms.delta(spectra[name], x)
    params = merge_params(lm.model, lm.params, spectra, merged) if merged else lm.params
    return params, adapter or None


def merge(lm: LM, spectra: Mapping[str, Spectrum], z: Mapping[str, Any]) -> LM:
    """An LM whose target weights are U diag(s z) V^T, dense; everything else is shared with `lm`.

    `spectra` are of the weights that `lm` holds: a weight whose z is 1 throughout stays as it is bit for bit, and so
    does what a truncated spectrum leaves out.

    Args:
      z: {name: [R]}, or what `Expert.z` gives for any parametrisation.
    Raises:
      UserError: a z of the wrong length, with NaN, or without a spectrum.
    """
    check_z(z, spectra)
    name = f"{lm.name} (merged)"
    if lm.z is not None:  # there are no weights to merge into
        return dataclasses.replace(lm, name=name, z=dict(lm.z) | dict(z))
    params = merge_params(lm.model, lm.params, spectra, z)
    return LM(lm.model, params, lm.tokenizer, name, lm.quantisation, mesh=lm.mesh)


def merge_params(
    model: Transformer, params: Mapping[str, Any], spectra: Mapping[str, Spectrum], z: Mapping[str, Any]
) -> dict[str, Any]:
    """The parameter tree with the weights of z ({name: [R], Core or Bands}) replaced by merged ones."""
    named = unnest(params, layout.held(model, params), scan=model.scan_layers)
    targets = {name: (named[name], spectra[name], z) for name, z in z.items()}
    return model.nest(named | _merge_all(targets))


@jax.jit
def _merge_all(targets: dict[str, tuple[Any, Spectrum, forms.Z]]) -> dict[str, Any]:
    def merged(w: Any, spectrum: Spectrum, z: forms.Z) -> Any:
        if isinstance(w, Int8):
            return quantise_weight(forms.merge(spectrum, z, floats(w, jnp.float32)))
        return forms.merge(spectrum, z, w)

    return {name: merged(*target) for name, target in targets.items()}


def row_keys(key: jax.Array | None, rows: int, bucket: int, sampling: Sampling) -> jax.Array:
    """One typed key a row, [bucket], for `rows` prompts padded to it; of a single key, row i takes fold_in(key, i)."""
    if key is None:
        if not isinstance(sampling, Greedy):
            raise UserError(f"sampling with {sampling} needs a key: pass key=jax.random.key(seed)")
        key = jax.random.key(0)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise UserError("key is one of JAX's old untyped keys; make it with jax.random.key(seed)")
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(bucket))
    if key.shape != (rows,):
        raise UserError(f"{rows} prompts need one key or {rows}; got {key.shape}")
    data = pad_rows(np.asarray(jax.random.key_data(key)), bucket)
    return jax.random.wrap_key_data(jax.device_put(data), impl=jax.random.key_impl(key))


def pad_eos(eos_ids: Sequence[int]) -> np.ndarray:
    """[K] int32 end tokens in a bucket of 4, 8, ..., -1 where unused."""
    size = max(4, batch_bucket(len(eos_ids)))
    return np.asarray([*eos_ids] + [-1] * (size - len(eos_ids)), np.int32)


def check_prompts(lengths: np.ndarray, new_tokens: int | np.ndarray, context: int) -> None:
    """Raises UserError for an empty prompt, or one that leaves less than its `new_tokens` of the context."""
    limits = np.broadcast_to(new_tokens, lengths.shape)
    if limits.min() < 1:
        raise UserError(f"max_new_tokens={limits.min()} must be at least 1")
    empty = np.flatnonzero(lengths == 0)
    if empty.size:
        raise UserError(f"prompt {empty[0]} is empty; give it at least one token")
    longest = int((lengths + limits).argmax())
    if lengths[longest] + limits[longest] > context:
        raise UserError(
            f"prompt {longest} has {lengths[longest]} tokens and {limits[longest]} new ones are asked for, but the "
            f"model's context is {context}; shorten the prompt or lower max_new_tokens"
        )
