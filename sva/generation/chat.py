"""Questions to token ids and back, through the tokenizer's chat template.

Every text of sva becomes ids in `tokenize`, which alone decides about special tokens:

| text                                             | BOS in front                    | EOS behind |
|--------------------------------------------------|---------------------------------|------------|
| a chat that the template rendered                | none beside the template's own  | never      |
| the same of a task with `prompt=reference`       | where the tokenizer adds it     | never      |
| raw: a plain string, or there is no template     | where the tokenizer adds it     | never      |
| what follows other tokens: labels, answers       | none                            | never      |
"""

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sva.generation.lm import LM
from sva.generation.stop_strings import Text, stop_tokens
from sva.models.vocabulary import check_ids
from sva.utils.errors import UserError
from sva.utils.padding import pad_tokens

if TYPE_CHECKING:
    from sva.tasks.base import Example, Task

_PROBE = "7301946285"
_NEXT = "\nQuestion:"  # what a model without a chat template writes after the answer that it was asked for


class Rendered(str):
    """A prompt's text that knows whether BOS goes in front of it: the template of a chat has written its own.

    Text added at its end changes nothing about that; a plain string is raw text.
    """

    bos: bool

    def __new__(cls, text: str, bos: bool = True) -> "Rendered":
        """The text; `bos`: whether the tokenizer's BOS goes in front."""
        made = super().__new__(cls, text)
        made.bos = bos
        return made

    def __add__(self, more: str) -> "Rendered":
        return Rendered(str(self) + more, self.bos)


class TokenError(UserError):
    """A text holds a token that the model has no embedding for; `by_template`: every chat does."""

    def __init__(self, message: str, by_template: bool) -> None:
        super().__init__(message)
        self.by_template = by_template


def render(lm: LM, question: str) -> Rendered:
    """The text of one user turn, up to where the answer starts; the question itself without a chat template."""
    if not question.strip():
        raise UserError("the prompt is empty; give it some text")
    return render_turns(lm, [{"role": "user", "content": question}])


def render_turns(lm: LM, turns: Sequence[Mapping[str, str]], opening: str = "") -> Rendered:
    """The text of a chat that ends in a user turn, up to where the answer starts, and its `opening`.

    Without a chat template, the contents of the turns with an empty line between them. Where the template has no
    system role, a system text stands in front of the next user's; that is said once, on stderr.

    Raises:
      UserError: the template cannot be applied to these turns, leaves out what a user says, or is one of several of
        which none is the default.
    """
    tokenizer = need_tokenizer(lm)
    if not tokenizer.chat_template:
        return Rendered("\n\n".join([*(turn["content"] for turn in turns), *([opening] if opening else [])]))
    template, chat = _template(lm), [dict(turn) for turn in turns]
    if any(turn["role"] == "system" for turn in chat) and not _has_system_role(tokenizer, template, lm.name):
        chat = _without_system_role(chat)
    try:
        text = _applied(tokenizer, template, chat)
    except Exception as error:  # whatever a program in the template raises: Jinja's errors, TypeError, ...
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(
            f"{lm.name}: its chat template cannot be applied ({reason}); mend chat_template in tokenizer_config.json, "
            "or chat_template.jinja"
        ) from error
    if not _shows(tokenizer, template, tuple(turn["role"] for turn in chat), len(chat) - 1):
        raise UserError(
            f"{lm.name}: its chat template leaves out what the user says; mend chat_template in tokenizer_config.json, "
            "or chat_template.jinja"
        )
    return Rendered(text + opening, bos=False)


def render_example(lm: LM, task: "Task", example: "Example") -> Rendered:
    """The text of an example of a task: its turns, up to where the answer starts, and how that is made to begin.

    Under `prompt=reference` the tokenizer's BOS goes in front of the template's own, as in Transformer-Squared's public
    code, which renders to text and leaves the rest to vLLM; said once.

    Raises:
      UserError: the question is empty.
    """
    turns = task.turns(example)
    if not turns[-1]["content"].strip():
        raise UserError(f"task {task.name}: a question is empty; give it some text")
    if (framed := task.framed(example)) is not None:
        return Rendered(framed)
    opening = task.opening(lm.model.cfg.architecture)
    if _is_shown_examples(lm, task):
        return _as_examples(turns, opening)
    text = render_turns(lm, turns, opening)
    if task.prompt != "reference" or text.bos:
        return text
    if front := _front(lm.tokenizer):
        added = lm.tokenizer.convert_ids_to_tokens(front[-1])
        twice = ", which is then there twice" if text.startswith(added) else ""
        _say(f"prompt=reference: {added} goes in front of the rendered chat, as in the public code{twice}")
    return Rendered(text, bos=True)


def stops(lm: LM, task: "Task") -> tuple[str, ...]:
    """The texts that end an answer: the task's, and where worked examples are plain text the next one's beginning."""
    return (*task.stop, _NEXT) if _is_shown_examples(lm, task) else task.stop


def _is_shown_examples(lm: LM, task: "Task") -> bool:
    """Whether worked examples stand in front of a question as plain text: for a base model, without a chat template."""
    return bool(task.shots) and not need_tokenizer(lm).chat_template


def _as_examples(turns: Sequence[Mapping[str, str]], opening: str) -> Rendered:
    """A text of questions with their answers that breaks off where the last answer starts."""
    marks = {"user": "Question: ", "assistant": "Answer: ", "system": ""}
    ends = {"user": "\n", "assistant": "\n\n", "system": "\n\n"}
    text = "".join(f"{marks[turn['role']]}{turn['content']}{ends[turn['role']]}" for turn in turns)
    return Rendered(f"{text}Answer:{f' {opening}' if opening else ''}")


def tokenize(lm: LM, texts: Sequence[str], *, follows: bool = False, kind: str = "prompt") -> list[list[int]]:
    """The token ids of texts, with the special tokens that the table above gives them.

    Args:
      texts: rendered chats (`Rendered`) and raw texts (plain strings).
      follows: they follow other tokens, so that nothing goes in front.
      kind: what they are, for the message.
    Raises:
      TokenError: a text holds a token that the model has no embedding for.
      UserError: there is no tokenizer.
    """
    tokenizer = need_tokenizer(lm)
    front = [] if follows else _front(tokenizer)
    rows = []
    for text in texts:
        row = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append([*front, *row] if getattr(text, "bos", True) else row)
        if rows[-1] and max(rows[-1]) >= lm.model.cfg.vocab_size:
            _refuse(lm, text, rows[-1], kind)
    return rows


def _front(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts in front of any text: BOS, mostly, or none."""
    for text in _probes(tokenizer):
        found = tokenizer(text, return_special_tokens_mask=True)
        if 0 in found["special_tokens_mask"]:
            return found["input_ids"][: found["special_tokens_mask"].index(0)]
    return []


def _probes(tokenizer: Any) -> Iterator[str]:
    """Texts of which one has a token of its own, the likeliest first."""
    yield "a"
    yield from tokenizer.get_vocab()


def _refuse(lm: LM, text: str, ids: Sequence[int], kind: str) -> None:
    """Raises TokenError that names the token without an embedding, and whether the template or the text wrote it."""
    size, tokenizer = lm.model.cfg.vocab_size, lm.tokenizer
    token = tokenizer.convert_ids_to_tokens(next(i for i in ids if i >= size))
    shown = str(text if len(text) <= 60 else f"{text[:57]}...")
    by_template = isinstance(text, Rendered) and not text.bos and token in str(tokenizer.chat_template)
    try:
        check_ids(ids, size, tokenizer, "the chat template" if by_template else f"the {kind} {shown!r}")
    except UserError as error:
        raise TokenError(str(error), by_template) from None


@functools.cache
def _say(note: str) -> None:
    """Writes the note to stderr, once."""
    print(f"sva: {note}", file=sys.stderr)


def encode(lm: LM, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), both [B, T] int32, of rendered texts, padded on the left to the longest."""
    rows = tokenize(lm, texts)
    return pad_tokens(rows, max((len(row) for row in rows), default=0))


def decode(lm: LM, tokens: Any, lengths: Any) -> list[str]:
    """The text of each row's first `lengths` tokens, special tokens left out."""
    tokenizer = need_tokenizer(lm)
    rows = zip(np.asarray(tokens), np.asarray(lengths), strict=True)
    return [
        tokenizer.decode(row[:length], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for row, length in rows
    ]


class Cut(NamedTuple):
    """Rows up to where their stop strings end them."""

    texts: list[str]
    lengths: np.ndarray  # [B] int32, with the token that completes a stop string
    stopped: np.ndarray  # [B] bool: by a stop string

    def means(self, logprobs: np.ndarray) -> np.ndarray:
        """[B] float32: the mean of each row's log-probs, given as [B, N]."""
        within = np.arange(logprobs.shape[1]) < self.lengths[:, None]
        return np.where(within, logprobs, 0).sum(axis=1) / self.lengths


def decode_until(lm: LM, tokens: Any, lengths: Any, stops: Sequence[Sequence[str]]) -> Cut:
    """`decode` of each row up to the first of its own stop strings, as `stop_strings.Text` finds them."""
    texts, lengths = decode(lm, tokens, lengths), np.array(lengths, np.int32)
    stopped = np.zeros(len(lengths), bool)
    empty = {each: Text(need_tokenizer(lm), each) for each in {tuple(each) for each in stops if each}}
    for row, own in enumerate(stops):
        if own:
            text = empty[tuple(own)].another()
            keep = text.add(np.asarray(tokens)[row, : lengths[row]].tolist())
            text.end()
            texts[row], stopped[row] = text.text, text.stop is not None
            lengths[row] = lengths[row] if keep is None else keep
    return Cut(texts, lengths, stopped)


def end_tokens(lm: LM, stops: Sequence[str] = ()) -> tuple[int, ...]:
    """The ids that end an answer: the configuration's, the tokenizer's own, and stop strings that are one added token.

    Raises:
      UserError: a stop string that is empty, or that no text can hold (`sva.generation.stop_strings.stop_tokens`).
    """
    ids = list(lm.model.cfg.eos_token_ids)
    own = None if lm.tokenizer is None else lm.tokenizer.eos_token_id
    stopping = stop_tokens(need_tokenizer(lm), stops) if stops else {}
    return tuple(dict.fromkeys([*ids, *([] if own is None else [own]), *stopping]))


def answer_end(lm: LM) -> tuple[int, ...]:
    """The end token that is written behind a given answer, the last of `end_tokens`; none where the model has none.

    Raises:
      UserError: the model has no embedding for it.
    """
    last = end_tokens(lm)[-1:]
    check_ids(last, lm.model.cfg.vocab_size, lm.tokenizer, f"the end token of {lm.name}")
    return last


def need_tokenizer(lm: LM) -> Any:
    """The model's tokenizer; UserError where it has none."""
    if lm.tokenizer is None:
        raise UserError(f"{lm.name} has no tokenizer; put tokenizer.json beside its weights, or pass token ids")
    return lm.tokenizer


def _template(lm: LM) -> str:
    """The text of the chat template, of several named ones the default."""
    template = lm.tokenizer.chat_template
    if not isinstance(template, dict):
        return template
    if "default" not in template:
        raise UserError(
            f"{lm.name} has chat templates called {', '.join(template)} and none called default; call one of them "
            "default in its tokenizer_config.json"
        )
    return template["default"]


def _applied(tokenizer: Any, template: str, turns: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)


@functools.lru_cache(maxsize=32)
def _shows(tokenizer: Any, template: str, roles: tuple[str, ...], place: int) -> bool:
    """Whether the template writes what one of these roles says, tried with a number, which no template changes."""
    turns = [{"role": role, "content": _PROBE if number == place else "."} for number, role in enumerate(roles)]
    try:
        return _PROBE in _applied(tokenizer, template, turns)
    except Exception:  # what it raises is told when it is applied to the turns that are meant
        return False


@functools.lru_cache(maxsize=32)
def _has_system_role(tokenizer: Any, template: str, name: str) -> bool:
    """Whether the template writes what the system says; where it does so of a user only, that is said, this once."""
    if _shows(tokenizer, template, ("system", "user"), 0) or not _shows(tokenizer, template, ("user",), 0):
        return True
    print(
        f"sva: {name}: its chat template has no system role; a system text goes in front of the user's", file=sys.stderr
    )
    return False


def _without_system_role(turns: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The turns, every system text in front of the next user's, an empty line between them."""
    chat: list[dict[str, str]] = []
    waiting: list[str] = []
    for turn in turns:
        if turn["role"] == "system":
            waiting += [turn["content"]] if turn["content"].strip() else []
        elif turn["role"] == "user":
            chat.append({**turn, "content": "\n\n".join([*waiting, turn["content"]])})
            waiting = []
        else:
            chat.append(dict(turn))
    return [*chat, {"role": "user", "content": "\n\n".join(waiting)}] if waiting else chat
