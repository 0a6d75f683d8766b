"""Answers in the form of OpenAI's API, with what sva adds under the name `sva` in every choice."""

import codecs
import dataclasses
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sva.serving.asking import Asking
from sva.serving.tickets import Ended, Event, Likeliest, Mixed, Piece, Prompted
from sva.serving.token_text import TokenText


@dataclasses.dataclass
class Choice:
    """One sample of one prompt, as far as it has come."""

    prompt: int
    sample: int
    text: str = ""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    likeliest: list[Likeliest] = dataclasses.field(default_factory=list)
    ended: Ended | None = None
    is_echoed: bool = False  # in a stream


class Reply:
    """Gathers the events of one request; `add` gives what is new for a stream."""

    def __init__(self, asking: Asking, model: str, fingerprint: str, tokens: TokenText, *, is_chat: bool) -> None:
        self._asking, self._tokens, self._is_chat = asking, tokens, is_chat
        self.came = time.monotonic()
        self.choices = [
            Choice(number, sample) for number, ticket in enumerate(asking.tickets) for sample in range(ticket.samples)
        ]
        self._mixed: dict[int, Mixed] = {}
        self._prompted: dict[int, Prompted] = {}
        kind = "chat.completion" if is_chat else "text_completion"
        prefix = "chatcmpl-" if is_chat else "cmpl-"
        self._head = {"id": f"{prefix}{secrets.token_hex(12)}", "object": kind, "created": int(time.time())}
        self._head |= {"model": model, "system_fingerprint": f"sva-{fingerprint[:12]}"}

    @property
    def is_done(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.ended for choice in self.choices)

    def add(self, prompt: int, event: Event) -> dict[str, Any] | None:
        """Takes an event; the chunk of a stream that it makes, if any."""
        if isinstance(event, Mixed):
            self._mixed[prompt] = event
            return self._opening(prompt)
        if isinstance(event, Prompted):
            self._prompted[prompt] = event
            return None
        assert isinstance(event, Piece | Ended)
        place, choice = next(
            (place, x) for place, x in enumerate(self.choices) if (x.prompt, x.sample) == (prompt, event.sample)
        )
        start = len(choice.tokens)
        if isinstance(event, Ended):
            choice.ended = event
            return self._chunk(place, choice, "", start)
        choice.text += event.text
        choice.tokens += event.tokens
        choice.logprobs += event.logprobs
        choice.likeliest += event.likeliest
        return (
            self._chunk(place, choice, event.text, start) if event.text or self._asking.likeliest is not None else None
        )

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        choices = []
        for place, choice in enumerate(self.choices):
            assert choice.ended is not None
            what = (
                {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
                if self._is_chat
                else {"text": self._echo(choice) + choice.text}
            )
            own = {"index": place, **what, "logprobs": self._logprobs(choice), "finish_reason": choice.ended.reason}
            choices.append(own | {"sva": self._sva(choice)})
        return self._head | {"choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens read and drawn."""
        read = sum(len(prompt.ids) for prompt in self._asking.prompts)
        drawn = sum(len(choice.tokens) for choice in self.choices)
        return {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}

    def last_chunk(self) -> dict[str, Any]:
        """The chunk that tells the usage, behind all others."""
        return self._stream_head() | {"choices": [], "usage": self.usage()}

    def log(self) -> dict[str, Any]:
        """What the log tells of the request."""
        mixed = [dict(self._mixed[number].weights) for number in sorted(self._mixed)]
        usage = self.usage()
        return {"model": self._head["model"], "experts": mixed[:8], **usage, "reasons": self._reasons()}

    def _reasons(self) -> list[str]:
        return [choice.ended.reason for choice in self.choices[:8] if choice.ended]

    def _stream_head(self) -> dict[str, Any]:
        return self._head | ({"object": "chat.completion.chunk"} if self._is_chat else {})

    def _opening(self, prompt: int) -> dict[str, Any] | None:
        """Which experts answer, before they do."""
        places = [place for place, choice in enumerate(self.choices) if choice.prompt == prompt]
        if not self._is_chat:
            return None
        delta = {"role": "assistant", "content": ""}
        own = [
            {
                "index": place,
                "delta": delta,
                "logprobs": None,
                "finish_reason": None,
                "sva": self._sva(self.choices[place]),
            }
            for place in places
        ]
        return self._stream_head() | {"choices": own}

    def _chunk(self, place: int, choice: Choice, text: str, start: int) -> dict[str, Any]:
        """The chunk of a choice with new text, and the log-probs of its tokens from `start` on."""
        echo, choice.is_echoed = "" if choice.is_echoed else self._echo(choice), True
        is_new = bool(echo) or start < len(choice.tokens)
        part: dict[str, Any] = {"text": echo + text}
        if self._is_chat:
            part = {"delta": {"content": text} if text or is_new else {}}
        reason = choice.ended and choice.ended.reason
        logprobs = self._logprobs(choice, start) if is_new else None
        own = {"index": place, **part, "logprobs": logprobs, "finish_reason": reason}
        return self._stream_head() | {"choices": [own | ({"sva": self._sva(choice)} if reason else {})]}

    def _sva(self, choice: Choice) -> dict[str, Any]:
        """Which experts answered, how sure the first pass was, and what both passes cost."""
        mixed = self._mixed[choice.prompt]
        told: dict[str, Any] = {"experts": dict(mixed.weights)}
        if mixed.first is not None:
            told |= {"label": mixed.label, "prob": mixed.prob, "probs": dict(mixed.probs or {})}
            told |= {"first_pass": mixed.first._asdict()}
        return told if choice.ended is None else told | {"second_pass": choice.ended.cost._asdict()}

    def _echo(self, choice: Choice) -> str:
        """The prompt's text, where it is echoed."""
        if not self._asking.echo:
            return ""
        prompt = self._asking.prompts[choice.prompt]
        if prompt.text is not None:
            return prompt.text
        return b"".join(map(self._tokens.bytes, prompt.ids)).decode(errors="replace")

    def _logprobs(self, choice: Choice, start: int = 0) -> dict[str, Any] | None:
        """The log-probs from a token on, in the form of the endpoint."""
        if self._asking.likeliest is None:
            return None
        tokens, nats = choice.tokens[start:], choice.logprobs[start:]
        others: Sequence[Likeliest | None] = choice.likeliest[start:] or [[]] * len(tokens)
        if self._is_chat:
            rows = zip(tokens, nats, others, strict=True)
            return {
                "content": [self._token(t, x) | {"top_logprobs": self._top(o)} for t, x, o in rows],
                "refusal": None,
            }
        scores: list[float | None] = list(nats)
        offsets = self._offsets(choice.tokens, len(self._echo(choice)))[start:]
        if start == 0 and (prompted := self._prompted.get(choice.prompt)):
            ids = self._asking.prompts[choice.prompt].ids
            tokens = [*ids, *tokens]
            scores = [None, *prompted.logprobs, *scores]
            others = [None, *prompted.likeliest, *others]
            offsets = [*self._offsets(ids, 0), *offsets]
        return {
            "tokens": [self._tokens.text(token) for token in tokens],
            "token_logprobs": scores,
            "top_logprobs": [None if one is None else self._by_text(one) for one in others]
            if self._asking.likeliest
            else None,
            "text_offset": offsets,
        }

    def _offsets(self, tokens: Sequence[int], start: int) -> list[int]:
        """Where each token begins in the text, the first at `start`; of part of a character, where that begins."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        found = []
        for token in tokens:
            found.append(start)
            start += len(decoder.decode(self._tokens.bytes(token)))
        return found

    def _token(self, token: int, nats: float) -> dict[str, Any]:
        return {"token": self._tokens.text(token), "logprob": nats, "bytes": list(self._tokens.bytes(token))}

    def _top(self, likeliest: Likeliest | None) -> list[dict[str, Any]]:
        return [self._token(token, nats) for token, nats in likeliest or ()]

    def _by_text(self, likeliest: Likeliest) -> Mapping[str, float]:
        """Alternatives by their text; of two with the same text the likelier."""
        found: dict[str, float] = {}
        for token, nats in likeliest:
            found.setdefault(self._tokens.text(token), nats)
        return found
