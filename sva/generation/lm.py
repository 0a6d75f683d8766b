"""A loaded language model that reads and continues prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sva.generation.decode import Generation, PromptBatch, generate
from sva.generation.decompose import spectra_of
from sva.generation.finite import check_finite
from sva.generation.loaded_model import LoadedModel
from sva.generation.merge import adapted
from sva.generation.prompts import check_prompts, pad_eos, row_keys
from sva.generation.sampling import Greedy, Sampling
from sva.models.transformer import logits
from sva.models.vocabulary import check_ids
from sva.parallel.processes import to_host
from sva.parallel.sharding import rows_bucket
from sva.spectral.expert import check_vectors
from sva.spectral.forms import Spectrum
from sva.utils.errors import UserError
from sva.utils.padding import budget_bucket, common_prefix, length_bucket, pad_rows, pad_tokens


class LM(LoadedModel):
    """A loaded model, as `sva.load` returns it; see `LoadedModel` for its fields."""

    def logits(self, input_ids: Any, attention_mask: Any, z: Mapping[str, Any] | None = None) -> jax.Array:
        """[B, T, V] float32 logits, with the effective z ({name: [R] or [B, R]}) where one is given.

        See `sva.logits`. Raises UserError for a token id outside the vocabulary or a z that does not fit.
        """
        ids, mask = self._check(input_ids, attention_mask)
        params, adapter = self.params, None
        z = self.z if z is None else z
        if z is not None:
            params, adapter = adapted(self, fitting(self, z, len(ids)), z, tokens=ids.size)
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
        """The continuation of each prompt, up to one of `eos_ids` or max_new_tokens tokens.

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
        count = len(ids)
        check_prompts(mask.sum(axis=1), max_new_tokens, self.model.cfg)
        keys = row_keys(key, count, rows_bucket(count), sampling)
        params, adapter = self.params, None
        z = self.z if z is None else z
        if z is not None:
            spectra = fitting(self, z, count)
            z = {name: pad_rows(np.asarray(x), len(keys)) if np.ndim(x) == 2 else x for name, x in z.items()}
            params, adapter = adapted(self, spectra, z)
        prompts = _bucketed(ids, mask, keys, max_new_tokens, share_prefix=adapter is None)
        size = budget_bucket(max_new_tokens)
        out = generate(self.model, params, prompts, pad_eos(eos_ids), adapter, max_new_tokens=size, sampling=sampling)
        tokens, logprobs, lengths = (x[:count] for x in to_host(out))  # sliced on the host: nothing to compile
        check_finite(self, logprobs, "prompt")
        return Generation(tokens[:, :max_new_tokens], logprobs[:, :max_new_tokens], lengths)

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


def _bucketed(
    ids: np.ndarray, mask: np.ndarray, keys: jax.Array, max_new_tokens: int, *, share_prefix: bool
) -> PromptBatch:
    """Prompts [B, T], padded on either side, in buckets of rows and tokens, with what they share at their start."""
    rows = [row[keep] for row, keep in zip(ids, mask.astype(bool), strict=True)]
    length = length_bucket(max(map(len, rows)))
    shared = common_prefix(rows) if share_prefix else 0
    ids, mask = (pad_rows(x, len(keys)) for x in pad_tokens([row[shared:] for row in rows], length - shared))
    limit = jnp.asarray(max_new_tokens, jnp.int32)
    return PromptBatch(ids, mask, keys, limit, rows[0][:shared] if shared else None)


def fitting(lm: LoadedModel, z: Mapping[str, Any], rows: int) -> Mapping[str, Spectrum]:
    """The spectra of the weights of an effective z; UserError where it does not fit them, or so many rows."""
    spectra = spectra_of(lm, list(z))
    check_vectors(z, spectra, rows)
    return spectra
