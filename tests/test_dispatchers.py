import dataclasses

import jax
import numpy as np
import pytest

import sva
from sva.adaptation import dispatchers
from sva.adaptation import two_pass as adapt
from sva.adaptation.adaptive_lm import DISPATCHERS, SLOTS, adaptive
from sva.generation import chat
from sva.generation.sampling import Greedy
from sva.generation.testing import COLOURS, THINGS
from sva.spectral.expert import Expert
from sva.tasks.labels import OTHER, Label
from sva.utils.errors import UserError
from sva.utils.timing import Stopwatch

QUESTIONS = ["what colour the apple ?", "name the thing of the green house", "blue ?", "what", "the of the of"]
EXAMPLES = [(f"what colour the {thing} ?", "colour") for thing in THINGS]
EXAMPLES += [(f"name the thing of {colour} of {thing}", "thing") for colour in COLOURS for thing in THINGS[:3]]
EXAMPLES += [(f"{thing} {thing}", OTHER) for thing in THINGS]
RIGHT = ["colour", "thing", OTHER, "nobody's", OTHER]


@pytest.fixture(scope="module")
def model(toy):
    spectra = sva.decompose(toy, "mlp", progress=False)

    def expert(seed, **metadata):
        rng = np.random.default_rng(seed)
        raw = {name: rng.uniform(0.3, 1.7, len(x.s)).astype(np.float32) for name, x in spectra.items()}
        return Expert(raw, "linear", metadata)

    labels = {"colour": "a colour", "thing": "a thing", OTHER: "anything else"}
    experts = [expert(i, label=name, description=labels[name]) for i, name in enumerate(("colour", "thing"))]
    return adaptive(toy, experts, classifier=expert(9, labels=labels), progress=False)


def _chosen(model, questions=tuple(QUESTIONS), right=tuple(RIGHT)):
    return adapt.choose(model.served, model.dispatcher, model.rows(questions, right))


def _answered(by, decision):
    """The second pass, one program for all dispatchers; both in one are what `answer` calls in the tests below."""
    keys = jax.random.split(jax.random.key(0), 8)
    limit, eos = np.int32(3), np.array([1], np.int32)
    request = adapt.Request(by.rows(QUESTIONS, RIGHT).prompts, limit, eos, keys, max_new_tokens=8, sampling=Greedy())
    return adapt.answer(by.served, decision.alphas, request)


@pytest.mark.parametrize("name", [*DISPATCHERS, "fixed:thing"])
def test_every_dispatcher_gives_probabilities_and_what_they_took(name, model):
    by = model.by(name, examples=EXAMPLES)
    decision = _chosen(by)
    probs = np.asarray(decision.probs)
    assert probs.shape == (8, 8)  # rows and labels in their buckets
    assert (probs >= 0).all()
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)
    assert not probs[:, 3:].any()
    assert decision.alphas.shape == (8, SLOTS)
    assert not np.asarray(decision.alphas)[:, [0, *range(3, SLOTS)]].any()
    works = name in ("prompt", "classifier", "generated", "embedding")
    assert (np.asarray(decision.work.flops) > 0).all() == works
    assert (np.asarray(decision.work.read) > 0).all() == works
    assert (np.asarray(decision.work.drawn) > 0).all() == (name == "generated")
    lengths = np.asarray(_answered(by, decision).lengths)[:5]
    assert ((lengths >= 1) & (lengths <= 3)).all()


def test_another_dispatcher_of_a_kind_compiles_nothing(model, compilations):
    first, second = (model.by(f"fixed:{name}") for name in ("thing", "colour"))
    rows = model.rows(QUESTIONS)
    adapt.choose(first.served, first.dispatcher, rows)
    compilations.clear()
    adapt.choose(second.served, second.dispatcher, rows)
    assert compilations == []


def test_a_label_generated_after_the_shared_prefix_is_that_of_the_question_in_one_piece(model):
    by = model.by("generated")
    lm, form = by.lm, by.template
    ids, mask = chat.encode(lm, [form.before + form.space + question + form.after for question in QUESTIONS])
    out = lm.generate(ids, mask, 8, chat.end_tokens(lm))
    wanted = by.dispatcher.named(out.tokens, 8)
    decision = _chosen(by)
    np.testing.assert_array_equal(np.asarray(decision.probs)[:5].argmax(axis=1), wanted)
    np.testing.assert_array_equal(decision.work.drawn[:5], out.lengths)


def test_the_label_named_first_is_read_in_any_spelling_and_other_where_none_is(model):
    words = {word: model.lm.tokenizer(word)["input_ids"][0] for word in ("colour", "thing", "the", OTHER)}
    rows = [["the", "thing", "colour"], ["colour", "thing", "the"], ["the", "the", "the"], [OTHER, "thing", "the"]]
    tokens = np.array([[words[word] for word in row] for row in rows])
    np.testing.assert_array_equal(model.by("generated").dispatcher.named(tokens, 8), [1, 0, 2, 2])
    labels = (Label("door lamp", ""), Label("door", ""), Label(OTHER, ""))
    reader = dispatchers.generated(model.lm, labels, model.dispatcher.first)
    door, lamp = (model.lm.tokenizer(word)["input_ids"][0] for word in ("door", "lamp"))
    np.testing.assert_array_equal(reader.named(np.array([[lamp, door, lamp], [lamp, door, door]]), 8), [0, 1])


def test_a_random_draw_depends_on_the_prompt_alone_and_takes_every_label_as_often(model):
    by = model.by("random", seed=1)
    questions = [f"{a} of {b} {c}" for a in THINGS for b in COLOURS for c in ("", "of the the")]
    drawn = by.choose(questions).probs.argmax(axis=1)
    np.testing.assert_array_equal(by.choose(questions[::-1]).probs.argmax(axis=1), drawn[::-1])
    counts = np.bincount(drawn, minlength=3)
    assert (np.abs(counts - 40) < 20).all()  # 120 draws of three labels: 20 is four deviations
    assert (model.by("random", seed=2).choose(questions).probs.argmax(axis=1) != drawn).any()


def test_the_oracle_is_right_and_wants_to_be_told(model):
    by = model.by("oracle")
    np.testing.assert_array_equal(np.asarray(_chosen(by).probs)[:5].argmax(axis=1), [0, 1, 2, 2, 2])
    with pytest.raises(UserError, match="the oracle needs the right label"):
        by.answer(QUESTIONS, 2)


def test_uniform_is_the_average_of_all_experts(model):
    alphas = np.asarray(_chosen(model.by("uniform")).alphas)
    np.testing.assert_allclose(alphas, [[0, 0.5, 0.5, *[0] * (SLOTS - 3)]] * 8)


def test_the_embeddings_classifier_tells_apart_questions_that_it_has_not_seen(model):
    by = model.by("embedding", examples=EXAMPLES[::2])
    questions, right = zip(*EXAMPLES[1::2], strict=True)
    named = [label for label, _ in by.named(by.choose(questions))]
    assert np.mean([ours == theirs for ours, theirs in zip(named, right, strict=True)]) > 0.9
    without = model.by("embedding", examples=[pair for pair in EXAMPLES if pair[1] != "thing"])
    assert not np.asarray(_chosen(without).probs)[:, 1].any()


def test_a_blend_takes_each_rows_dispatcher(model):
    members = tuple(model.by(name, examples=EXAMPLES).dispatcher for name in ("prompt", "embedding", "oracle"))
    own = [0, 1, 2, 1, 0, 0, 0, 0]
    blend = dispatchers.Blend(members, jax.nn.one_hot(np.array(own), 3))
    rows = model.rows(QUESTIONS, RIGHT)
    each = [adapt.choose(model.served, member, rows) for member in members]
    both = adapt.choose(model.served, blend, rows)
    wanted = [each[member].probs[row] for row, member in enumerate(own)]
    np.testing.assert_allclose(both.probs, wanted, atol=1e-6)
    np.testing.assert_allclose(both.work.read, each[0].work.read + each[1].work.read)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("guess", "no dispatcher 'guess'; there is prompt, classifier"),
        ("fixed:boat", "no expert carries the label 'boat'; there is colour, thing, other"),
        ("embedding", "needs examples"),
    ],
)
def test_a_dispatcher_that_cannot_be_is_one_line(name, words, model):
    with pytest.raises(UserError, match=words):
        model.by(name)


def test_a_dispatcher_without_its_expert_and_a_batch_without_rows_are_refused(model):
    with pytest.raises(UserError, match="needs a classification expert"):
        dataclasses.replace(model, classifier=None).by("classifier")
    for ask in (model.choose, lambda questions: model.answer(questions, 2)):
        with pytest.raises(UserError, match="no question to answer"):
            ask([])


def test_what_a_pass_took_is_counted_without_padding(model):
    stopwatch = Stopwatch()
    plain = model.answer(QUESTIONS, 4)
    found = model.measured(QUESTIONS, 4, stopwatch)
    assert [each.answer for each in found] == plain
    read = [len(model.lm.tokenizer(chat.render(model.lm, question))["input_ids"]) for question in QUESTIONS]
    assert [each.second.read for each in found] == read
    assert [each.second.drawn for each in found] == [answer.tokens for answer in plain]
    assert all(each.first.seconds > 0 and each.second.seconds > 0 for each in found)
    decision, alone = model.measured_choice(QUESTIONS, stopwatch)
    assert model.named(decision) == [(answer.label, answer.prob) for answer in plain]
    assert [cost._replace(seconds=0) for cost in alone] == [each.first._replace(seconds=0) for each in found]
    cfg, row = model.lm.model.cfg, found[0]
    # By hand: 32 wide, 48 in the mlp, of whose three matrices 32 components stand for each; 2 layers, 4 heads of 8.
    attention = 2 * 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32)
    mlp = 2 * 2 * 3 * 32 * (32 + 48)
    tokens = row.second.read + row.second.drawn - 1
    pairs = 4 * 2 * 4 * 8 * tokens * (tokens + 1) / 2
    logits = 2 * 32 * cfg.vocab_size * row.second.drawn
    assert row.second.flops == pytest.approx((attention + mlp) * tokens + pairs + logits)


def test_the_clock_stands_while_a_program_is_compiled(compilations):
    stopwatch = Stopwatch()
    double = jax.jit(lambda x: 2 * x)
    result, seconds = stopwatch(double, np.arange(3.0, dtype=np.float32))
    np.testing.assert_array_equal(result, [0, 2, 4])
    assert seconds > 0
    compilations.clear()
    stopwatch(double, np.ones(3, np.float32))
    assert compilations == []
    stopwatch(double, np.ones(4, np.float32))
    assert len(compilations) == 1
