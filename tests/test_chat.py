import dataclasses

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from sva import chat
from sva.errors import UserError
from sva.testing import tokenizer


@pytest.fixture
def adding(toy):
    """The toy model with a tokenizer that puts <user> in front by itself, as others do with a BOS token."""
    own = tokenizer()
    own.backend_tokenizer.post_processor = TemplateProcessing(single="<user> $A", special_tokens=[("<user>", 3)])
    return dataclasses.replace(toy, tokenizer=own)


def test_a_question_becomes_one_turn_of_the_template_with_no_token_twice(adding):
    text = chat.render(adding, "what colour ?")
    assert text == "<user> what colour ? <assistant>"
    ids, mask = chat.encode(adding, [text, "red"])
    np.testing.assert_array_equal(ids, [[3, 27, 22, 31, 4], [0, 0, 0, 0, 5]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])


def test_without_a_template_the_question_stands_alone_behind_its_first_token(adding):
    adding.tokenizer.chat_template = None
    assert chat.render(adding, "what colour ?") == "what colour ?"
    ids, _ = chat.encode(adding, ["what colour ?"])
    np.testing.assert_array_equal(ids, [[3, 27, 22, 31]])


def test_decoding_stops_at_the_length_and_leaves_out_special_tokens(toy):
    assert chat.decode(toy, [[5, 6, 1, 0], [5, 6, 7, 8], [1, 0, 0, 0]], [3, 2, 1]) == ["red green", "red green", ""]


def test_end_tokens_are_the_configs_and_the_tokenizers_each_once(toy):
    assert chat.end_tokens(toy) == (1,)
    model = toy.model.clone(cfg=dataclasses.replace(toy.model.cfg, eos_token_ids=(7, 1, 9)))
    assert chat.end_tokens(dataclasses.replace(toy, model=model)) == (7, 1, 9)
    assert chat.end_tokens(dataclasses.replace(toy, model=model, tokenizer=None)) == (7, 1, 9)


def test_an_empty_question_and_a_model_without_tokenizer_are_refused(toy):
    with pytest.raises(UserError, match="prompt is empty"):
        chat.render(toy, " \n")
    with pytest.raises(UserError, match=r"toy-0 has no tokenizer; put tokenizer\.json"):
        chat.encode(dataclasses.replace(toy, tokenizer=None), ["x"])
