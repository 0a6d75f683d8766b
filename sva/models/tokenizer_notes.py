"""Settings of a tokenizer that are passed over: one sentence each, for whoever expects them to count."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sva.models.gguf_file import GGUFFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONFIG = "tokenizer_config.json"
_SPACES = ("▁", "Ġ")  # how vocabularies write a space in front of a word


def of_directory(settings: Mapping[str, Any], tokenizer: "Tokenizer", jinja: str | None) -> list[str]:
    """Contradictions of tokenizer_config.json to tokenizer.json; the latter is followed, as in transformers 5.

    Args:
      settings: of tokenizer_config.json.
      tokenizer: that of tokenizer.json. Whether it follows a setting is tried out on a letter.
      jinja: the text of chat_template.jinja, or None where there is no such file.
    """
    notes = [
        f"{_CONFIG}: {name} is {json.dumps(settings[name])}, but tokenizer.json {does}; tokenizer.json is followed"
        for name, value, does in _tried(tokenizer)
        if isinstance(settings.get(name), bool) and settings[name] != value
    ]
    if settings.get("clean_up_tokenization_spaces") is True:
        notes.append(f"{_CONFIG}: clean_up_tokenization_spaces is passed over; answers keep the spaces of their tokens")
    if settings.get("sp_model_kwargs"):
        notes.append(f"{_CONFIG}: sp_model_kwargs is passed over; a text always gives the same tokens")
    if jinja is not None and settings.get("chat_template") not in (None, jinja):
        notes.append(f"{_CONFIG}: chat_template is passed over; chat_template.jinja beside it is followed")
    return notes


def _tried(tokenizer: "Tokenizer") -> Iterator[tuple[str, bool, str]]:
    """(setting, what tokenizer.json makes of it, in words), of those that it decides by itself."""

    def tokens(text: str, **settings: Any) -> list[str]:
        return tokenizer.encode(text, **settings).tokens

    bare, whole = tokens("a", add_special_tokens=False), tokens("a")
    if not bare:
        return
    at = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    front, behind = at > 0, at + len(bare) < len(whole)
    yield "add_bos_token", front, f"puts {whole[0] if front else 'no token'} in front of a text"
    yield "add_eos_token", behind, f"puts {whole[-1] if behind else 'no token'} behind a text"
    prefix = bare[0].startswith(_SPACES)
    yield "add_prefix_space", prefix, f"puts {'a' if prefix else 'no'} space in front of a text"
    lower = tokens("A", add_special_tokens=False) == bare
    yield "do_lower_case", lower, f"{'lowers' if lower else 'keeps'} capitals"
    special = next((token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special), None)
    if special is not None and bare[0].startswith("▁"):
        behind_special = tokens(f"{special}a", add_special_tokens=False)[1:]
        legacy = bool(behind_special) and behind_special[0].startswith("▁")
        yield "legacy", legacy, f"puts {'a' if legacy else 'no'} space behind special tokens"


def of_gguf(file: GGUFFile) -> list[str]:
    """Metadata about a GGUF file's tokenizer that is not followed; llama.cpp does not for such a vocabulary either."""
    prefix = "tokenizer.ggml."
    size, model = len(file.get(f"{prefix}tokens", ())), file.get(f"{prefix}model")
    why = {
        "remove_extra_whitespaces": "spaces are kept as they are",
        "add_sep_token": "no separator is added",
        "precompiled_charsmap": "text is not normalised",
    }
    if model != "llama":
        why["add_space_prefix"] = f"a vocabulary of the kind {model} puts no space in front of a text"
    notes = []
    for name, does in why.items():
        value = file.get(f"{prefix}{name}")
        if value is not None and value is not False and len(value if hasattr(value, "__len__") else "x"):
            notes.append(f"{prefix}{name} is passed over: {does}")
    if file.get("tokenizer.huggingface.json"):
        notes.append(f"tokenizer.huggingface.json is passed over: the vocabulary under {prefix}* is used")
    for name in ("bos", "eos", "unknown", "padding"):
        number = file.get(f"{prefix}{name}_token_id")
        if number is not None and number != 0xFFFFFFFF and not 0 <= number < size:
            notes.append(f"{prefix}{name}_token_id is passed over: there are {size} tokens, {number} is none of them")
    for name in ("bos", "eos"):
        wanted, number = file.get(f"{prefix}add_{name}_token"), file.get(f"{prefix}{name}_token_id")
        if wanted and (number is None or not 0 <= number < size):
            notes.append(f"{prefix}add_{name}_token is passed over: the file names no such token")
    return notes
