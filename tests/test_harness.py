"""What an evaluation harness asks (`sva.serving.harness`, `sva.serving.lm_eval`)."""

import jax.numpy as jnp
import numpy as np
import pytest

import sva
from sva.adaptation.adaptive_lm import adaptive
from sva.cli import main
from sva.evaluation.likelihood import token_scores
from sva.generation import chat
from sva.generation.frozen import merge_expert
from sva.generation.sampling import Greedy
from sva.serving.harness import Budget, Fixed, TwoPasses
from sva.spectral.expert import Expert
from sva.utils.errors import UserError

TEXTS = ["what colour the apple ?", "", "name the thing of the green house", "blue ?"]
TAILS = ["red green", "blue", "the of what"]
BUDGET = Budget(4, (), Greedy(), 0, 2)


@pytest.fixture(scope="module")
def experts(toy):
    spectra = sva.decompose(toy, "mlp", progress=False)
    rng = np.random.default_rng(0)

    def expert(label):
        raw = {name: rng.uniform(0.3, 1.7, len(x.s)).astype(np.float32) for name, x in spectra.items()}
        about = {"label": label, "description": f"a {label}", "fingerprint": toy.fingerprint, "base": toy.name}
        return Expert(raw, "linear", about)

    return [expert("colour"), expert("thing")]


@pytest.fixture(scope="module")
def asked(toy):
    heads = chat.tokenize(toy, [text or "the" for text in TEXTS])
    return heads, [chat.tokenize(toy, TAILS, follows=True)] * len(TEXTS)


def test_a_continuation_is_greedy_where_no_token_is_likelier(toy, asked):
    heads, tails = asked
    for head, each, found in zip(heads, tails, token_scores(toy, heads, tails), strict=True):
        for tail, score in zip(each, found, strict=True):
            ids = jnp.asarray([[*head, *tail]])
            logits = np.asarray(toy.logits(ids, jnp.ones_like(ids)))[0, len(head) - 1 : -1]
            assert score.is_greedy == (logits.argmax(axis=1).tolist() == tail)
    head = heads[0]
    for _ in range(3):  # the one that greedy decoding draws
        ids = jnp.asarray([head])
        head = [*head, int(np.asarray(toy.logits(ids, jnp.ones_like(ids)))[0, -1].argmax())]
    drawn = head[len(heads[0]) :]
    ((score, other),) = token_scores(toy, heads[:1], [[drawn, [*drawn[:-1], (drawn[-1] + 1) % 32]]])
    assert score.is_greedy
    assert not other.is_greedy


def test_a_continuation_of_the_whole_context_is_scored_and_a_longer_one_refused(toy):
    context = toy.model.cfg.max_position_embeddings
    token_scores(toy, [[5] * context], [[[6]]])  # the last token is not read
    with pytest.raises(UserError, match=rf"prompt 0 .* {context + 1} tokens to read, and the model's context"):
        token_scores(toy, [[5] * context], [[[6, 7]]])


def test_two_passes_score_and_complete_as_the_chosen_expert_does(toy, experts, asked):
    heads, tails = asked
    model = adaptive(toy, experts, progress=False)
    slots = [1, 0, 2, 1]  # the base for the empty text
    two = TwoPasses(model, dict(enumerate(experts, 1)))
    alphas = np.eye(model.serving.num_slots, dtype=np.float32)[slots]
    alphas[1] = 0
    chosen = two.alphas(TEXTS)
    assert not chosen[1].any()
    assert (chosen.sum(axis=1) <= 1).all()

    class Told(TwoPasses):
        def alphas(self, texts):
            return alphas

    told = Told(model, two.experts)
    scores, texts = told.scores(TEXTS, heads, tails), told.completions(TEXTS, heads, BUDGET)
    for place, slot in enumerate(slots):
        lm = merge_expert(toy, experts[slot - 1], progress=False) if slot else toy
        (alone,) = Fixed(lm).scores(TEXTS[:1], heads[place : place + 1], tails[place : place + 1])
        np.testing.assert_allclose([s.nats for s in scores[place]], [s.nats for s in alone], atol=3e-4)
        assert Fixed(lm).completions(TEXTS[:1], heads[place : place + 1], BUDGET) == [texts[place]]


def test_the_first_pass_reads_the_end_of_a_context_that_is_too_long(toy, experts):
    two = TwoPasses(adaptive(toy, experts, progress=False), {})
    words = "name the thing of the green house " * 60
    (end,) = two.model.ends_that_fit([words])
    assert words.endswith(end)
    assert len(words.split()) > len(end.split()) > 100
    np.testing.assert_array_equal(two.alphas([words, "blue ?"]), two.alphas([end, "blue ?"]))
    with pytest.raises(UserError, match="too long for the first pass"):
        two.model.choose([f"the {end}"])  # nor is more of it left out than must be


def test_without_the_harness_the_command_says_how_to_install_it(capsys):
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError:
        assert main.main(["lm-eval", "--model", "sva", "--tasks", "arc_easy"]) == 2
        assert "pip install 'sva[bench]'" in capsys.readouterr().err


def test_the_command_shows_its_own_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["lm-eval", "--help"])
    assert stop.value.code == 0
    assert "adaptive=true" in capsys.readouterr().out


@pytest.fixture(scope="module")
def harness(toy, experts, tmp_path_factory):
    """The model behind the harness's own interface, where the harness is installed."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is in the extra bench")
    from sva.serving import lm_eval as module

    directory = tmp_path_factory.mktemp("harness")
    toy.save(directory / "model")
    experts[0].save(directory / "e.safetensors")
    return lambda **settings: module.SvaLM(str(directory / "model"), **settings), directory


def _requests(kind, pairs):
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    return [Instance(kind, {}, pair, place) for place, pair in enumerate(pairs)]


def test_the_harness_gets_scores_of_windows_and_pairs_and_texts_up_to_a_stop(harness, toy):
    make, directory = harness
    model = make()
    pairs = [(text, " " + tail) for text in TEXTS for tail in TAILS]
    found = model.loglikelihood(_requests("loglikelihood", pairs), disable_tqdm=True)
    heads, tails = zip(*(model._encode_pair(*pair) for pair in pairs if pair[0]), strict=True)
    direct = token_scores(toy, heads, [[tail] for tail in tails])
    np.testing.assert_allclose(
        [nats for (nats, _), pair in zip(found, pairs, strict=True) if pair[0]],
        [score.nats for (score,) in direct],
        atol=3e-4,
    )
    long = " ".join(["red blue green"] * toy.model.cfg.max_position_embeddings)
    (rolled,) = model.loglikelihood_rolling(_requests("loglikelihood_rolling", [(long,)]))
    assert np.isfinite(rolled)
    assert rolled < 0
    stop = toy.tokenizer.decode([7])
    asked = [(TEXTS[0], {"until": [stop], "max_gen_toks": 6}), (TEXTS[2], {"until": [], "max_gen_toks": 3})]
    texts = model.generate_until(_requests("generate_until", asked))
    assert stop not in texts[0]
    assert len(texts) == 2
    with pytest.raises(UserError, match="gen_kwargs has typical_p=0.5"):
        model.generate_until(_requests("generate_until", [(TEXTS[0], {"typical_p": 0.5, "max_gen_toks": 3})]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adaptive": True}, "name them with expert=A"),
        ({"expert": "{e}+{e}"}, "several experts need adaptive=true"),
        ({"alphas": "a.json"}, "alphas is a mixture of experts"),
        ({"adaptive": "soft", "expert": "{e}"}, "adaptive=soft is not offered"),
        ({"peft": "x"}, "has no argument 'peft'"),
    ],
)
def test_settings_of_the_harness_that_do_not_go_together_are_one_line(harness, settings, message):
    make, directory = harness
    settings = {k: v.format(e=directory / "e.safetensors") if k == "expert" else v for k, v in settings.items()}
    with pytest.raises(UserError, match=message):
        make(**settings)
