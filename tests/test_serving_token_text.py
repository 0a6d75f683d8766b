import pytest
import spoken

from sva.generation.testing import VOCABULARY, tokenizer
from sva.serving.token_text import TokenText


def test_special_tokens_have_their_text():
    text = TokenText(tokenizer())
    assert [text.text(i) for i in range(6)] == list(VOCABULARY[:6])
    assert text.bytes(5) == b"red"


@pytest.mark.parametrize("make", [spoken.byte_level, spoken.byte_fallback])
def test_a_byte_that_is_no_character_stays_different_from_others(make):
    made = make()
    text = TokenText(made)
    ids = [spoken.byte_id(made, byte) for byte in (0xE2, 0x98, 0x41)]
    assert [text.text(i) for i in ids] == ["bytes:\\xe2", "bytes:\\x98", "A"]
    assert [text.bytes(i) for i in ids] == [b"\xe2", b"\x98", b"A"]


@pytest.mark.parametrize(
    ("make", "piece"), [(spoken.byte_level, "Ġa"), (spoken.byte_fallback, "▁a"), (spoken.metaspace, "▁a")]
)
def test_a_blank_in_front_is_kept(make, piece):
    made = make()
    assert TokenText(made).text(made.convert_tokens_to_ids(piece)) == " a"
