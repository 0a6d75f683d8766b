"""Questions to token ids and back, through the tokenizer's chat template."""

import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from sva.errors import UserError
from sva.lm import LM
from sva.tasks.base import Example, Task

_PROBE = "7301946285"


def render(lm: LM, question: str) -> str:
    """The text of one user turn, up to where the answer starts; the question itself without a chat template."""
    if not question.strip():
        raise UserError("the prompt is empty; give it some text")
    return render_turns(lm, [{"role": "user", "content": question}])


def render_turns(lm: LM, turns: Sequence[Mapping[str, str]], opening: str = "") -> str:
    """The text of a chat that ends in a user turn, up to where the answer starts, and its `opening`.

    Without a chat template, the contents of the turns with an empty line between them. Where the template has no
    system role, a system text stands in front of the next user's; that is said once, on stderr.

    Raises:
      UserError: the template cannot be applied to these turns, leaves out what a user says, or is one of several of
        which none is the default.
    """
    tokenizer = need_tokenizer(lm)
    if not tokenizer.chat_template:
        return "\n\n".join([*(turn["content"] for turn in turns), *([opening] if opening else [])])
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
    return text + opening


def render_example(lm: LM, task: Task, example: Example) -> str:
    """The text of an example of a task: its turns, up to where the answer starts, and how that is made to begin.

    Raises:
      UserError: the question is empty.
    """
    turns = task.turns(example)
    if not turns[-1]["content"].strip():
        raise UserError(f"task {task.name}: a question is empty; give it some text")
    return render_turns(lm, turns, task.opening(lm.model.cfg.architecture))


def tokenize(lm: LM, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of rendered texts; a rendered chat already holds its special tokens."""
    tokenizer = need_tokenizer(lm)
    return [tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"] for text in texts]


def encode(lm: LM, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), both [B, T] int32, of rendered texts, padded on the left to the longest."""
    rows = tokenize(lm, texts)
    width = max((len(row) for row in rows), default=0)
    ids, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        if row:
            ids[i, -len(row) :] = row
            mask[i, -len(row) :] = 1
    return ids, mask


def decode(lm: LM, tokens: Any, lengths: Any) -> list[str]:
    """The text of each row's first `lengths` tokens, special tokens left out."""
    tokenizer = need_tokenizer(lm)
    rows = zip(np.asarray(tokens), np.asarray(lengths), strict=True)
    return [tokenizer.decode(row[:length], skip_special_tokens=True) for row, length in rows]


def end_tokens(lm: LM) -> tuple[int, ...]:
    """The ids that end an answer: the configuration's, and the tokenizer's own."""
    ids = list(lm.model.cfg.eos_token_ids)
    own = None if lm.tokenizer is None else lm.tokenizer.eos_token_id
    return tuple(dict.fromkeys([*ids, *([] if own is None else [own])]))


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


@lru_cache(maxsize=32)
def _shows(tokenizer: Any, template: str, roles: tuple[str, ...], place: int) -> bool:
    """Whether the template writes what one of these roles says, tried with a number, which no template changes."""
    turns = [{"role": role, "content": _PROBE if number == place else "."} for number, role in enumerate(roles)]
    try:
        return _PROBE in _applied(tokenizer, template, turns)
    except Exception:  # what it raises is told when it is applied to the turns that are meant
        return False


@lru_cache(maxsize=32)
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
