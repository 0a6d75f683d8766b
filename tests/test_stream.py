import pytest
import spoken
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sva.generation.stream import Stream, Vocabulary

VOCABULARIES = {
    "byte level": spoken.byte_level(),
    "byte fallback": spoken.byte_fallback(),
    "byte fallback, first blank kept": spoken.byte_fallback(strip=False),
    "metaspace": spoken.metaspace(),
    "words": spoken.words(),
}
TRICKY = ["<0x0A>", "<0x20>", "<0xE2>", "<0x98>", "<0x83>", "<0xF0>", "â", "ĺ", "ĥ", "âĺ", "ĥâ", "Ċ", "ð"]
TRICKY += ["▁", "▁a", "a", "b", "<unk>", "\N{REPLACEMENT CHARACTER}", "<end>", "<turn>", "<note>"]


def rows(tokenizer):
    """Token ids of every kind: what makes and breaks characters more often, and ids beyond the vocabulary."""
    tricky = [id for id in map(tokenizer.get_vocab().get, TRICKY) if id is not None]
    return st.lists(st.one_of(st.sampled_from(tricky), st.integers(0, len(tokenizer) + 2)), max_size=16)


@pytest.mark.parametrize("kind", VOCABULARIES)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_streamed_text_is_always_a_beginning_of_the_decode_and_at_the_end_all_of_it(kind, data):
    tokenizer = VOCABULARIES[kind]
    row = data.draw(rows(tokenizer))
    stream, text = Stream(Vocabulary(tokenizer)), ""
    for place, token in enumerate(row):
        text += stream.add(token)
        assert text + stream.peek() == tokenizer.decode(row[: place + 1], skip_special_tokens=True)
    text += stream.end()
    assert text == tokenizer.decode(row, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
@example(b"\n\xf0c")
@example(bytes(range(256)))
@example(b"\xed\xa0\x80\xf4\x90\x80\x80\xc0\xaf\xe2\x98")
def test_any_bytes_stream_to_what_they_decode_to(data):
    for kind in ("byte level", "byte fallback"):
        tokenizer = VOCABULARIES[kind]
        row = [spoken.byte_id(tokenizer, byte) for byte in data]
        stream = Stream(Vocabulary(tokenizer))
        assert "".join(map(stream.add, row)) + stream.end() == tokenizer.decode(row)


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_a_token_costs_the_same_however_long_the_row(kind, monkeypatch):
    tokenizer, decoded = VOCABULARIES[kind], []
    decode = Vocabulary.decode
    monkeypatch.setattr(Vocabulary, "decode", lambda self, ids: decoded.append(len(ids)) or decode(self, ids))
    names = ["<0xE2>", "<0x0A>", "â", "▁", "a", "\N{REPLACEMENT CHARACTER}", "<end>"]
    for token in filter(None, map(tokenizer.get_vocab().get, names)):
        decoded.clear()
        stream, size = Stream(Vocabulary(tokenizer)), 2000
        text = "".join(map(stream.add, [token] * size)) + stream.end()
        assert text == tokenizer.decode([token] * size, skip_special_tokens=True)
        assert sum(decoded) <= 10 * size


def test_characters_come_as_soon_as_they_are_whole_and_a_run_of_byte_tokens_when_it_ends():
    level, fallback = (VOCABULARIES[kind] for kind in ("byte level", "byte fallback"))
    stream = Stream(Vocabulary(level))
    assert [stream.add(token) for token in level.convert_tokens_to_ids(["âĺ", "ĥâ", "a"])] == ["", "\u2603", "\ufffda"]
    stream = Stream(Vocabulary(fallback))
    names = ["a", "<0x0A>", "<0xE2>", "<0x98>", "<0x83>", "b", "<0x0A>", "<0xF0>", "c"]
    told = [(stream.add(token), stream.open) for token in fallback.convert_tokens_to_ids(names)]
    assert told[:5] == [("a", ""), ("", "\n"), ("", "\n"), ("", "\n"), ("", "\n\u2603")]
    assert told[5:] == [("\n\u2603b", ""), ("", "\n"), ("", "\n"), ("\ufffd\ufffdc", "")]
