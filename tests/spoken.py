"""Small vocabularies of both byte kinds, and models that say given tokens."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sva.generation.lm import LM
from sva.generation.testing import toy_config
from sva.models.transformer import Transformer
from sva.models.weights import expected


def byte_level():
    """One token a byte, some of several bytes (not all whole characters), special tokens and added text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(_numbered([*alphabet, "Ġa", "âĺ", "ĥâ"]), []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return _finished(inner)


def byte_fallback(*, strip=True):
    """Llama 2's kind: the 256 bytes as <0x00> to <0xFF>, and a few pieces; `strip`: a row's first blank is left out."""
    pieces = ["▁", "▁▁", "▁a", "a", "b", "c", "\N{SNOWMAN}", "\N{REPLACEMENT CHARACTER}"]
    vocabulary = _numbered(["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *pieces])
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    return _finished(inner)


def metaspace():
    """Pieces that write a blank as ▁, without bytes."""
    inner = Tokenizer(models.BPE(_numbered(["<unk>", "▁", "▁a", "a", "b"]), [], unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    return _finished(inner)


def words():
    """Words that a blank joins, as no decoder at all does."""
    return _finished(Tokenizer(models.WordLevel(_numbered(["<unk>", "a", "b", "\n"]), unk_token="<unk>")))


def speaker(tokenizer, follows, default, *, ends=()):
    """An LM that says follows[t] after token t, else `default`; neither attention nor the MLP adds to it."""
    size = len(tokenizer)
    cfg = dataclasses.replace(
        toy_config(), vocab_size=size, hidden_size=size + size % 2, num_heads=1, num_kv_heads=1, eos_token_ids=ends
    )
    model = Transformer(cfg)
    named = {name: np.full(spec.shape, "norm" in name, np.float32) for name, spec in expected(cfg).items()}
    named["model.embed_tokens.weight"][:, :size] = np.eye(size)
    for token in range(size):
        named["lm_head.weight"][follows.get(token, default), token] = 5.0
    return LM(model, model.nest({name: jnp.asarray(x) for name, x in named.items()}), tokenizer, "speaker")


def saying(tokenizer, *pieces, ends=()):
    """An LM that says these tokens, each at most once, after any other, and then begins again."""
    ids = tokenizer.convert_tokens_to_ids(list(pieces))
    assert len(set(ids)) == len(ids)
    assert None not in ids
    return speaker(tokenizer, dict(zip(ids, ids[1:], strict=False)), ids[0], ends=ends)


def byte_id(tokenizer, byte):
    """The token that stands for this byte."""
    if "<0x00>" in tokenizer.get_vocab():
        return tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>")
    # GPT-2's alphabet: printable bytes are their own letters, the others follow each other from U+0100 on
    printable = [b for b in range(256) if chr(b).isprintable() and b != 0x20]
    others = [b for b in range(256) if b not in printable]
    return tokenizer.convert_tokens_to_ids(chr(byte) if byte in printable else chr(256 + others.index(byte)))


def _numbered(pieces):
    return {piece: number for number, piece in enumerate(pieces)}


def _finished(inner):
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<end>", "<turn>")])
    inner.add_tokens(
        [AddedToken(text, normalized=False) for text in ("<note>", "<\N{LATIN SMALL LETTER E WITH ACUTE}>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", pad_token="<end>", clean_up_tokenization_spaces=False
    )
