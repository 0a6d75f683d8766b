"""From a body to tickets: which model is meant, which tokens, and whether they fit."""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from sva.adaptation.label_scoring import Choice, Hard, choice
from sva.generation import chat
from sva.generation.lm import LM
from sva.generation.row_sampling import row_settings
from sva.generation.temperature import check_temperature
from sva.models.vocabulary import check_ids
from sva.serving.bank import ADAPTIVE, BASE, Bank
from sva.serving.bodies import Asked, ChatBody, CompletionBody
from sva.serving.config import ServerConfig
from sva.serving.errors import ApiError
from sva.serving.tickets import Event, Question, Ticket


class Prompt(NamedTuple):
    """One prompt as text and tokens."""

    ids: list[int]
    text: str | None  # of a prompt that came as text
    question: str | None  # what a first pass classifies


class Asking(NamedTuple):
    """What a request asks for, once it is known to make sense."""

    prompts: list[Prompt]
    tickets: list[Ticket]
    likeliest: int | None  # alternatives beside each token; None: no log-probs at all
    echo: bool = False


class _Answers(NamedTuple):
    """How the prompts of one request are answered."""

    limit: int | None  # new tokens asked for
    likeliest: int | None
    scores_prompt: bool = False


class Reader:
    """Makes tickets of bodies; the texts of long prompts take a while, so call it in a thread of its own."""

    def __init__(self, lm: LM, base: str, bank: Bank, cfg: ServerConfig) -> None:
        self._lm, self._base, self._bank, self._cfg = lm, base, bank, cfg
        self.context = min(cfg.context, lm.model.cfg.decoding_length)

    def chat(self, body: ChatBody, tell: Callable[[int, Event], None]) -> Asking:
        """The one prompt of a chat.

        Raises:
          ApiError: it makes no sense.
        """
        turns = [{"role": turn.role.replace("developer", "system"), "content": turn.text} for turn in body.messages]
        if turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
            raise ApiError(400, "the last message must be the user's, with some text", param="messages")
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        rendered = chat.render_turns(self._lm, turns)
        (ids,) = chat.tokenize(self._lm, [rendered])
        prompts = [Prompt(ids, str(rendered), turns[-1]["content"])]
        limit = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        likeliest = (body.top_logprobs or 0) if body.logprobs else None
        return Asking(prompts, self._tickets(body, prompts, _Answers(limit, likeliest), tell), likeliest)

    def completion(self, body: CompletionBody, tell: Callable[[int, Event], None]) -> Asking:
        """The prompts of a completion.

        Raises:
          ApiError: they make no sense.
        """
        prompts = [self._plain(prompt) for prompt in body.prompts]
        scores = body.echo and body.logprobs is not None
        if not body.max_tokens and not body.echo:
            raise ApiError(400, "max_tokens: 0 draws nothing; ask for a token, or for echo", param="max_tokens")
        answers = _Answers(body.max_tokens, body.logprobs, scores)
        return Asking(prompts, self._tickets(body, prompts, answers, tell), body.logprobs, body.echo)

    def _plain(self, prompt: str | list[int]) -> Prompt:
        if isinstance(prompt, str):
            (ids,) = chat.tokenize(self._lm, [prompt])
            return Prompt(ids, prompt, prompt)
        check_ids(prompt, self._lm.model.cfg.vocab_size, self._lm.tokenizer, "the prompt")
        return Prompt(prompt, None, None)

    def _tickets(
        self, body: Asked, prompts: Sequence[Prompt], answers: _Answers, tell: Callable[[int, Event], None]
    ) -> list[Ticket]:
        weights, chosen = self._model(body)
        temperature = 1.0 if body.temperature is None else body.temperature
        if temperature:
            check_temperature("temperature", temperature)
        size = self._lm.model.cfg.vocab_size
        bias = tuple((int(token), value) for token, value in (body.logit_bias or {}).items())
        if outside := [token for token, _ in bias if token >= size]:
            raise ApiError(400, f"logit_bias: the vocabulary has no token {outside[0]}", param="logit_bias")
        cuts = body.top_k or 0, 1.0 if body.top_p is None else body.top_p, body.min_p or 0.0
        settings = row_settings(temperature, *cuts, bias=bias)
        chat.end_tokens(self._lm, body.stops)  # a stop string that no text can hold is said before any work
        seed = secrets.randbits(32) if body.seed is None else body.seed
        tickets = []
        for number, prompt in enumerate(prompts):
            if chosen is not None and not (prompt.question or "").strip():
                raise ApiError(400, f"the model {ADAPTIVE!r} needs a prompt of text to classify", param="prompt")
            tickets.append(
                Ticket(
                    prompt_ids=prompt.ids,
                    tell=lambda event, number=number: tell(number, event),
                    max_new_tokens=self._limit(prompt, answers.limit, number),
                    samples=body.n,
                    seed=seed,
                    line=number + 1,
                    settings=settings,
                    likeliest=answers.likeliest or 0,
                    is_rich=bool(bias) or bool(answers.likeliest),
                    stops=body.stops,
                    weights=weights,
                    question=None if chosen is None else Question(str(prompt.question), chosen),
                    scores_prompt=answers.scores_prompt,
                    deadline=time.monotonic() + self._cfg.timeout,
                )
            )
        return tickets

    def _model(self, body: Asked) -> tuple[Mapping[str, float], Choice | None]:
        """(the weights that the body names, None) or ({}, the choice of a first pass)."""
        is_base = body.model in (BASE, self._base)
        if body.adaptive is not None and body.model != ADAPTIVE:
            raise ApiError(400, f"`adaptive` is for the model {ADAPTIVE!r}", param="adaptive")
        if body.mixture is not None:
            if not is_base:
                raise ApiError(400, f"`mixture` is for the model {self._base!r}", param="mixture")
            return body.mixture, None
        if body.model == ADAPTIVE:
            return {}, Hard() if body.adaptive is None else choice(str(body.adaptive.choice))
        known = [entry.name for entry in self._bank.entries]
        if not is_base and body.model not in known:
            models = ", ".join([self._base, *known, ADAPTIVE])
            raise ApiError(
                404, f"no model {body.model[:100]!r}; there is {models}", param="model", code="model_not_found"
            )
        return ({} if is_base else {body.model: 1.0}), None

    def _limit(self, prompt: Prompt, asked: int | None, number: int) -> int:
        """The tokens to draw."""
        size, room = len(prompt.ids), self.context - len(prompt.ids)
        if not size:
            raise ApiError(400, f"prompt {number} has no token; give it some text", param="prompt")
        if room < (1 if asked is None else asked):
            new = "" if asked is None else f" and {asked} new ones are asked for"
            raise ApiError(
                400,
                f"prompt {number} has {size} tokens{new}, but this server's context is {self.context}; shorten the "
                "prompt or lower max_tokens",
                code="context_length_exceeded",
                param="messages" if prompt.text != prompt.question else "prompt",
            )
        if asked is not None and asked > self._cfg.max_tokens:
            raise ApiError(
                400, f"max_tokens is {asked}, this server draws {self._cfg.max_tokens} at most", param="max_tokens"
            )
        return min(room, self._cfg.max_tokens) if asked is None else asked
