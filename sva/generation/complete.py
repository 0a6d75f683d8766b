"""Prompts to completions through the engine, as text: what `sva generate`, evaluation and rollouts ask for."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sva.generation import chat
from sva.generation.decode import prefill_prefix
from sva.generation.decompose import spectra_of
from sva.generation.engine import EngineConfig, Finished, Request, run
from sva.generation.finite import check_finite
from sva.generation.lm import LM
from sva.generation.loaded_model import require_weights
from sva.generation.merge import nested_factors
from sva.generation.prompts import check_token_lists, pad_eos, row_keys
from sva.generation.sampling import Greedy, Sampling
from sva.generation.stop_strings import Text
from sva.generation.weights import Weights, bank_mixture
from sva.models.transformer import variables
from sva.utils import seeds
from sva.utils.errors import UserError
from sva.utils.padding import common_prefix
from sva.utils.progress import progress_bar


class Completion(NamedTuple):
    """One sample of one prompt."""

    prompt: int  # its index
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


Show = Callable[[int, int, str], None]  # (prompt, sample, new text)


@dataclasses.dataclass(frozen=True)
class CompleteOptions:
    """The seldom needed settings of `complete`."""

    eos_ids: Sequence[int] | None = None  # end tokens; the model's own by default
    mixtures: Mixtures | None = None  # experts for each prompt, instead of the model alone
    engine: EngineConfig = EngineConfig()  # rows that decode together, and other shapes
    show: Show | None = None  # called with each piece of text as it comes
    title: str | None = None  # of a progress bar on stderr; None for none
    shared: int | None = None  # tokens at the start of every prompt to read once; by default all there are of these
    is_checked: bool = True  # log-probs that are not finite are an error; else they are for the caller to find

    def __post_init__(self) -> None:
        if self.shared and self.mixtures is not None:
            raise UserError(
                f"CompleteOptions has shared={self.shared} and mixtures, each of which reads those tokens differently; "
                "leave one of them out"
            )


def complete(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    *,
    sampling: Sampling | None = None,
    key: jax.Array | None = None,
    samples: int = 1,
    stops: str | Sequence[str] | Sequence[Sequence[str]] = (),
    options: CompleteOptions | None = None,
) -> Iterator[Completion]:
    """Completions of all prompts, each as soon as it is finished.

    What all prompts have in common at their start is read once (in steps of 8 tokens), unless each has a mixture.

    Args:
      lm: the model; merge an expert first to use it for all prompts.
      prompts: token ids, as from `chat.tokenize`.
      max_new_tokens: of every completion, or one a prompt.
      sampling: a strategy of `sva.generation.sampling`; Greedy by default.
      key: one typed key, or one a prompt, needed by every strategy but Greedy. Of one, prompt p takes fold_in(key, p);
        of several samples of a prompt, sample i takes fold_in of the prompt's key and i. Or one a sample, [P, samples].
      samples: of each prompt, which is read once.
      stops: one or several stop strings (`sva.generation.stop_strings.Text`) of every completion, or some a prompt.
      options: end tokens, mixtures, the engine's shapes, and what is shown on the way.
    Raises:
      UserError: an empty prompt, one that does not leave max_new_tokens of the context or holds an id outside the
        vocabulary, a stop string that no text can hold, sampling without a key, mixtures on a model loaded `without`
        some weights, or a log-probability that is not finite.
    """
    if not prompts:
        return
    options, sampling = options or CompleteOptions(), sampling or Greedy()
    if options.mixtures is not None:
        require_weights(lm, "a mixture of experts a prompt")
    texts = _Texts(lm, _of_each(stops, len(prompts)), options.show)
    limits = np.broadcast_to(np.asarray(max_new_tokens, np.int64), (len(prompts),))
    check_token_lists(lm, prompts, limits)
    keys = _keys(key, len(prompts), samples, sampling)
    mixtures = options.mixtures
    shared = options.shared
    if shared is None:
        shared = common_prefix(prompts) if mixtures is None else 0
    alphas = mixtures.alphas[: len(prompts)] if mixtures else [None] * len(prompts)
    requests = [
        Request(prompt[shared:], int(limit), own, mix)
        for prompt, limit, own, mix in zip(prompts, limits, keys, alphas, strict=True)
    ]
    finished = run(
        _weights(lm, options, prompts[0][:shared]),
        requests,
        options.engine,
        sampling,
        texts.watch if texts.is_needed else None,
    )
    for row in _counted(lm, finished, options, len(prompts) * samples):
        yield _completion(lm, row, texts.end(row.request, row.sample))


class _Texts:
    """The texts of the rows at work: stop strings end them, and `show` is told what they write."""

    def __init__(self, lm: LM, stops: list[tuple[str, ...]], show: Show | None) -> None:
        self._stops, self._show = stops, show
        self._empty = {each: Text(chat.need_tokenizer(lm), each) for each in set(stops) if each or show}
        self._texts: dict[tuple[int, int], Text] = {}

    @property
    def is_needed(self) -> bool:
        """Whether any row's text is looked at before it is finished."""
        return bool(self._empty)

    def watch(self, prompt: int, sample: int, tokens: np.ndarray) -> int | None:
        """The number of a row's new tokens to keep where a stop string ends it, else None (`engine.Watch`)."""
        stops = self._stops[prompt]
        if stops not in self._empty:
            return None
        if (prompt, sample) not in self._texts:
            self._texts[prompt, sample] = self._empty[stops].another()
        text = self._texts[prompt, sample]
        keep = text.add(tokens.tolist())
        if self._show is not None:
            self._show(prompt, sample, text.take())
        return keep

    def end(self, prompt: int, sample: int) -> Text | None:
        """The whole text of a finished row, its last piece shown; None where nobody watched it."""
        text = self._texts.pop((prompt, sample), None)
        if text is not None:
            text.end()
            if self._show is not None:
                self._show(prompt, sample, text.take())
        return text


def _weights(lm: LM, options: CompleteOptions, prefix: Sequence[int]) -> Weights:
    """The engine's weights, with the keys and values of the tokens that all prompts begin with."""
    eos_ids = chat.end_tokens(lm) if options.eos_ids is None else options.eos_ids
    adapter = None if lm.z is None else nested_factors(lm.model, spectra_of(lm, list(lm.z)), lm.z)
    weights = Weights(lm.model, lm.params, jnp.asarray(pad_eos(eos_ids)), adapter)
    if options.mixtures:
        return dataclasses.replace(weights, adapter_of=bank_mixture, shared=options.mixtures.bank)
    if not len(prefix):
        return weights
    ids = np.asarray(prefix, np.int32)[None]
    return dataclasses.replace(weights, prefix=prefill_prefix(lm.model, variables(lm.model, lm.params, adapter), ids))


def _counted(lm: LM, finished: Iterator[Finished], options: CompleteOptions, total: int) -> Iterator[Finished]:
    """The finished rows, checked if that is asked for, and counted on a progress bar."""
    started, drawn = time.monotonic(), 0
    with progress_bar(options.title, total, "row", hidden=options.title is None) as bar:
        for row in finished:
            if options.is_checked:
                check_finite(lm, row.logprobs[None], "prompt", row.request)
            drawn += len(row.tokens)
            bar.set_postfix_str(f"{drawn / max(time.monotonic() - started, 1e-9):.0f} tokens/s", refresh=False)
            bar.update()
            yield row


def _completion(lm: LM, row: Finished, text: Text | None) -> Completion:
    if text is not None and text.stop is not None:
        return Completion(row.request, row.sample, text.text, row.tokens, row.logprobs, "stop")
    written = chat.decode(lm, [row.tokens], [len(row.tokens)])[0] if lm.tokenizer else ""
    reason = "length" if row.by_limit else "end"
    return Completion(row.request, row.sample, written, row.tokens, row.logprobs, reason)


def _of_each(stops: str | Sequence[str] | Sequence[Sequence[str]], prompts: int) -> list[tuple[str, ...]]:
    """Each prompt's own stop strings."""
    stops = [stops] if isinstance(stops, str) else stops
    texts = [each for each in stops if isinstance(each, str)]
    return [tuple(texts)] * prompts if len(texts) == len(stops) else [tuple(each) for each in stops]


def _keys(key: jax.Array | None, prompts: int, samples: int, sampling: Sampling) -> list[jax.Array]:
    """Each prompt's keys, [samples]: those given, or made in the same pieces for any number of prompts."""
    if key is not None and key.ndim == 2:
        row_keys(key.reshape(-1), prompts * samples, prompts * samples, sampling)  # whether they will do
        data, impl = np.asarray(jax.random.key_data(key)), jax.random.key_impl(key)
        return [jax.random.wrap_key_data(jax.device_put(own), impl=impl) for own in data]
    if key is None or key.ndim == 0:
        row_keys(key, 1, 1, sampling)  # whether it will do
        whole = jax.random.key(0) if key is None else key
        numbers = [np.arange(start, start + _AT_ONCE, dtype=np.int32) for start in range(0, prompts, _AT_ONCE)]
        data = np.concatenate([np.asarray(jax.random.key_data(_fold(whole, each))) for each in numbers])
    else:
        whole = row_keys(key, prompts, prompts, sampling)
        data = np.asarray(jax.random.key_data(whole))
    impl = jax.random.key_impl(whole)
    own = [jax.random.wrap_key_data(jax.device_put(data[number : number + 1]), impl=impl) for number in range(prompts)]
    return own if samples == 1 else [_spread(each, samples) for each in own]


_AT_ONCE = 32
_fold = jax.jit(seeds.of_rows)
_spread = jax.jit(lambda key, samples: seeds.of_rows(key[0], np.arange(samples)), static_argnums=1)
