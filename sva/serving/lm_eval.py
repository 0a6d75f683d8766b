"""sva as a model of lm-evaluation-harness: `--model sva`, for the harness's own command line (`sva lm-eval`).

    sva lm-eval --model sva --model_args pretrained=smollm2-135m-instruct,expert=E.safetensors --tasks arc_easy

Token ids are made as the harness's `hf` model makes them, and contexts that are too long lose their beginning as there.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from sva.adaptation.adaptive_lm import adaptive
from sva.adaptation.experts import load_experts
from sva.adaptation.label_scoring import choice
from sva.adaptation.mixture_file import load_mixture
from sva.generation import chat
from sva.generation.frozen import merge_expert
from sva.generation.load import load
from sva.generation.sampling import strategy
from sva.serving.harness import Answers, Budget, Fixed, TwoPasses
from sva.utils.errors import UserError

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_MAX_GEN_TOKS = 256  # of a task that names none, as of the harness's other models


@register_model("sva")
class SvaLM(TemplateLM):  # pyright: ignore[reportUntypedBaseClass]
    """A model with experts, as the harness asks it."""

    def __init__(
        self,
        pretrained: str,
        expert: str = "",
        alphas: str = "",
        adaptive: bool | str = False,
        dtype: str = "float32",
        batch_size: int | str = 32,
        seed: int = 0,
        **others: Any,
    ) -> None:
        """Loads the model.

        Args:
          pretrained: a path, hub id or known name, as of `sva.load`.
          expert: expert files with a plus sign between them. One is merged; several need `alphas` or `adaptive`.
          alphas: a file of `sva adapt`: one mixture of the experts.
          adaptive: two passes, true or the choice as of `sva evaluate --choice`: hard, or a probability.
          batch_size: rows that decode together; "auto" is 32.
          seed: of completions that are sampled.
          others: what the harness gives to every model; anything that is not None is refused, but for its devices.
        """
        super().__init__()
        self.answers = _answers(pretrained, expert, alphas, str(adaptive).lower(), dtype)
        self.rows = 32 if str(batch_size).startswith("auto") else int(batch_size)
        self.seed = int(seed)
        self.tokenizer = chat.need_tokenizer(self.answers.lm)
        cfg = self.answers.lm.model.cfg
        self.max_length, self.decoding_length = cfg.max_position_embeddings, cfg.decoding_length
        known = ("device", "max_batch_size", "trust_remote_code")
        if unknown := [name for name, value in others.items() if name not in known and value is not None]:
            raise UserError(f"--model sva has no argument {unknown[0]!r}; see the page on evaluating")

    @property
    def eot_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """BOS where there is one, else the end token."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Names cached requests."""
        return self.answers.lm.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `apply_chat_template` uses, for the record; an empty text where none is asked for."""
        if isinstance(chat_template, str):
            raise UserError("a model has one chat template; say --apply_chat_template without a name")
        return self.tokenizer.chat_template if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """Token ids; special tokens as `add_special_tokens` says, by default where the text has no BOS yet."""
        del others
        starts = bool(self.tokenizer.bos_token) and string.startswith(self.tokenizer.bos_token)
        special = not starts if add_special_tokens is None else add_special_tokens
        return self.tokenizer(string, add_special_tokens=special)["input_ids"]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **others: Any
    ) -> list[tuple[float, bool]]:
        """(nats, whether greedy) of each request; those behind one context one after another are read together."""
        del others
        cut = []
        for (text, _), head, tail in requests:
            kept = tail[-self.max_length :]
            cut.append((text, head[len(kept) - self.max_length - 1 :], kept))
        together = itertools.groupby(cut, key=lambda one: one[:2])
        groups = [(text, head, [tail for *_, tail in group]) for (text, head), group in together]
        scores = self.answers.scores(*map(list, zip(*groups, strict=True)))
        return [(score.nats, score.is_greedy) for each in scores for score in each]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The nats of each whole text, in windows of the model's context as the harness cuts them."""
        del disable_tqdm
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            cut = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs = [make_disjoint_window(window) for window in cut]
            windows += [(("", text), head, tail) for head, tail in pairs]
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The completion of each context up to its stop string, an end token or its budget."""
        del disable_tqdm
        found: list[str] = [""] * len(requests)
        groups: dict[Budget, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(self._budget(dict(request.args[1])), []).append(place)
        for budget, places in groups.items():
            texts = [requests[place].args[0] for place in places]
            room = self.decoding_length - budget.max_new_tokens
            prompts = [self.tok_encode(text)[-room:] for text in texts]
            for place, text in zip(places, self.answers.completions(texts, prompts, budget), strict=True):
                found[place] = text
                self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return found

    def _budget(self, settings: dict[str, Any]) -> Budget:
        """The budget of a task's settings.

        Raises:
          UserError: a budget that leaves nothing of the context, or a setting of sampling that sva does not know.
        """
        settings = normalize_gen_kwargs(settings, _MAX_GEN_TOKS)
        end = self.tokenizer.decode(self.eot_token_id)
        stops = tuple(text for text in handle_stop_sequences(settings.pop("until", None), eos=end) if text != end)
        tokens = settings.pop("max_gen_toks")
        if (length := self.decoding_length) <= tokens:
            raise UserError(f"max_gen_toks={tokens} leaves nothing of a context of {length} for the prompt")
        samples = settings.pop("do_sample", False)
        values = {name: settings.pop(name, None) for name in _SAMPLING}
        if settings:
            name, value = next(iter(settings.items()))
            raise UserError(f"gen_kwargs has {name}={value}, which sva does not know; it knows {', '.join(_SAMPLING)}")
        return Budget(tokens, stops, strategy(**values) if samples else strategy(), self.seed, self.rows)


def _answers(pretrained: str, expert: str, alphas: str, adaptive_choice: str, dtype: str) -> Answers:
    """Who answers: the base, one expert, a mixture, or two passes.

    Raises:
      UserError: settings that do not go together, or files that cannot be read.
    """
    paths = [Path(path) for path in expert.split("+") if path]
    is_adaptive = adaptive_choice not in ("false", "")
    if is_adaptive and (alphas or not paths):
        raise UserError("adaptive chooses between experts: name them with expert=A+B, and leave out alphas")
    if adaptive_choice == "soft":
        raise UserError("adaptive=soft is not offered here; use hard, or a probability as the threshold")
    if not is_adaptive and len(paths) > 1 and not alphas:
        raise UserError("several experts need adaptive=true, or alphas=FILE of sva adapt")
    if alphas and not paths:
        raise UserError("alphas is a mixture of experts: name them with expert=A+B")
    lm = load(pretrained, dtype=dtype)
    experts, _ = load_experts(lm, paths)
    if is_adaptive:
        chosen = choice("hard" if adaptive_choice == "true" else adaptive_choice)
        return TwoPasses(adaptive(lm, experts, choice=chosen), dict(enumerate(experts, 1)))
    if alphas:
        return Fixed(load_mixture(lm, Path(alphas), experts))
    return Fixed(merge_expert(lm, experts[0]) if experts else lm)
