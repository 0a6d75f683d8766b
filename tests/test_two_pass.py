import dataclasses
from typing import NamedTuple

import chex
import jax
import numpy as np
import pytest
from margins import assert_same_tokens

import sva
from sva.adaptation import dispatchers, label_scoring, two_pass
from sva.adaptation.adaptive_lm import SLOTS, AdaptiveLM, adaptive
from sva.adaptation.experts import OTHER_LABEL, labels_and_slots
from sva.generation import chat
from sva.generation.sampling import Greedy, Temperature
from sva.generation.testing import toy_lm
from sva.models.rope import Rope
from sva.spectral.expert import Expert
from sva.spectral.mixing import DeltaSlots, FactoredSlots, mixture
from sva.tasks.labels import Label
from sva.utils.errors import UserError

QUESTIONS = ["what colour the apple ?", "name the thing of the green house", "blue ?", "what", "the of the of"]
NEW = 6


class Setting(NamedTuple):
    lm: sva.LM
    system: AdaptiveLM
    zs: list  # of slots 0, 1, 2


def _expert(spectra, seed, label):
    rng = np.random.default_rng(seed)
    raw = {name: rng.uniform(0.3, 1.7, len(x.s)).astype(np.float32) for name, x in spectra.items()}
    return Expert(raw, "linear", {"label": label, "description": f"a {label}"})


def _judge(spectra, names):
    """A classification expert that was trained to tell these labels apart."""
    judge = _expert(spectra, 9, "routing")
    return dataclasses.replace(
        judge, metadata={"labels": {name: f"a {name}" for name in names[:-1]} | {names[-1]: OTHER_LABEL.description}}
    )


@pytest.fixture(scope="module")
def setting(request, toy):
    lm = toy_lm(scan_layers=getattr(request, "param", False))
    spectra = sva.decompose(lm, "mlp", progress=False)
    experts = [_expert(spectra, 1, "colour"), _expert(spectra, 2, "thing")]
    return Setting(lm, adaptive(lm, experts, progress=False), [None, *(expert.z(spectra) for expert in experts)])


either = pytest.mark.parametrize("setting", [False, True], ids=["unrolled", "scanned"], indirect=True, scope="module")


def _encoded(lm):
    return chat.encode(lm, [chat.render(lm, question) for question in QUESTIONS])


def _answer(lm, system, alphas):
    """The second pass with these alphas [5, E_max], in plain shapes."""
    return two_pass.second_pass(system.serving, np.asarray(alphas, np.float32), _request(lm))


def _rows(system):
    """What the first pass reads, in plain shapes."""
    return jax.tree.map(lambda x: np.asarray(x)[: len(QUESTIONS)], system.rows(QUESTIONS))


def _request(lm):
    keys = jax.random.split(jax.random.key(0), len(QUESTIONS))
    prompts = two_pass.TokenBatch(*_encoded(lm))
    return two_pass.Request(prompts, np.int32(NEW), np.array([1], np.int32), keys, max_new_tokens=8, sampling=Greedy())


@either
def test_a_row_runs_on_its_own_expert_as_if_that_were_merged(setting):
    lm, system, zs = setting
    slots = [1, 0, 2, 2, 1]
    out = _answer(lm, system, np.eye(SLOTS)[slots] * (np.array(slots) > 0)[:, None])
    ids, mask = _encoded(lm)
    for row, slot in enumerate(slots):
        merged = lm if slot == 0 else sva.merge(lm, sva.decompose(lm, "mlp"), zs[slot])
        alone = merged.generate(ids[row : row + 1], mask[row : row + 1], NEW, [1])

        def logits(text, merged=merged):
            return np.asarray(merged.logits(text[None], np.ones_like(text[None])))[0, -1]

        ours = np.asarray(out.tokens[row : row + 1, :NEW])
        assert_same_tokens(ours, alone.tokens, ids[row : row + 1], mask[row : row + 1], logits)
        np.testing.assert_allclose(out.logprobs[row, 0], alone.logprobs[0, 0], atol=3e-4)
    bases = lm.generate(ids, mask, NEW, [1])
    assert (np.asarray(bases.tokens) != np.asarray(out.tokens)[:, :NEW]).any()


def test_a_row_of_a_mixture_runs_on_the_mixed_expert(setting):
    lm, system, zs = setting
    alphas = np.zeros((5, SLOTS))
    alphas[:, 1:3] = [[0.5, 0.5], [1, 1], [0, 0.3], [-0.5, 1], [0, 0]]
    alphas[:, 0] = 7  # the base's slot adds nothing
    out = _answer(lm, system, alphas)
    ids, mask = _encoded(lm)
    rows = [sva.mix(zs[1:], row[1:3]) for row in alphas]
    each = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    factored = lm.generate(ids, mask, NEW, [1], z=each)
    np.testing.assert_allclose(out.logprobs[:, 0], factored.logprobs[:, 0], atol=3e-4)


def test_both_passes_together_are_each_by_itself(setting):
    lm, system, _ = setting
    # A bias that splits the batch, so that more than one expert is at work.
    probs = np.log(system.choose(QUESTIONS).probs)
    bias = np.array(system.dispatcher.scoring.bias)
    bias[:3] += np.median(probs - probs[:, -1:], axis=0)
    scored = dispatchers.Scored(dataclasses.replace(system.dispatcher.scoring, bias=bias))
    rows = _rows(system)
    out = two_pass.two_pass(system.serving, scored, rows, _request(lm))
    first = two_pass.first_pass(system.serving, scored, rows)
    np.testing.assert_allclose(out.decision.probs, first.probs, atol=1e-5)
    chosen = np.asarray(first.probs).argmax(axis=1)
    assert len(set(chosen)) > 1
    slots = np.array([1, 2, 0])[chosen]
    np.testing.assert_array_equal(out.decision.alphas, np.eye(SLOTS)[slots] * (slots > 0)[:, None])
    second = _answer(lm, system, out.decision.alphas)
    np.testing.assert_array_equal(out.generation.tokens, second.tokens)


def test_a_soft_choice_answers_with_the_mixture_and_an_unsure_one_with_the_base(setting):
    lm, system, _ = setting
    for choice in (label_scoring.Soft(), label_scoring.Threshold(1.0)):
        serving = dataclasses.replace(system.serving, choice=choice)
        out = two_pass.two_pass(serving, system.dispatcher, _rows(system), _request(lm))
        probs = np.asarray(out.decision.probs)
        assert not probs[:, 3:].any()  # of places that no label has
        alphas = np.zeros((5, SLOTS))
        alphas[:, 1:3] = probs[:, :2] if isinstance(choice, label_scoring.Soft) else 0
        np.testing.assert_allclose(out.decision.alphas, alphas, atol=1e-6)
        np.testing.assert_array_equal(out.generation.tokens, _answer(lm, system, out.decision.alphas).tokens)


def test_answers_say_which_expert_and_how_sure(setting):
    _, system, _ = setting
    answers = system.answer(QUESTIONS, NEW)
    probs = system.choose(QUESTIONS).probs
    assert probs.shape == (5, 3)
    for answer, row in zip(answers, probs, strict=True):
        assert answer.label == ["colour", "thing", "other"][row.argmax()]
        assert answer.prob == pytest.approx(row.max(), abs=1e-5)
        assert 1 <= answer.tokens <= NEW
        assert len(answer.text.split()) <= answer.tokens


def test_a_row_that_the_base_answers_is_named_other_however_likely_an_expert_is(setting):
    _, system, _ = setting
    unsure = dataclasses.replace(
        system, serving=dataclasses.replace(system.serving, choice=label_scoring.Threshold(1.0))
    )
    decision = unsure.choose(QUESTIONS)
    assert [label for label, _ in unsure.named(decision)] == ["other"] * 5
    assert [prob for _, prob in unsure.named(decision)] == pytest.approx(decision.probs.max(axis=1))


def test_another_batch_prompt_expert_or_mixture_compiles_nothing(setting, compilations):
    lm, system, _ = setting
    settings = dict(sampling=Temperature(), key=jax.random.key(0))
    system.answer(QUESTIONS, NEW, **settings)
    other = adaptive(lm, [_expert(sva.decompose(lm, "mlp"), 3, "colour")], progress=False)
    one_less = dataclasses.replace(system, serving=other.serving)
    compilations.clear()
    system.answer(["name a thing"] * 8, 7, **settings)
    system.answer(QUESTIONS[::-1] + ["grass"], 8, **(settings | {"key": jax.random.key(1)}))
    one_less.answer(QUESTIONS, NEW, **settings)
    assert compilations == []


def test_questions_are_packed_for_dispatchers_that_read_them(setting):
    _, system, _ = setting
    batch = ["what colour ?"] * 32
    packed = {name: system.by(name).rows(batch).questions.token_indices for name in ("prompt", "random", "uniform")}
    assert packed["prompt"] is not None
    assert packed["random"] is packed["uniform"] is None


def test_a_classification_expert_runs_the_first_pass_and_only_that(setting):
    lm, _, zs = setting
    spectra = sva.decompose(lm, "mlp")
    experts = [_expert(spectra, 1, "colour"), _expert(spectra, 2, "thing")]
    judge = _judge(spectra, ["colour", "thing", "other"])
    system = adaptive(lm, experts, classifier=judge, calibrate=False, progress=False)
    merged = sva.merge(lm, spectra, judge.z(spectra))
    alone = adaptive(merged, experts, calibrate=False, progress=False)
    np.testing.assert_allclose(system.choose(QUESTIONS).probs, alone.choose(QUESTIONS).probs, atol=1e-3)
    base = adaptive(lm, experts, calibrate=False, progress=False)
    assert np.abs(system.choose(QUESTIONS).probs - base.choose(QUESTIONS).probs).max() > 0.01
    # The expert in use at the answer is the label's, not the judge.
    label = system.answer(QUESTIONS[:1], NEW)[0]
    slot = {"colour": 1, "thing": 2, "other": 0}[label.label]
    model = lm if slot == 0 else sva.merge(lm, spectra, zs[slot])
    ids, mask = (x[:1] for x in _encoded(lm))
    plain = model.generate(ids, mask, NEW, [1])
    assert chat.decode(lm, plain.tokens, plain.lengths) == [label.text]


def test_labels_stand_in_the_order_that_the_classifier_learnt_and_the_base_is_asked_in_the_experts(toy):
    spectra = sva.decompose(toy, "mlp", progress=False)
    experts = [_expert(spectra, 1, "colour"), _expert(spectra, 2, "thing")]
    labels, slots = labels_and_slots(experts, _judge(spectra, ["thing", "colour", "other"]))
    assert [label.name for label in labels] == ["thing", "colour", "other"]
    assert slots == [2, 1, 0]
    base, judged = (
        adaptive(toy, experts, classifier=judge, progress=False)
        for judge in (None, _judge(spectra, ["thing", "colour", "other"]))
    )
    assert [label.name for label in judged.labels] == ["thing", "colour", "other"]
    asked = judged.by("prompt")  # the base is asked as the experts themselves have it
    np.testing.assert_array_equal(asked.choose(QUESTIONS).probs, base.choose(QUESTIONS).probs)
    np.testing.assert_array_equal(asked.choose(QUESTIONS).alphas, base.choose(QUESTIONS).alphas)
    with pytest.raises(UserError, match="tells apart thing, other; these experts need colour, thing, other"):
        labels_and_slots(experts, _judge(spectra, ["thing", "other"]))
    with pytest.raises(UserError, match="tells apart nothing"):
        labels_and_slots(experts, _expert(spectra, 3, "colour"))


def test_experts_that_cannot_be_served_together_are_refused(toy):
    spectra = sva.decompose(toy, "mlp", progress=False)
    good = _expert(spectra, 1, "colour")
    for experts, words in (
        ([], "at least one expert"),
        ([good, _expert(spectra, 2, "colour")], "two experts carry the label 'colour'"),
        ([Expert(good.raw, "linear", {})], "carries no label"),
        ([_expert(spectra, 2, OTHER_LABEL.name)], "'other'"),
    ):
        with pytest.raises(UserError, match=words):
            adaptive(toy, experts, progress=False)
    system = adaptive(toy, [good], progress=False)
    with pytest.raises(UserError, match=r"alphas have shape \[5, 3\]; these prompts and this bank need \[5, 8\]"):
        _answer(toy, system, np.zeros((5, 3)))
    for questions, words in (([" "], "prompt is empty"), (["red " * 300], "context is 256")):
        with pytest.raises(UserError, match=words):
            system.answer(questions, NEW)
    with pytest.raises(UserError, match=r"'red red.* too long for the first pass: .* the model's context is 256"):
        system.choose(["blue", "red " * 300])
    with pytest.raises(UserError, match="needs a key"):
        system.answer(QUESTIONS, NEW, sampling=Temperature())


def test_a_first_pass_ends_where_a_rope_turns_all_positions_anew(toy):
    rope = Rope(1e4, "longrope", original_max_position_embeddings=16, factors=(1.0,), long_factors=(2.0,))
    short = dataclasses.replace(toy, model=toy.model.clone(cfg=dataclasses.replace(toy.model.cfg, rope=rope)))
    form = label_scoring.template(toy, [Label("colour", "a colour"), OTHER_LABEL])
    label_scoring.check_fits(toy, form, ["red"], 8)
    with pytest.raises(UserError, match="answers end at 16 tokens, where this model turns all positions"):
        label_scoring.check_fits(short, form, ["red"], 8)


@pytest.fixture(scope="module")
def eight(setting):
    return _many(setting.lm, 8)


def _many(lm, count):
    spectra = sva.decompose(lm, "mlp", progress=False)
    experts = [_expert(spectra, i, f"kind{i}") for i in range(count)]
    return adaptive(lm, experts, calibrate=False, progress=False)


def test_more_experts_than_slots_make_a_larger_bank(eight):
    assert eight.serving.num_slots == 2 * SLOTS
    assert {x.z.shape[-2] for x in _banks(eight)} == {2 * SLOTS}


def test_each_of_eight_experts_answers_its_row_as_it_answers_the_whole_batch(setting, eight):
    lm = setting.lm
    for slots in ([1, 2, 3, 4, 5], [6, 7, 8, 0, 1]):
        mixed = _answer(lm, eight, np.eye(2 * SLOTS)[slots])
        for row, slot in enumerate(slots):
            alone = _answer(lm, eight, np.eye(2 * SLOTS)[[slot] * 5])
            np.testing.assert_array_equal(mixed.tokens[row], alone.tokens[row])
            np.testing.assert_array_equal(mixed.logprobs[row], alone.logprobs[row])
    assert len({tuple(row) for row in np.asarray(mixed.logprobs)}) == 5


def test_each_of_eight_experts_answers_as_the_merged_model_does(setting, eight):
    lm, spectra = setting.lm, sva.decompose(setting.lm, "mlp")
    ids, mask = _encoded(lm)
    for slots in ([1, 2, 3, 4, 5], [6, 7, 8, 1, 2]):
        mixed = _answer(lm, eight, np.eye(2 * SLOTS)[slots])
        for row, slot in enumerate(slots):
            merged = sva.merge(lm, spectra, _expert(spectra, slot - 1, "").z(spectra))

            def logits(text, merged=merged):
                return np.asarray(merged.logits(text[None], np.ones_like(text[None])))[0, -1]

            alone = merged.generate(ids[row : row + 1], mask[row : row + 1], NEW, [1]).tokens
            ours = np.asarray(mixed.tokens[row : row + 1, :NEW])
            assert_same_tokens(ours, alone, ids[row : row + 1], mask[row : row + 1], logits)


def test_a_ninth_expert_compiles_nothing_and_leaves_the_other_rows_alone(setting, eight, compilations):
    lm, nine = setting.lm, _many(setting.lm, 9)
    alphas = np.eye(2 * SLOTS)[[1, 8, 3, 0, 5]]
    before = _answer(lm, eight, alphas)
    eight.answer(QUESTIONS, NEW)
    compilations.clear()
    assert len(nine.answer(QUESTIONS, NEW)) == 5  # both passes
    after = _answer(lm, nine, alphas)
    ninth = _answer(lm, nine, np.eye(2 * SLOTS)[[1, 9, 3, 0, 5]])
    assert compilations == []
    for x, y, z in zip(before, after, ninth, strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(np.delete(np.asarray(x), 1, axis=0), np.delete(np.asarray(z), 1, axis=0))
    assert (np.asarray(ninth.logprobs[1]) != np.asarray(after.logprobs[1])).any()


@pytest.mark.parametrize("setting", [True], ids=["scanned"], indirect=True, scope="module")
def test_a_ninth_expert_on_scanned_layers_is_a_value_of_the_same_program(setting):
    eight, nine = _many(setting.lm, 8), _many(setting.lm, 9)
    chex.assert_trees_all_equal_shapes_and_dtypes(eight.serving, nine.serving)
    held = np.asarray(_banks(nine)[0].z)[..., 9, :]  # slot 0 is the base
    assert (held != np.asarray(_banks(eight)[0].z)[..., 9, :]).any()


def _banks(system):
    return jax.tree.leaves(system.serving.bank, is_leaf=lambda x: isinstance(x, FactoredSlots | DeltaSlots))


def _near(expert, others, rng):
    """An expert that moves `others` components a matrix by a tenth or more, and all of them by a ten-thousandth."""
    raw = {}
    for name, z in expert.items():
        moved = 1 + 1e-4 * rng.standard_normal(len(z))
        moved[rng.permutation(len(z) // 2)[:others]] = rng.uniform(1.5, 2, others)
        raw[name] = moved.astype(np.float32)
    return raw


def _few(spectra, seed, label, others=4):
    raw = _near({name: x.s for name, x in spectra.items()}, others, np.random.default_rng(seed))
    return Expert(raw, "linear", {"label": label, "description": f"a {label}"})


def test_the_form_follows_the_tolerance_and_the_answers_its_bound(setting, capsys):
    lm = setting.lm
    spectra = sva.decompose(lm, "mlp")
    experts = [_few(spectra, 1, "colour"), _few(spectra, 2, "thing")]
    exact = adaptive(lm, experts, calibrate=False)
    assert "6 of 6 matrices factored" in capsys.readouterr().err
    near = adaptive(lm, experts, calibrate=False, tolerance=1e-2)
    told = capsys.readouterr().err
    assert "0 of 6 matrices factored; 6 dense + delta, k 8" in told
    assert told.count("\n") == 1
    assert {plan.form for plan in exact.plans.values()} == {"factored"}
    assert {plan.form for plan in near.plans.values()} == {"delta"}
    assert all(plan.losses.max() <= 1e-2 * plan.s_max for plan in near.plans.values())
    assert sum(plan.extra_bytes for plan in near.plans.values()) < sum(p.extra_bytes for p in exact.plans.values())
    alphas = np.zeros((5, SLOTS), np.float32)
    alphas[1:, 1:3] = [[1, 0], [0, 1], [0.5, 0.5], [-1, 2]]
    np.testing.assert_allclose(
        _answer(lm, near, alphas).logprobs[:, 0], _answer(lm, exact, alphas).logprobs[:, 0], atol=2e-3
    )
    # With a tolerance of 0 on the components that move, delta is exact.
    whole = adaptive(lm, experts, calibrate=False, exact_base=True, progress=False)
    assert {(plan.form, len(plan.components)) for plan in whole.plans.values()} == {("delta", 32)}
    np.testing.assert_allclose(
        _answer(lm, whole, alphas).logprobs[:, 0], _answer(lm, exact, alphas).logprobs[:, 0], atol=1e-4
    )


@either
def test_base_rows_among_experts_are_the_base_bit_for_bit_and_factored_nearly(setting):
    lm = setting.lm
    spectra = sva.decompose(lm, "mlp")
    whole = adaptive(lm, [_expert(spectra, 1, "colour")], calibrate=False, exact_base=True, progress=False)
    ids, mask = _encoded(lm)
    alphas = np.zeros((5, SLOTS), np.float32)
    alphas[[1, 3], 1] = 1
    adapted = sva.logits(lm.model, lm.params, ids, mask, mixture(whole.serving.bank, alphas))
    base = lm.logits(ids, mask)
    np.testing.assert_array_equal(adapted[::2], base[::2])
    factored = adaptive(lm, [_expert(spectra, 1, "colour")], calibrate=False, progress=False)
    assert {plan.form for plan in factored.plans.values()} == {"factored"}
    near = sva.logits(lm.model, lm.params, ids, mask, mixture(factored.serving.bank, alphas))
    shown = np.asarray(mask, bool)[::2]
    np.testing.assert_allclose(np.asarray(near)[::2][shown], np.asarray(base)[::2][shown], atol=1e-4)
    assert np.abs(np.asarray(adapted - base))[1::2].max() > 0.1


def test_another_expert_that_needs_as_many_components_compiles_nothing(setting, compilations):
    lm = setting.lm
    spectra = sva.decompose(lm, "mlp")

    def built(seed, others):
        expert = _few(spectra, seed, "colour", others)
        return adaptive(lm, [expert], calibrate=False, tolerance=1e-2, progress=False)

    first = built(1, 5).answer(QUESTIONS, NEW)
    compilations.clear()
    second = built(2, 7).answer(QUESTIONS, NEW)
    assert compilations == []
    assert len(first) == len(second)


@pytest.mark.parametrize("tolerance", [-1e-3, float("nan"), float("inf")])
def test_a_tolerance_that_nothing_meets_is_refused(toy, tolerance):
    expert = _expert(sva.decompose(toy, "mlp", progress=False), 1, "colour")
    with pytest.raises(UserError, match=f"tolerance={tolerance} is met by no number of components"):
        adaptive(toy, [expert], tolerance=tolerance, progress=False)
