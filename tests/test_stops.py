import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sva.stops import Text


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


def test_the_first_token_that_completes_one_ends_it_and_then_the_order_given(letters):
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
