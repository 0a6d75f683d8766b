"""The decoder of the Llama family, and its logits as a pure function."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from sva.models import cache as kv_cache
from sva.models import moe
from sva.models.cache import DecodeCache, KVSegment
from sva.models.config import ModelConfig
from sva.models.layers import (
    AttentionInputs,
    Block,
    Embed,
    LayerCache,
    Mlp,
    RMSNorm,
    SpectralDense,
    from_column,
)
from sva.models.packing import Packing, pack, packing, unpack
from sva.models.rotary import rope_numbers, rotary
from sva.models.stacks import Scan, stacks
from sva.models.vocabulary import check_ids
from sva.models.weights import nest
from sva.parallel.sharding import constrain, hidden_axes, is_divided
from sva.utils.by_name import ByName
from sva.utils.errors import UserError


class Transformer(nn.Module):
    """The decoders of `sva.models.architectures`. Frozen and hashable: a static argument under jit.

    Variables: `params`, the base weights, and optionally `adapter`, one adapter a weight under the same path.
    """

    cfg: ModelConfig
    dtype: Any = jnp.float32  # of activations; weights are converted once, when loaded
    scan_layers: Scan = False  # one compiled layer for all (TPU, deep models) against faster decoding (CPU)
    remat: bool = False  # recompute each layer in the backward pass
    kv_dtype: Any = None  # of keys and values, if another than `dtype`: what is kept is what is attended to

    @property
    def kept_dtype(self) -> Any:
        """The dtype that keys and values are kept in."""
        return self.dtype if self.kv_dtype is None else self.kv_dtype

    def setup(self) -> None:
        cfg = self.cfg
        self.embed_tokens = Embed(cfg.vocab_size, cfg.hidden_size, self.dtype)
        remat = partial(nn.remat, prevent_cse=not self.scan_layers, static_argnums=(4,))  # `output_start`
        block = remat(Block) if self.remat else Block
        if self.scan_layers:
            for key, first, size in stacks(cfg.num_layers, self.scan_layers):
                stacked = nn.scan(
                    block,
                    variable_axes={"params": 0, "adapter": 0, moe.COLLECTION: 0},
                    split_rngs={"params": True},
                    in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
                    length=size,
                )
                setattr(self, key, stacked(cfg, self.kept_dtype, self._feed_forward(range(first, first + size))))
        else:
            # Under jit layers of like shapes are traced and lowered once; XLA inlines them, and compiles what it did.
            once: Any = nn.jit(block, static_argnums=(4,))
            self.layers: Any = [
                once(cfg, self.kept_dtype, self._feed_forward([layer])) for layer in range(cfg.num_layers)
            ]
        self.norm = RMSNorm(cfg.rms_norm_eps, cfg.norm_plus_one)
        if not cfg.tie_word_embeddings:
            self.lm_head = SpectralDense(cfg.vocab_size)

    @nn.nowrap
    def _feed_forward(self, layers: Sequence[int]) -> type[nn.Module]:
        """The mlp of layers that are compiled as one: sparse or dense."""
        kinds = {self.cfg.moe is not None and self.cfg.moe.layers[layer] for layer in layers}
        if len(kinds) > 1:
            raise UserError(
                "sparse and dense layers lie in one scan; load the model with sva.load, which cuts the scan between "
                "them, or with scan_layers=False"
            )
        return moe.SparseMlp if kinds.pop() else Mlp

    def __call__(
        self,
        input_ids: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        past: Sequence[KVSegment] = (),
        cache: DecodeCache | None = None,
        mask: jax.Array | None = None,
        token_indices: jax.Array | None = None,
        output_start: int = 0,
    ) -> tuple[jax.Array, KVSegment | DecodeCache]:
        """The last layer's normalised output, and these tokens' keys and values.

        Args:
          input_ids: [B, T] int32.
          positions: [B, T] int32, counted from each row's first token.
          valid: [B, T] bool, False for padding, on whichever side it lies.
          past: keys and values of earlier tokens.
          cache: slots to write this one token into, which sees what is written there already; None: these tokens
            become a segment of their own.
          mask: [B, T, T] bool of what each token sees among these, without `cache`; None for every earlier token of
            the row. Of `past` it sees all valid slots of earlier positions.
          token_indices: [N] int32, row * T + column of every valid token, some twice: outside attention these alone are
            computed, whatever the padding, which then holds anything finite. None: all B * T, as always where a mesh
            divides the rows.
          output_start: the first column whose output is wanted (static): where layers are unrolled, the last one
            computes nothing but keys and values for those before.
        Returns:
          [B, T - output_start, D] in the model's dtype (padding holds anything finite), and `cache` with these tokens
          written, or the new KVSegment of B rows and T slots.
        """
        cfg = self.cfg
        if cache is None:
            own, slots, index = KVSegment((), positions, valid), None, None
        else:
            own, slots, index = kv_cache.mark(cache, positions, valid), cache.segment.kv, cache.index
        packed = None if token_indices is None or is_divided() else packing(token_indices, *input_ids.shape)
        inputs = self._attention_inputs(positions, [*past, own], mask, index, packed)
        x = self._embed(pack(input_ids, packed))
        kvs, kv = tuple(segment.kv for segment in past), []
        windows = jnp.asarray(cfg.windows, jnp.int32) if any(cfg.windows) else None
        ropes = rope_numbers(cfg)

        def here(at: int, layers: int | slice) -> LayerCache:
            window, rope = (None if each is None else each[layers] for each in (windows, ropes))
            return LayerCache(tuple(each[at] for each in kvs), None if slots is None else slots[at], window, rope)

        if self.scan_layers:
            for at, (key, first, size) in enumerate(stacks(cfg.num_layers, self.scan_layers)):
                x, new = getattr(self, key)(x, here(at, slice(first, first + size)), inputs, 0)
                kv.append(new)
            x, packed = from_column(x, packed, output_start)
        else:
            for layer, block in enumerate(self.layers):
                x, new = block(x, here(layer, layer), inputs, output_start if layer == cfg.num_layers - 1 else 0)
                kv.append(new)
            packed = None if output_start else packed
        x, segment = unpack(self.norm(x), packed), dataclasses.replace(own, kv=tuple(kv))
        return x, segment if index is None else DecodeCache(segment, index + positions.shape[1])

    @nn.nowrap
    def _embed(self, ids: jax.Array) -> jax.Array:
        """[B, T, D] that the first layer reads, of ids [B, T]."""
        x = constrain(self.embed_tokens(ids), *hidden_axes(1))  # first as the table lies: no copy of it is made
        if self.cfg.embedding_multiplier != 1:
            x = x * jnp.asarray(self.cfg.embedding_multiplier, x.dtype)
        return constrain(x, *hidden_axes(x.shape[1]))

    @nn.nowrap
    def _attention_inputs(
        self,
        positions: jax.Array,
        segments: Sequence[KVSegment],
        mask: jax.Array | None,
        index: jax.Array | None,
        packed: Packing | None,
    ) -> AttentionInputs:
        """The mask over all segments' slots of tokens at `positions` [B, T], and their rotary angles."""
        key_positions, key_valid = kv_cache.slots_of(segments, positions.shape[0])
        distance = positions[:, :, None] - key_positions[:, None, :]
        sees = (distance >= 0) & key_valid[:, None, :]
        if mask is not None:
            before = sees.shape[-1] - mask.shape[-1]
            sees = jnp.concatenate([sees[..., :before], mask], axis=-1)
        # Behind a barrier: XLA would compute cosines, sines and masks again in every layer, for every head.
        is_cached = len(segments) > 1 or index is not None
        rope = rotary(self.cfg, positions, key_positions.shape[1], is_cached, self.dtype)
        rope, sees = jax.lax.optimization_barrier((rope, sees))
        return AttentionInputs(rope, sees, distance if any(self.cfg.windows) else None, index, packed)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """[..., V] float32 logits of hidden [..., D]."""
        head = self.embed_tokens.attend if self.cfg.tie_word_embeddings else self.lm_head
        rows, *lengths, width = hidden_axes(1)  # the states go to the largest matrix, not a copy of it to every device
        lengths = lengths * (hidden.ndim - 2)
        logits = head(constrain(hidden, rows, *lengths, width)).astype(jnp.float32)
        if self.cfg.logits_divisor != 1:
            logits = logits / self.cfg.logits_divisor
        if (cap := self.cfg.logit_softcap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        return constrain(logits, "batch", *lengths, "vocab")

    def nest(self, named: Mapping[str, Any]) -> dict[str, Any]:
        """The linen tree of a tree keyed by weight name; a linen tree passes through, and so does that of a view."""
        if isinstance(named, ByName):
            return dict(named.tree)
        if not any("." in name for name in named):
            return dict(named)
        return nest(
            named, num_layers=self.cfg.num_layers, scan=self.scan_layers, modules=self.cfg.moe and self.cfg.moe.modules
        )


def check_gradients(model: Transformer) -> None:
    """Raises UserError where no gradient would pass the model's keys and values."""
    if model.kept_dtype == jnp.int8:
        raise UserError("keys and values in int8 pass no gradient: load the model with kv_dtype float32 or bfloat16")


def apply(
    model: Transformer, collections: Mapping[str, Any], *args: Any, method: str | None = None, **settings: Any
) -> Any:
    """The result of `__call__`, or of the method named, with these variables: `model.apply`, typed."""
    return model.apply(dict(collections), *args, method=method, **settings)


def variables(model: Transformer, params: Mapping[str, Any], adapter: Mapping[str, Any] | None) -> dict[str, Any]:
    """The collections that `model.apply` takes; the adapter may be keyed by weight name or nested."""
    return {"params": params} if adapter is None else {"params": params, "adapter": model.nest(adapter)}


def positions_of(attention_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(positions [B, T] int32 from each row's first token, valid [B, T] bool) of a mask padded on either side."""
    valid = attention_mask.astype(bool)
    return jnp.maximum(jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, 0), valid


def logits(
    model: Transformer,
    params: Mapping[str, Any],
    input_ids: jax.Array | np.ndarray,
    attention_mask: jax.Array | np.ndarray,
    adapter: Mapping[str, Any] | None = None,
) -> jax.Array:
    """Next-token logits at every position.

    Args:
      model: static under jit.
      params: its base weights (or merged ones).
      input_ids: [B, T] int.
      attention_mask: [B, T] int, 0 for padding, on the left or on the right.
      adapter: None, or one adapter a weight (`sva.factored(spectra, z)`), keyed by weight name.
    Returns:
      [B, T, V] float32; where the mask is 0 the values mean nothing.
    Raises:
      UserError: a token id outside the vocabulary, where the ids are known (they are not under jit).
    """
    if not isinstance(input_ids, jax.core.Tracer) and getattr(input_ids, "is_fully_addressable", True):
        check_ids(np.asarray(input_ids), model.cfg.vocab_size)
    return _logits(model, params, input_ids, attention_mask, adapter)


@partial(jax.jit, static_argnames=("model",))
def _logits(
    model: Transformer,
    params: Mapping[str, Any],
    input_ids: jax.Array,
    attention_mask: jax.Array,
    adapter: Mapping[str, Any] | None,
) -> jax.Array:
    """See `logits`."""
    collections = variables(model, params, adapter)
    hidden, _ = apply(model, collections, input_ids, *positions_of(attention_mask))
    return apply(model, collections, hidden, method="unembed")
