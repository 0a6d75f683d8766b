"""The tokenizer of a checkpoint: a Hugging Face directory's own, or built from a GGUF file's vocabulary."""

import codecs
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sva.models import tokenizer_notes
from sva.models.end_tokens import CONTROL, USER_DEFINED, end_tokens
from sva.models.gguf_file import GGUFFile, read_gguf
from sva.utils.errors import UserError
from sva.utils.files import read_json, read_text
from sva.utils.remote import copy_small_files, is_remote, to_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NO_TOKENIZER = "none"
"""`tokenizer.ggml.model` of a GGUF file that holds weights only."""

_SMALL = 100 << 20  # bytes: no file of a tokenizer is larger

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"


class _Pre(NamedTuple):
    """The rules by which one `tokenizer.ggml.pre` cuts text into words."""

    pattern: str
    split_digits: bool = False  # each digit by itself, before the pattern is looked for
    whole_words: bool = False  # a word that is a token is not merged from its bytes
    add_bos: bool = False  # unless the file says otherwise


_LLAMA3 = _Pre(_CASELESS + r"\p{N}{1,3}" + _TAIL, whole_words=True, add_bos=True)
_QWEN2 = _Pre(_CASELESS + r"\p{N}" + _TAIL)
_PRE = {
    "smollm": _Pre(_GPT2, split_digits=True),
    "gpt-2": _Pre(_GPT2),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def load_tokenizer(path: Path | str) -> "PreTrainedTokenizerFast | None":
    """The tokenizer beside the weights, or inside the GGUF file; None where a directory or a file has none.

    A directory's `tokenizer.json` is used as it is, with the special tokens and the chat template of
    `tokenizer_config.json` and `chat_template.jinja`. A GGUF file's is built to give llama.cpp's token ids,
    so nothing is normalised (a Qwen directory's tokenizer composes accents first, its GGUF file's does not).

    Raises:
      UserError: a damaged tokenizer file, or a GGUF vocabulary of a kind that is not supported.
    """
    path = to_path(path)
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="sva-") as folder:
            copy_small_files(path, Path(folder), _SMALL)
            with _without_marks(Path(folder)) as texts:
                return _from_directory(texts, path)
    if path.is_file():
        return _from_gguf(read_gguf(path))
    with _without_marks(path) as folder:
        return _from_directory(folder, path)


@contextlib.contextmanager
def _without_marks(directory: Path) -> Iterator[Path]:
    """The directory, or where one of its texts begins with a byte-order mark a copy of them without.

    The libraries that read a tokenizer's files do not skip it.
    """
    texts = [path for end in ("*.json", "*.jinja", "*/*.jinja") for path in directory.glob(end)]
    if not any(_begins_with_mark(path) for path in texts):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="sva-") as folder:
        for path in texts:
            target = Path(folder) / path.relative_to(directory)
            target.parent.mkdir(exist_ok=True)
            target.write_text(read_text(path), encoding="utf-8")
        yield Path(folder)


def _begins_with_mark(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _fast_tokenizer() -> "type[PreTrainedTokenizerFast]":
    """transformers' class, imported when it is needed (1 s) and without its advice to install torch."""
    switch = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        from transformers import PreTrainedTokenizerFast
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before
    return PreTrainedTokenizerFast


def _from_directory(directory: Path, where: Path) -> "PreTrainedTokenizerFast | None":
    """The tokenizer of a directory's files, which messages call `where`; what it passes over is said on stderr."""
    if not (directory / "tokenizer.json").is_file():
        return None
    fast, config, jinja = _fast_tokenizer(), directory / "tokenizer_config.json", directory / "chat_template.jinja"
    settings = read_json(config) if config.is_file() else {}
    _check_template(settings.get("chat_template"), where)
    try:
        tokenizer = fast.from_pretrained(directory, clean_up_tokenization_spaces=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot parse
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{where}: its tokenizer cannot be read ({reason}); fetch it again") from error
    own = read_text(jinja) if jinja.is_file() else None
    for note in tokenizer_notes.of_directory(settings, tokenizer.backend_tokenizer, own):
        print(f"sva: {where}: {note}", file=sys.stderr)
    return tokenizer


def _check_template(template: Any, where: Path) -> None:
    """Raises UserError unless a chat template is a text, or several with names."""
    entries = template if isinstance(template, list) else []
    named = [
        isinstance(one, dict) and all(isinstance(one.get(key), str) for key in ("name", "template")) for one in entries
    ]
    if isinstance(template, dict):
        named = [isinstance(one, str) for one in template.values()]
    if not isinstance(template, str | list | dict | None) or not all(named):
        raise UserError(
            f"{where}: chat_template in tokenizer_config.json must be a text, or a list of objects with the texts "
            '"name" and "template"; fetch it again'
        )


def _from_gguf(file: GGUFFile) -> "PreTrainedTokenizerFast | None":
    if file.get("tokenizer.ggml.model") == NO_TOKENIZER:
        return None
    tokens: list[str] = file.need("tokenizer.ggml.tokens")
    model = file.need("tokenizer.ggml.model")
    if model not in _MODELS:
        raise UserError(
            f"{file.path}: unsupported tokenizer.ggml.model {model!r}; supported: {', '.join(_MODELS)};"
            " use the Hugging Face directory of this model"
        )
    try:
        add_bos, tokenizer = _MODELS[model](file, tokens)
    except UserError:
        raise
    except Exception as error:  # bare Exception is what the tokenizers library raises
        raise UserError(f"{file.path}: its vocabulary is damaged ({error}); fetch it again") from error
    ending = end_tokens(file.metadata, str(file.path))  # no text of an answer, whatever their type
    added: dict[bool, list[AddedToken]] = {True: [], False: []}
    for number, (token, kind) in enumerate(zip(tokens, file.get("tokenizer.ggml.token_type", ()), strict=False)):
        if kind in (CONTROL, USER_DEFINED):
            is_special = bool(kind == CONTROL) or number in ending
            added[is_special].append(AddedToken(token, special=is_special, normalized=False))
    tokenizer.add_special_tokens(added[True])  # all at once: each call looks through those that are there
    tokenizer.add_tokens(added[False])
    special: dict[str, str] = {}
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        number = file.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and number < len(tokens):
            special[f"{name}_token"] = tokens[number]
    for note in tokenizer_notes.of_gguf(file):
        print(f"sva: {file.path}: {note}", file=sys.stderr)
    ends = {
        "bos": bool(file.get("tokenizer.ggml.add_bos_token", add_bos)),
        "eos": bool(file.get("tokenizer.ggml.add_eos_token", False)),
    }
    ends = {name: special[f"{name}_token"] for name, wanted in ends.items() if wanted and f"{name}_token" in special}
    if ends:
        bos, eos = [ends["bos"]] if "bos" in ends else [], [ends["eos"]] if "eos" in ends else []
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[
                *bos,
                "$A",
                *eos,
                *(f"{token}:1" for token in bos),
                "$B:1",
                *(f"{token}:1" for token in eos),
            ],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(ends.values())],
        )
    return _fast_tokenizer()(
        tokenizer_object=tokenizer,
        chat_template=_gguf_templates(file),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )


def _gguf_templates(file: GGUFFile) -> str | dict[str, str] | None:
    """The chat template, or where there are several {name: template}, the plain one being "default"."""
    key = "tokenizer.chat_template"
    texts = {name: file.get(f"{key}.{name}") for name in file.get("tokenizer.chat_templates", ())}
    named = {name: text for name, text in texts.items() if text}
    plain = file.get(key)
    return ({"default": plain} if plain else {}) | named if named else plain


def _byte_level_bpe(file: GGUFFile, tokens: list[str]) -> tuple[bool, Tokenizer]:
    """GPT-2's kind: (whether BOS goes in front by default, tokenizer without its special tokens)."""
    name = file.get("tokenizer.ggml.pre", "default")
    if name not in _PRE:
        raise UserError(
            f"{file.path}: unsupported tokenizer.ggml.pre {name!r}; supported: {', '.join(_PRE)};"
            " use the Hugging Face directory of this model"
        )
    pre = _PRE[name]
    merges = []
    for merge in file.need("tokenizer.ggml.merges"):
        at = merge.find(" ", 1)
        merges.append((merge[:at], merge[at + 1 :]))
    tokenizer = Tokenizer(models.BPE(_numbered(tokens), merges, ignore_merges=pre.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *([pre_tokenizers.Digits(individual_digits=True)] if pre.split_digits else []),
            pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return pre.add_bos, tokenizer


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> tuple[bool, Tokenizer]:
    """Llama 2's and Mistral's kind: (whether BOS goes in front by default, tokenizer without special tokens).

    llama.cpp joins the neighbours whose joined text has the best score, leftmost first. As merges: every way
    to split a token in two tokens, ranked by the token's score.
    """
    scores = file.need("tokenizer.ggml.scores")
    vocabulary = _numbered(tokens)
    order = sorted(vocabulary.values(), key=lambda number: -scores[number])
    merges = [
        (token[:at], token[at:])
        for token in (tokens[number] for number in order)
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    unknown = file.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True))
    prefix = bool(file.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return True, tokenizer


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


# tokenizer.ggml.model -> how it is built
_MODELS = {"gpt2": _byte_level_bpe, "llama": _sentencepiece}
