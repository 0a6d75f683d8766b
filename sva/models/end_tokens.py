"""The tokens of a GGUF file that end an answer: those that its metadata names, and those known by their text.

Early converters named one end token only, often the end of a document, while the model ends its turns with another.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sva.models.fields import token_ids

CONTROL, USER_DEFINED = 3, 4
"""Types of a vocabulary's tokens that are no text of a document."""

_OF_A_TURN = frozenset(
    {
        "<|eot_id|>",  # Llama 3
        "<|eot|>",  # Llama 4
        "<|im_end|>",  # ChatML: Qwen, SmolLM2, Yi
        "<|end|>",  # Phi 3
        "<end_of_turn>",  # Gemma
        "<turn|>",  # Gemma 4
        "<|end_of_turn|>",  # OpenChat
        "<|END_OF_TURN_TOKEN|>",  # Command R
        "[|endofturn|]",  # EXAONE
        "<end_of_utterance>",  # SmolVLM
        "<|return|>",  # gpt-oss
        "[EOT]",  # Kimi K2
    }
)
_OF_A_TEXT = frozenset(
    {
        "</s>",
        "<eos>",
        "[EOS]",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|end▁of▁sentence|>",
        "<\uff5cend▁of▁sentence\uff5c>",  # DeepSeek
        "<EOT>",
        "< EOT >",
        "_<EOT>",
        "▁<EOT>",  # Code Llama
        "<|eom_id|>",  # Llama 3.1: a message to a tool
        "<|call|>",  # gpt-oss: the same
        "<|calls|>",
        "<|flush|>",
        "<|tool_response>",
    }
)


def end_tokens(metadata: Mapping[str, Any], where: str = "the GGUF file") -> list[int]:
    """The ids that end an answer, each once, the one that ends a turn last.

    Known by their text are control and user-defined tokens that llama.cpp ends at too, and a few families' more. As
    there, gpt-oss's <|end|> ends a message and no answer where <|return|> and <|call|> exist, and </s> is text where
    <|tool_response> exists.

    Raises:
      UserError: the metadata names something that is no id; `where` stands in the message.
    """
    named = {name: _named(metadata, name, where) for name in ("eos", "eom", "eot")}
    known = _known_by_text(metadata)
    template = metadata.get("tokenizer.chat_template")
    written = [i for i, text in known.items() if text in _OF_A_TURN and isinstance(template, str) and text in template]
    rest = [i for i in known if i not in written]
    order = [*rest, *named["eos"], *named["eom"], *written, *named["eot"]]
    return list(dict.fromkeys(reversed(order)))[::-1]


def _named(metadata: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
    key = f"tokenizer.ggml.{name}_token_id"
    return tuple(i for i in token_ids(metadata.get(key), f"{where}: {key}") if i != 0xFFFFFFFF)


def _known_by_text(metadata: Mapping[str, Any]) -> dict[int, str]:
    tokens, types = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(types, list | np.ndarray):
        return {}
    found = {
        number: text
        for number, (text, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (CONTROL, USER_DEFINED) and isinstance(text, str) and (text in _OF_A_TURN or text in _OF_A_TEXT)
    }
    texts = set(found.values())
    inside = set()
    if texts & {"<|call|>", "<|calls|>"} and texts & {"<|return|>", "<|flush|>"}:
        inside.add("<|end|>")
    if "<|tool_response>" in texts:
        inside.add("</s>")
    return {number: text for number, text in found.items() if text not in inside}
