import dataclasses

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sva.adaptation import label_scoring
from sva.generation import chat
from sva.generation.decompose import decompose
from sva.generation.merge import factored
from sva.tasks.labels import Label, instruction
from sva.utils.errors import UserError

LABELS = (Label("colour", "the name of a colour"), Label("green thing", "what is green"), Label("other", "else"))
SLOTS = (2, 1, 0)
QUESTIONS = ("what colour the apple ?", "name the thing of the green house", "blue ?", "what")


@pytest.fixture(scope="module")
def z(toy):
    rng = np.random.default_rng(0)
    spectra = decompose(toy, "all", progress=False)
    return {name: rng.uniform(0.5, 1.5, len(x.s)).astype(np.float32) for name, x in spectra.items()}


def _scores(lm, first, questions=QUESTIONS, adapter=None):
    form = label_scoring.template(lm, LABELS)
    encoded = label_scoring.encode(lm, form, questions)
    return np.asarray(label_scoring._scores(lm.model, lm.params, first, encoded, adapter))[
        : len(questions), : len(LABELS)
    ]


def _probs(scores, bias):
    """As `Scored` takes scores to probabilities."""
    return jax.nn.softmax(scores - np.asarray(bias, np.float32), axis=-1)


def _one_at_a_time(lm, question, label, z=None):
    """Log-probability of one label and its end, of the whole text in one uncached pass."""
    asked = lm.tokenizer(chat.render(lm, instruction(LABELS, question)))["input_ids"]
    answer = [*lm.tokenizer(label)["input_ids"], 1]
    ids, mask = np.zeros((2, 1, 160), np.int32)  # padded on the right, so that one program serves all
    ids[0, : len(asked) + len(answer)] = [*asked, *answer]
    mask[0, : len(asked) + len(answer)] = 1
    logps = np.asarray(jax.nn.log_softmax(lm.logits(ids, mask, z)[0], axis=-1))
    return sum(logps[len(asked) - 1 + i, token] for i, token in enumerate(answer))


@pytest.mark.parametrize("adapted", [False, True])
def test_label_scores_are_those_of_each_label_by_itself_without_a_cache(adapted, toy, z):
    used = z if adapted else None
    adapter = factored(decompose(toy, "all", progress=False), z) if adapted else None
    first = label_scoring.prepare(toy, LABELS, adapter=adapter, calibrate=False)
    expected = [[_one_at_a_time(toy, question, label.name, used) for label in LABELS] for question in QUESTIONS]
    np.testing.assert_allclose(_scores(toy, first, adapter=adapter), expected, atol=1e-4)
    assert (np.asarray(first.label_ids) > 0).sum() == 4  # "green thing" is two tokens
    assert (np.asarray(first.target_ids) > 0).sum() == 7


def test_a_question_after_the_prefix_has_the_ids_it_has_in_one_piece(toy):
    """As byte-level tokenizers join a space to the word after it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters, "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}w"])}
    model = Tokenizer(models.BPE(vocabulary, [("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}", "w")]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own = PreTrainedTokenizerFast(tokenizer_object=model, chat_template=toy.tokenizer.chat_template)
    model = toy.model.clone(cfg=dataclasses.replace(toy.model.cfg, vocab_size=len(own)))
    lm = dataclasses.replace(toy, model=model, tokenizer=own)
    form = label_scoring.template(lm, LABELS)
    for question in ("what colour ?", " what", "\nwhat"):
        whole = own(chat.render(lm, instruction(LABELS, question)))["input_ids"]
        ids, mask, _ = label_scoring.encode(lm, form, [question])
        assert own(form.before)["input_ids"] + ids[mask > 0].tolist() == whole
        assert form.before + form.space + question + form.after == chat.render(lm, instruction(LABELS, question))


def test_a_rows_scores_do_not_depend_on_the_others(toy):
    first = label_scoring.prepare(toy, LABELS)
    together = _scores(toy, first)
    np.testing.assert_array_equal(_scores(toy, first, QUESTIONS[::-1]), together[::-1])


def test_a_large_batch_is_read_without_its_padding_and_scores_the_same(toy):
    first = label_scoring.prepare(toy, LABELS)
    questions = [QUESTIONS[i % 2] + " the apple" * (3 + i % 5) for i in range(25)]
    asked = label_scoring.encode(toy, label_scoring.template(toy, LABELS), questions)
    assert asked.ids.shape[0] == 32
    assert asked.mask[:25].sum() <= len(asked.token_indices) < 0.85 * asked.mask.size
    padded = label_scoring._scores(toy.model, toy.params, first, asked._replace(token_indices=None))[:25, :3]
    np.testing.assert_allclose(_scores(toy, first, questions), padded, atol=1e-4)
    assert np.ptp(padded, axis=0).min() > 0.01


def test_large_batches_of_more_and_fewer_tokens_meet_the_same_program(toy, compilations):
    first = label_scoring.prepare(toy, LABELS)
    form = label_scoring.template(toy, LABELS)
    batches = [[QUESTIONS[1] + " apple" * (i % most) for i in range(32)] for most in (2, 12)]
    few, many = (label_scoring.encode(toy, form, batch) for batch in batches)
    assert few.ids.shape == many.ids.shape
    assert few.mask.sum() + 64 < many.mask.sum()
    _scores(toy, first, batches[0])
    compilations.clear()
    _scores(toy, first, batches[1])
    assert compilations == []


def test_calibration_takes_off_what_empty_prompts_favour(toy):
    plain = label_scoring.prepare(toy, LABELS, calibrate=False)
    calibrated = label_scoring.prepare(toy, LABELS)
    free = [[_one_at_a_time(toy, text, label.name) for label in LABELS] for text in label_scoring.CONTENT_FREE]
    expected = np.asarray(jax.nn.log_softmax(np.array(free), axis=-1)).mean(axis=0)
    np.testing.assert_array_equal(plain.bias, [0] * 3 + [np.inf] * 5)
    np.testing.assert_allclose(calibrated.bias, [*expected, *[np.inf] * 5], atol=1e-4)
    probs = _probs(_scores(toy, calibrated), calibrated.bias[:3])
    np.testing.assert_allclose(probs, jax.nn.softmax(_scores(toy, plain) - expected, axis=-1), atol=1e-4)


def test_the_likeliest_label_gets_its_slot_and_other_gets_nothing():
    probs = np.array([[0.5, 0.2, 0.3], [0.3, 0.4, 0.3], [0.1, 0.2, 0.7], [0.4, 0.4, 0.2]], np.float32)
    alphas = label_scoring.decide(probs, np.array(SLOTS), 5)
    np.testing.assert_array_equal(alphas, [[0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0] * 5, [0, 0, 1, 0, 0]])


def test_a_soft_choice_mixes_by_probability_and_a_threshold_leaves_the_unsure_to_the_base():
    slots = np.array(SLOTS)
    probs = np.array([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25], [0.1, 0.1, 0.8]], np.float32)
    soft = label_scoring.decide(probs, slots, 4, label_scoring.Soft())
    np.testing.assert_allclose(soft, [[0, 0.3, 0.6, 0], [0, 0.35, 0.4, 0], [0, 0.1, 0.1, 0]], atol=1e-6)
    sure = label_scoring.decide(probs, slots, 4, label_scoring.Threshold(0.5))
    np.testing.assert_array_equal(sure, [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    always, never = (label_scoring.decide(probs, slots, 4, label_scoring.Threshold(least)) for least in (0.0, 1.0))
    np.testing.assert_array_equal(always, label_scoring.decide(probs, slots, 4))
    assert not np.asarray(never).any()
    with pytest.raises(UserError, match=r"threshold=1.5 is not a probability"):
        label_scoring.Threshold(1.5)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a", "a", "other"), "two experts carry the label 'a'"),
        (("other",), "at least one expert"),
        (("a", "b"), "needs 'other'"),
        ((), "got none"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_refused(names, words, toy):
    with pytest.raises(UserError, match=words):
        label_scoring.prepare(toy, [Label(name, "x") for name in names])


def test_a_model_without_tokenizer_or_end_token_says_so(toy):
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        label_scoring.prepare(dataclasses.replace(toy, tokenizer=None), LABELS)
    endless = toy.model.clone(cfg=dataclasses.replace(toy.model.cfg, eos_token_ids=()))
    tokenizer = toy.tokenizer.__class__(tokenizer_object=toy.tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no end token"):
        label_scoring.prepare(dataclasses.replace(toy, model=endless, tokenizer=tokenizer), LABELS)
