import copy
import dataclasses
import pickle

import numpy as np
import pytest
from test_tokenizer import bpe_gguf
from tokenizers.processors import TemplateProcessing

from sva.adaptation import label_scoring
from sva.evaluation import likelihood
from sva.generation import chat
from sva.generation.testing import NameAColour, tokenizer, toy_lm
from sva.models.tokenizer import load_tokenizer
from sva.tasks import task
from sva.tasks.labels import Label
from sva.training.sft import solution_tokens
from sva.utils.errors import UserError


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
    np.testing.assert_array_equal(ids, [[3, 27, 22, 31, 4], [0, 0, 0, 3, 5]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]])


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


FRONTS = {"none": "$A", "bos": "<pad> $A", "eos": "$A <end>", "both": "<pad> $A <end>", "two": "<pad> <unk> $A <end>"}
RED, PAD, END = 5, 0, 1


def putting(front, template=True):
    """The toy model whose tokenizer puts special tokens around every text."""
    own, special = tokenizer(), [("<pad>", PAD), ("<end>", END), ("<unk>", 2)]
    own.backend_tokenizer.post_processor = TemplateProcessing(single=FRONTS[front], special_tokens=special)
    if not template:
        own.chat_template = None
    return dataclasses.replace(toy_lm(), tokenizer=own)


class Red(NameAColour):
    """A task with an answer to train on."""

    def question(self, example):
        return "red"


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize(
    ("front", "before"), [("none", []), ("bos", [PAD]), ("eos", []), ("both", [PAD]), ("two", [PAD, 2])]
)
def test_bos_goes_in_front_of_raw_text_alone_and_no_end_token_behind_any(front, before, template):
    lm = putting(front, template)
    raw, chatted = [*before, RED], [3, RED, 4] if template else [*before, RED]
    assert chat.tokenize(lm, ["red"]) == [raw]
    assert chat.tokenize(lm, [chat.render(lm, "red")]) == [chatted]
    assert chat.tokenize(lm, [chat.render(lm, "red") + " red"]) == [[*chatted, RED]]
    assert chat.tokenize(lm, [chat.render_example(lm, Red(), {})]) == [chatted]
    assert chat.tokenize(lm, ["red"], follows=True) == [[RED]]
    assert chat.tokenize(lm, [""]) == [before]
    assert likelihood.followed(lm, "red", [" red", " red red"]) == (raw, [[RED], [RED, RED]])
    assert solution_tokens(lm, Red(), [{"answer": "red"}]) == [[RED, END]]
    form = label_scoring.template(lm, (Label("red", "a"), Label("other", "b")))
    start = [3, 2] if template else [*before, 2]
    assert chat.tokenize(lm, [form.before])[0][: len(start)] == start


def test_the_public_codes_prompt_takes_bos_beside_the_templates_and_says_so_once(capsys):
    chat._say.cache_clear()
    lm, task = putting("both"), dataclasses.replace(Red(), prompt="reference")
    assert chat.tokenize(lm, [chat.render_example(lm, task, {})]) == [[PAD, 3, RED, 4]]
    lm.tokenizer.chat_template = f"<pad>{lm.tokenizer.chat_template}"
    assert chat.tokenize(lm, [chat.render_example(lm, task, {}) for _ in range(2)]) == [[PAD, PAD, 3, RED, 4]] * 2
    said = capsys.readouterr().err.splitlines()
    assert [line.endswith("there twice") for line in said] == [False, True]
    assert all("prompt=reference: <pad> goes in front" in line for line in said)
    assert chat.tokenize(lm, [chat.render_example(lm, Red(), {})]) == [[PAD, 3, RED, 4]]
    for silent in (putting("none"), putting("both", template=False)):
        ids = chat.tokenize(silent, [chat.render_example(silent, task, {})])
        assert ids == chat.tokenize(silent, [chat.render_example(silent, Red(), {})])
    assert capsys.readouterr().err == ""


def test_a_rendered_text_stays_one_when_it_is_copied(toy):
    text = chat.render(toy, "red")
    for again in (copy.deepcopy(text), pickle.loads(pickle.dumps(text))):
        assert (again, again.bos) == (text, False)


def test_settings_of_a_tokenizer_file_that_pad_and_cut_change_nothing(toy):
    own = tokenizer()
    own.backend_tokenizer.enable_truncation(2)
    own.backend_tokenizer.enable_padding(length=8)
    lm = dataclasses.replace(toy, tokenizer=own)
    assert chat.tokenize(lm, ["red green blue", "red"]) == [[5, 6, 7], [5]]


@pytest.mark.parametrize(("add", "front"), [({}, [1]), ({"add_bos_token": False}, []), ({"add_eos_token": True}, [1])])
def test_a_gguf_file_that_names_a_bos_says_whether_it_is_added(add, front, toy, tmp_path):
    own = load_tokenizer(bpe_gguf(tmp_path / "m.gguf", "llama-bpe", **add))
    model = toy.model.clone(cfg=dataclasses.replace(toy.model.cfg, vocab_size=len(own)))
    lm = dataclasses.replace(toy, model=model, tokenizer=own)
    assert own.bos_token_id == 1
    the = own("the", add_special_tokens=False)["input_ids"]
    assert chat.tokenize(lm, ["the", chat.render(lm, "the")]) == [[*front, *the], [2, *the]]


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
        label_scoring.template(lm, [Label("colour", "colours"), Label("other", "anything else")])


def test_a_base_model_is_asked_with_worked_examples_and_stops_at_the_next(toy):
    own = copy.deepcopy(toy.tokenizer)
    own.chat_template = None
    base = dataclasses.replace(toy, tokenizer=own)
    shown, bare = task("capitals", shots=2), task("capitals")
    first, second, asked = (shown.source("train")[0], shown.source("train")[1], shown.source("test")[0])
    text = chat.render_example(base, shown, asked)
    assert (
        text
        == "".join(f"Question: {shown.question(row)}\nAnswer: {shown.answer(row)}\n\n" for row in (first, second))
        + f"Question: {shown.question(asked)}\nAnswer:"
    )
    assert text.bos
    assert chat.stops(base, shown) == (*shown.stop, "\nQuestion:")
    assert chat.stops(base, bare) == chat.stops(toy, shown) == bare.stop
    assert chat.render_example(base, bare, asked) == bare.question(asked)


def test_a_training_question_is_not_among_the_examples_that_it_is_shown_with():
    shown = task("capitals", shots=2)
    rows = [shown.question(shown.source("train")[place]) for place in range(3)]
    questions = [turn["content"] for turn in shown.turns(shown.source("train")[0]) if turn["role"] == "user"]
    assert questions == [rows[1], rows[2], rows[0]]
