import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import sva
from sva.adaptation import dispatchers, few_shot, few_shot_gradient, label_scoring
from sva.adaptation.adaptive_lm import AdaptiveLM
from sva.cli.main import main
from sva.evaluation import evaluate, likelihood
from sva.generation import chat, population_batch
from sva.generation.complete import complete
from sva.generation.engine import EngineConfig, Request, run
from sva.generation.sampling import Greedy
from sva.generation.testing import NameAColour, tokenizer, toy_lm
from sva.generation.weights import Weights
from sva.models.transformer import logits
from sva.models.vocabulary import check_ids, excess
from sva.tasks.labels import Label
from sva.training import population, rollout, sft
from sva.utils.errors import UserError

SPARE = 32  # the id of <spare>, the first one without an embedding
NAMED = r"the token '<spare>' \(id 32\) has no embedding, for the vocabulary has 32 tokens"


class Asking(NameAColour):
    """A task whose questions hold the spare token, or whose answers do."""

    def question(self, example):
        return example.get("ask", "what <spare> ?")


@pytest.fixture(scope="module")
def larger():
    """The toy model with a tokenizer of a token more than it has embeddings."""
    own = tokenizer()
    own.add_special_tokens({"additional_special_tokens": ["<spare>"]})
    assert own.convert_tokens_to_ids("<spare>") == SPARE
    return dataclasses.replace(toy_lm(), tokenizer=own)


IDS, ONES = np.array([[5, SPARE]]), np.ones((1, 2), int)
TASK, ASKED = Asking(), [{"thing": "apple", "of": "boat"}]
KEYS = jax.random.split(jax.random.key(0), 1)
SHOTS = few_shot.Shots(TASK, tuple(ASKED))
LABELS = (Label("red", "a colour"), Label("other", "anything else"))
SPARE_LABELS = (Label("<spare>", "none"), Label("other", "anything else"))


def adaptive(lm):
    """As much of two passes as reads questions."""
    return AdaptiveLM(lm, LABELS, SimpleNamespace(slots=(1, 0)), label_scoring.template(lm, LABELS), None, {}, LABELS)


PATHS = {
    "chat": lambda lm: chat.encode(lm, [chat.render(lm, "what <spare> ?")]),
    "raw": lambda lm: chat.tokenize(lm, ["red", "<spare>"]),
    "lm.logits": lambda lm: lm.logits(IDS, ONES),
    "lm.generate": lambda lm: lm.generate(IDS, ONES, 4),
    "complete": lambda lm: next(complete(lm, IDS.tolist(), 4)),
    "members": lambda lm: population_batch.prompt_batch(lm, IDS.tolist(), KEYS, 4),
    "likelihood, prompt": lambda lm: likelihood.option_logprobs(lm, ["what <spare>"], [[" red"]]),
    "likelihood, option": lambda lm: likelihood.option_logprobs(lm, ["what"], [[" red", " <spare>"]]),
    "evaluate": lambda lm: evaluate.evaluate(lm, [evaluate.Item(TASK, ASKED[0])], progress=False),
    "evaluate, refilled": lambda lm: evaluate.by_refilling(lm, 64, 2)([evaluate.Item(TASK, ASKED[0])]),
    "rollout": lambda lm: rollout.prompts(lm, rollout.TaskBatch(TASK, ASKED, rollout.PromptShape(32, 32, 0))),
    "rollout's shape": lambda lm: rollout.prompt_shape(lm, TASK, ASKED),
    "population": lambda lm: population.shape_of(lm, TASK, ASKED),
    "few-shot": lambda lm: few_shot.shot_tokens(lm, SHOTS),
    "few-shot by gradient": lambda lm: next(
        few_shot_gradient.adapt(
            lm,
            None,
            SHOTS,
            few_shot_gradient.GradientConfig(),
            few_shot.FewShotConfig(),
            KEYS[0],
            state=None,
            generations=range(1, 2),
        )
    ),
    "answers to train on": lambda lm: sft.solution_tokens(lm, TASK, [{"ask": "x", "answer": "red <spare>"}]),
    "label": lambda lm: label_scoring.prepare(lm, SPARE_LABELS),
    "label, generated": lambda lm: dispatchers.generated(lm, SPARE_LABELS, None),
    "first pass": lambda lm: label_scoring.encode(lm, label_scoring.template(lm, LABELS), ["what <spare> ?"]),
    "two passes": lambda lm: adaptive(lm).rows(["what <spare> ?"]),
    "two passes, in order": lambda lm: adaptive(lm).shortest_first(["red", "what <spare> ?"]),
    "router": lambda lm: adaptive(lm).by("embedding", examples=[("what <spare> ?", "red")]),
}


@pytest.mark.parametrize("path", PATHS)
def test_a_token_without_embedding_is_refused_by_name(path, larger):
    with pytest.raises(UserError, match=NAMED) as caught:
        PATHS[path](larger)
    assert "\n" not in str(caught.value)


def test_the_message_says_whether_prompt_label_answer_or_template_holds_the_token(larger):
    def said(path):
        with pytest.raises(UserError) as caught:
            PATHS[path](larger)
        return str(caught.value)

    assert said("raw").startswith("the prompt '<spare>': ")
    assert said("chat").startswith("the prompt '<user> what <spare> ? <assistant>': ")
    assert said("label").startswith("the label '<spare>': ")
    assert said("answers to train on").startswith("the answer 'red <spare>': ")
    own = tokenizer()
    own.add_special_tokens({"additional_special_tokens": ["<spare>"]})
    own.chat_template = own.chat_template.replace("<assistant>", "<spare>")
    lm = dataclasses.replace(larger, tokenizer=own)
    with pytest.raises(UserError, match=f"^the chat template: {NAMED}"):
        chat.encode(lm, [chat.render(lm, "red")])
    assert chat.tokenize(lm, ["red"]) == [[5]]


def test_an_end_token_without_embedding_is_refused_where_it_is_scored(larger):
    own = tokenizer()
    own.add_special_tokens({"eos_token": "<spare>"})
    lm = dataclasses.replace(larger, tokenizer=own)
    assert chat.end_tokens(lm) == (1, SPARE)
    for scored in (
        lambda: sft.solution_tokens(lm, TASK, [{"answer": "red"}]),
        lambda: label_scoring.prepare(lm, LABELS),
    ):
        with pytest.raises(UserError, match=f"^the end token of toy-0: {NAMED}"):
            scored()


@pytest.mark.parametrize(("bad", "words"), [(SPARE, "the id 32 has"), (-1, "the id -1 has")])
def test_functions_that_know_no_tokenizer_name_the_id(bad, words, larger):
    model, params = larger.model, larger.params
    ids = np.array([[5, bad]])
    with pytest.raises(UserError, match=words):
        logits(model, params, ids, np.ones_like(ids))
    request = Request([5, bad], 4, KEYS)
    with pytest.raises(UserError, match=f"request 1: {words}"):
        next(run(Weights(model, params, np.array([1])), [Request([5], 4, KEYS), request], EngineConfig(), Greedy()))
    traced = jax.eval_shape(lambda ids: logits(model, params, ids, ids), ids)
    assert traced.shape == (1, 2, 32)


def test_ids_of_any_shape_are_checked_and_good_ones_pass():
    for good in ([], [0, 31], np.zeros((2, 3), np.int32)):
        check_ids(good, 32)
    with pytest.raises(UserError, match=r"^there: the id 40 has .*\(ids 0 to 31\); leave it out"):
        check_ids([[1, 2], [3, 40]], 32, what="there")


def test_a_tokenizer_larger_than_the_embeddings_is_said_when_the_model_is_loaded(larger, tmp_path, capsys):
    larger.save(tmp_path / "larger")
    path = str(tmp_path / "larger")
    again = sva.load(path, progress=False)
    line = f"sva: {path}: the tokenizer has 1 token beyond the model's 32 embeddings, '<spare>' (id 32)"
    assert capsys.readouterr().err.count(line) == 1
    assert again.tokenizer("<spare>")["input_ids"] == [SPARE]
    toy_lm().save(tmp_path / "toy")
    sva.load(str(tmp_path / "toy"), progress=False)
    assert capsys.readouterr().err == ""


def test_of_many_tokens_beyond_the_embeddings_the_first_are_named():
    own = tokenizer()
    assert excess(own, 32) is None
    assert excess(own, 40) is None
    said = excess(own, 2)
    assert said.startswith(
        "the tokenizer has 30 tokens beyond the model's 2 embeddings, '<unk>' (id 2), '<user>' (id 3), "
    )
    assert "(id 4), ...: " in said


def test_generate_skips_such_a_line_and_ends_at_such_a_template(larger, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sva.parallel.compile_cache.start", lambda: None)
    larger.save(tmp_path / "larger")
    lines = tmp_path / "lines.txt"
    lines.write_text("what <spare> ?\nwhat red ?\n")
    asked = ["generate", "--file", str(lines), "--json", "--max-new-tokens", "2"]
    assert main([*asked, "--model", str(tmp_path / "larger")]) == 2
    out, err = capsys.readouterr()
    assert [json.loads(line)["line"] for line in out.splitlines()] == [2]
    assert "lines.txt line 1: the prompt '<user> what <spare> ? <assistant>': the token '<spare>' (id 32)" in err
    larger.tokenizer.chat_template = "<spare>{{ messages[0]['content'] }}"
    try:
        larger.save(tmp_path / "bad")
    finally:
        larger.tokenizer.chat_template = tokenizer().chat_template
    assert main([*asked, "--model", str(tmp_path / "bad")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "sva: the chat template: the token '<spare>' (id 32)" in err
    assert "line 1" not in err
    assert main([*asked, "--raw", "--model", str(tmp_path / "bad")]) == 2
    assert [json.loads(line)["line"] for line in capsys.readouterr().out.splitlines()] == [2]
