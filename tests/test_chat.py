import dataclasses

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from sva import chat, dispatch
from sva.errors import UserError
from sva.tasks.labels import Label
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


TURNS = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "what colour ?"}]
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('users and assistants take turns') }}{% endif %}[{{ m.role }}] {{ m.content }} {% endfor %}"
)
SILENT = "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}] {{ m.content }} {% endif %}{% endfor %}"
NEEDS = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} {% endfor %}"
)


def with_template(toy, template):
    own = tokenizer()
    own.chat_template = template
    return dataclasses.replace(toy, tokenizer=own)


@pytest.mark.parametrize("template", [ALTERNATE, SILENT])
def test_without_a_system_role_its_text_goes_in_front_of_the_users_and_that_is_said_once(template, toy, capsys):
    lm = with_template(toy, template)
    assert chat.render_turns(lm, TURNS) == "[user] Be short.\n\nwhat colour ? "
    several = [*TURNS, {"role": "assistant", "content": "red"}, {"role": "user", "content": "and now ?"}]
    text = "[user] Be short.\n\nwhat colour ? [assistant] red [user] and now ? "
    assert chat.render_turns(lm, several, "It") == text + "It"
    assert chat.render_turns(lm, TURNS[1:]) == "[user] what colour ? "
    assert chat.render_turns(lm, [{"role": "system", "content": " "}, TURNS[1]]) == "[user] what colour ? "
    said = capsys.readouterr().err
    assert said.splitlines() == [
        "sva: toy-0: its chat template has no system role; a system text goes in front of the user's"
    ]


@pytest.mark.parametrize("template", [NEEDS, "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"])
def test_a_system_role_that_the_template_has_is_used(template, toy, capsys):
    assert chat.render_turns(with_template(toy, template), TURNS) == "[system] Be short. [user] what colour ? "
    assert capsys.readouterr().err == ""


def test_of_several_named_templates_the_default_is_taken(toy):
    named = {"rag": "{{ messages }}", "default": SILENT, "tool_use": "{% broken"}
    assert chat.render(with_template(toy, named), "what colour ?") == "[user] what colour ? "
    with pytest.raises(UserError, match="has chat templates called rag, tool_use and none called default"):
        chat.render(with_template(toy, {name: text for name, text in named.items() if name != "default"}), "x")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content }}", "TemplateSyntaxError"),
        ("{{ messages[0].content", "TemplateSyntaxError"),
        ("{{ raise_exception('no\\nturns') }}", "TemplateError: no"),
        ("{{ messages[0].content.body.text }}", "UndefinedError"),
        ("{{ nothing.of.this }}", "UndefinedError: 'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages | nofilter }}", "nofilter"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        (NEEDS, "system first"),
        ("{{ message.content }}", "UndefinedError"),
        ("<user> {{ question }} <assistant>", "leaves out what the user says"),
        ("{% for m in messages %}{{ m.text }}{% endfor %}", "leaves out what the user says"),
    ],
)
def test_a_broken_template_is_one_line(template, words, toy, capsys):
    with pytest.raises(UserError) as caught:
        chat.render(with_template(toy, template), "what colour ?")
    assert str(caught.value).startswith("toy-0: its chat template ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""


def test_a_template_that_writes_a_question_twice_cannot_classify(toy):
    lm = with_template(toy, "{{ messages[0].content }} {{ messages[0].content }}")
    with pytest.raises(UserError, match="writes a question 2 times; two passes need it once"):
        dispatch.template(lm, [Label("colour", "colours"), Label("other", "anything else")])
