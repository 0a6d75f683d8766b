"""Questions to token ids and back, through the tokenizer's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sva.errors import UserError
from sva.lm import LM
from sva.stops import Text, stop_tokens
from sva.tasks.base import Example, Task


def render(lm: LM, question: str) -> str:
    """The text of one user turn, up to where the answer starts; the question itself without a chat template."""
    if not question.strip():
        raise UserError("the prompt is empty; give it some text")
    return render_turns(lm, [{"role": "user", "content": question}])


def render_turns(lm: LM, turns: Sequence[Mapping[str, str]], opening: str = "") -> str:
    """The text of a chat that ends in a user turn, up to where the answer starts, and its `opening`.

    Without a chat template, the contents of the turns with an empty line between them.
    """
    tokenizer = need_tokenizer(lm)
    if not tokenizer.chat_template:
        return "\n\n".join([*(turn["content"] for turn in turns), *([opening] if opening else [])])
    chat = [dict(turn) for turn in turns]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) + opening


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
    """`decode` of each row up to the first of its own stop strings, as `sva.stops.Text` finds them."""
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
      UserError: a stop string that is empty, or that no text can hold (`sva.stops.stop_tokens`).
    """
    ids = list(lm.model.cfg.eos_token_ids)
    own = None if lm.tokenizer is None else lm.tokenizer.eos_token_id
    stopping = stop_tokens(need_tokenizer(lm), stops) if stops else {}
    return tuple(dict.fromkeys([*ids, *([] if own is None else [own]), *stopping]))


def need_tokenizer(lm: LM) -> Any:
    """The model's tokenizer; UserError where it has none."""
    if lm.tokenizer is None:
        raise UserError(f"{lm.name} has no tokenizer; put tokenizer.json beside its weights, or pass token ids")
    return lm.tokenizer
