import pytest
import spoken
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stream import rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sva.generation.stop_strings import Text, cut, stop_tokens
from sva.utils.errors import UserError

VOCABULARIES = {kind: getattr(spoken, kind)() for kind in ("byte_level", "byte_fallback", "metaspace", "words")}


@pytest.fixture(scope="module")
def letters():
    """A byte-level tokenizer of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)} | {"<end>": 256}, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    own.add_special_tokens(["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<end>", clean_up_tokenization_spaces=False)


def _ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_stop_string_is_found_across_tokens_and_calls_and_cut_off(letters):
    text = Text(letters, ("###",))
    assert text.add(_ids(letters, "a # b ##")) is None
    assert text.add(_ids(letters, "# c ###")) == 1
    assert (text.text, text.stop) == ("a # b ", "###")


def test_the_first_token_that_completes_one_ends_it(letters):
    text = Text(letters, ("long stop", "op", "stop"))
    assert text.add(_ids(letters, "a long stop")) == len("a long stop")
    assert (text.text, text.stop) == ("a ", "long stop")
    text = Text(letters, ("stop now", "st"))
    assert text.add(_ids(letters, "a stop now")) == len("a st")
    assert (text.text, text.stop) == ("a ", "st")


def test_what_came_before_is_not_searched_again(letters):
    text = Text(letters, ("aa",))
    assert text.add(_ids(letters, "ab")) is None
    assert text.add(_ids(letters, "aba")) is None
    assert text.add(_ids(letters, "a")) == 1
    assert text.text == "abab"


def test_characters_of_several_tokens_wait_until_they_are_whole_and_special_tokens_are_left_out(letters):
    text = Text(letters, ("\N{SNOWMAN}!",))
    snowman = _ids(letters, "\N{SNOWMAN}")
    assert len(snowman) == 3
    assert text.add([*snowman[:2]]) is None
    assert text.text == ""
    assert text.add([snowman[2], 256]) is None
    assert text.text == "\N{SNOWMAN}"
    assert text.safe == 0  # it may be the beginning of a stop string
    assert text.add(_ids(letters, "?")) is None
    assert text.safe == len(text.text) == 2
    assert text.add(_ids(letters, "\N{SNOWMAN}!..")) == 4
    assert text.text == "\N{SNOWMAN}?"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback", "metaspace", "words"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_text_is_the_cut_decode_of_its_own_tokens_and_ends_with_the_first_that_completes_a_stop(kind, data):
    tokenizer = VOCABULARIES[kind]
    row = data.draw(rows(tokenizer))
    choices = ["a", "\n", "a\n", " ", "b a", "ab", "\N{SNOWMAN}", "\n\N{SNOWMAN}", "<note>", "<turn>", "\ufffd", "\n\n"]
    stops = tuple(data.draw(st.lists(st.sampled_from(choices), max_size=3, unique=True)))
    text, told, keep = Text(tokenizer, stops), "", None
    for start in range(0, len(row), 3):
        keep = text.add(row[start : start + 3])
        told += text.take()
        if keep is not None:
            keep += start
            break
    text.end()
    told += text.take()
    own = row[:keep]
    assert text.text == told == cut(tokenizer.decode(own, skip_special_tokens=True), stops)
    if keep is not None and "\ufffd" not in stops:  # which may stand for a character that is not complete
        # A stop string may itself be a special token, and may go on behind one that is not part of the text.
        assert any(text.stop in tokenizer.decode(own, skip_special_tokens=skip) for skip in (False, True))
        for end in range(keep):
            before = tokenizer.decode(row[:end], skip_special_tokens=True)
            assert cut(before, stops) == before
            assert tokenizer.convert_tokens_to_ids("<turn>") not in row[:end] or "<turn>" not in stops


def test_of_stops_that_one_token_completes_the_one_that_begins_first_counts(letters):
    text = Text(letters, ("op", "long stop"))
    text.add(_ids(letters, "a long stop"))
    assert (text.text, text.stop) == ("a ", "long stop")


def test_a_stop_that_is_a_special_token_ends_the_text_by_its_id(letters):
    text = Text(letters, ("<end>", "!"))
    assert text.add([*_ids(letters, "ab"), 256, *_ids(letters, "c!")]) == 3
    assert (text.text, text.stop, text.take()) == ("ab", "<end>", "ab")
    text = Text(letters, ("<end>",))
    assert text.add(_ids(letters, "a<e")) is None
    text.end()
    assert text.text == "a<e"
    text = Text(letters, ("<end>",))
    assert text.add([*_ids(letters, "\N{SNOWMAN}")[:2], 256]) == 3
    assert text.text == "\ufffd"  # an incomplete character is what the decode of these tokens makes of it


def test_a_stop_that_no_text_can_hold_is_refused(letters):
    for stop in ("<end>\n", "\n<end>", "<end><end>"):
        with pytest.raises(UserError, match=r"holds the special token '<end>' and more.*stop at '<end>' alone"):
            Text(letters, (stop,))
    with pytest.raises(UserError, match="a stop string is empty"):
        Text(letters, ("a", ""))
    assert stop_tokens(letters, ("<end", "end>", "a")) == {}


def test_a_stop_in_a_run_of_byte_tokens_ends_the_text_at_once():
    tokenizer = VOCABULARIES["byte_fallback"]
    text = Text(tokenizer, ("\n\n",))
    assert text.add(tokenizer.convert_tokens_to_ids(["a", "<0x0A>", "<0x0A>", "<0xF0>", "b"])) == 3
    assert (text.text, text.stop) == ("a", "\n\n")
    text = Text(tokenizer, (" ",))
    assert text.add(tokenizer.convert_tokens_to_ids(["<0x20>", "a"])) is None  # the decoder leaves out the first blank
    assert text.text == "a"


def test_what_a_stop_string_held_back_is_taken_when_the_row_ends(letters):
    text = Text(letters, ("Q:",))
    text.add(_ids(letters, "to be Q"))
    assert text.take() == "to be "
    text.end()
    assert text.take() == "Q"
    assert text.take() == ""


def test_another_text_begins_empty_with_the_same_stops(letters):
    text = Text(letters, ("<end>", "x"))
    text.add(_ids(letters, "abx"))
    more = text.another()
    assert (more.text, more.stop) == ("", None)
    assert more.add([*_ids(letters, "c"), 256]) == 2
