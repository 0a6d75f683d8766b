"""Prompts to completions through the engine, as text: what `sva generate`, evaluation and rollouts ask for."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sva.generation import chat
from sva.generation.decode import read
from sva.generation.engine import EngineConfig, Finished, Request, Weights, run
from sva.generation.finite import check_finite
from sva.generation.lm import LM
from sva.generation.loaded_model import require_weights
from sva.generation.prompts import check_prompts, pad_eos, row_keys
from sva.generation.sampling import Greedy, Sampling
from sva.generation.stop_strings import Text
from sva.models.cache import Part
from sva.models.transformer import Transformer, variables
from sva.models.vocabulary import check_ids
from sva.utils.padding import common_prefix
from sva.utils.progress import progress_bar


class Completion(NamedTuple):
    """One sample of one prompt."""

    prompt: int  # its place
    sample: int
    text: str
    tokens: np.ndarray  # [N] int32, with the end token, or those of the stop string
    logprobs: np.ndarray  # [N] float32 nats, as the sampler's model gave them, before temperature or cut
    reason: Literal["end", "stop", "length"]  # an end token, a stop string, or max_new_tokens


@dataclasses.dataclass(frozen=True)
class Mixtures:
    """A mixture of experts for each prompt."""

    bank: Mapping[str, Any]  # the model's nested tree of `Slots`
    alphas: np.ndarray  # [B, E_max]


def complete(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    *,
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
    samples: int = 1,
    eos_ids: Sequence[int] | None = None,
    stops: Sequence[str] | Sequence[Sequence[str]] = (),
    mixtures: Mixtures | None = None,
    cfg: EngineConfig | None = None,
    show: Callable[[int, int, str], None] | None = None,
    title: str | None = None,
) -> Iterator[Completion]:
    """Completions of all prompts, each as soon as it is finished.

    What all prompts have in common at their start is read once (in steps of 8 tokens), unless each has a mixture.

    Args:
      lm: the model; merge an expert first to use it for all prompts.
      prompts: token ids, as from `chat.tokenize`.
      max_new_tokens: of every completion, or one a prompt.
      sampling: a strategy of `sva.generation.sampling`; Greedy by default.
      key: one typed key, or one a prompt, needed by every strategy but Greedy. Of one, prompt p takes fold_in(key, p);
        of several samples of a prompt, sample i takes fold_in of the prompt's key and i.
      samples: of each prompt, which is read once.
      eos_ids: end tokens; the model's own by default.
      stops: stop strings (`sva.generation.stop_strings.Text`) of every completion, or some a prompt.
      mixtures: experts for each prompt, instead of the model alone.
      cfg: rows that decode together, and other shapes.
      show: called with (prompt, sample, new text) as it comes.
      title: of a progress bar on stderr.
    Raises:
      UserError: an empty prompt, one that does not leave max_new_tokens of the context or holds an id outside the
        vocabulary, a stop string that no text can hold, sampling without a key, a model loaded `without` some weights,
        or a log-probability that is not finite.
    """
    if not prompts:
        return
    require_weights(lm, "the engine")
    own_stops = _of_each(stops, len(prompts))
    empty = {each: Text(chat.need_tokenizer(lm), each) for each in set(own_stops) if each or show}
    limits = np.broadcast_to(np.asarray(max_new_tokens, np.int64), (len(prompts),))
    lengths = np.asarray([len(prompt) for prompt in prompts])
    check_prompts(lengths, limits, lm.model.cfg.max_position_embeddings)
    for number, prompt in enumerate(prompts):
        check_ids(prompt, lm.model.cfg.vocab_size, lm.tokenizer, f"prompt {number}")
    sampling = sampling or Greedy()
    keys = _keys(key, len(prompts), sampling)
    shared = common_prefix(prompts) if mixtures is None and len(prompts) > 1 else 0
    weights = Weights(
        lm.model,
        lm.params,
        jnp.asarray(pad_eos(chat.end_tokens(lm) if eos_ids is None else eos_ids)),
        bank=mixtures.bank if mixtures else None,
        prefix=_prefix(lm.model, lm.params, np.asarray(prompts[0][:shared], np.int32)) if shared else None,
    )
    requests = [
        Request(
            prompt[shared:],
            int(limit),
            own if samples == 1 else _spread(own, samples),
            mixtures.alphas[place] if mixtures else None,
        )
        for place, (prompt, limit, own) in enumerate(zip(prompts, limits, keys, strict=True))
    ]
    texts: dict[tuple[int, int], Text] = {}

    def watch(prompt: int, sample: int, tokens: np.ndarray) -> int | None:
        if own_stops[prompt] not in empty:
            return None
        if (prompt, sample) not in texts:
            texts[prompt, sample] = empty[own_stops[prompt]].another()
        text = texts[prompt, sample]
        keep = text.add(tokens.tolist())
        if show is not None:
            show(prompt, sample, text.take())
        return keep

    finished = run(weights, requests, cfg or EngineConfig(), sampling, watch if empty else None)
    with progress_bar(title, len(prompts) * samples, "row", hidden=title is None) as bar:
        started, drawn = time.monotonic(), 0
        for row in finished:
            check_finite(lm, row.logprobs[None], "prompt", row.request)
            drawn += len(row.tokens)
            bar.set_postfix_str(f"{drawn / max(time.monotonic() - started, 1e-9):.0f} tokens/s", refresh=False)
            bar.update()
            text = texts.pop((row.request, row.sample), None)
            if text is not None:
                text.end()
                if show is not None:
                    show(row.request, row.sample, text.take())
            yield _completion(lm, row, text)


def _completion(lm: LM, row: Finished, text: Text | None) -> Completion:
    if text is not None and text.stop is not None:
        return Completion(row.request, row.sample, text.text, row.tokens, row.logprobs, "stop")
    written = chat.decode(lm, [row.tokens], [len(row.tokens)])[0] if lm.tokenizer else ""
    reason = "length" if row.by_limit else "end"
    return Completion(row.request, row.sample, written, row.tokens, row.logprobs, reason)


def _of_each(stops: Sequence[str] | Sequence[Sequence[str]], prompts: int) -> list[tuple[str, ...]]:
    """Each prompt's own stop strings."""
    texts = [each for each in stops if isinstance(each, str)]
    return [tuple(texts)] * prompts if len(texts) == len(stops) else [tuple(each) for each in stops]


@partial(jax.jit, static_argnames=("model",))
def _prefix(model: Transformer, params: Mapping[str, Any], ids: jax.Array) -> Part:
    return read(model, variables(model, params, None), ids[None], jnp.ones_like(ids)[None])[1]


def _keys(key: jax.Array | None, prompts: int, sampling: Sampling) -> list[jax.Array]:
    """Each prompt's key as `row_keys` gives it, [1]; made and taken in the same pieces for any number of prompts."""
    if key is None or key.ndim == 0:
        row_keys(key, 1, 1, sampling)  # whether it will do
        whole = jax.random.key(0) if key is None else key
        places = [np.arange(start, start + _AT_ONCE, dtype=np.int32) for start in range(0, prompts, _AT_ONCE)]
        data = np.concatenate([np.asarray(jax.random.key_data(_fold(whole, each))) for each in places])
    else:
        whole = row_keys(key, prompts, prompts, sampling)
        data = np.asarray(jax.random.key_data(whole))
    impl = jax.random.key_impl(whole)
    return [jax.random.wrap_key_data(jax.device_put(data[place : place + 1]), impl=impl) for place in range(prompts)]


_AT_ONCE = 32
_fold = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))
_spread = jax.jit(
    lambda key, samples: jax.vmap(jax.random.fold_in, (None, 0))(key[0], np.arange(samples)), static_argnums=1
)
