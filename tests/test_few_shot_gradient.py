import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_few_shot import CFG, KEY, TASK, experts

import sva
from sva.adaptation import few_shot
from sva.adaptation.few_shot import FewShotConfig, Shots
from sva.adaptation.few_shot_gradient import GradientConfig, adapt, init, objective, scored_rows
from sva.utils.errors import UserError

RED = [{"thing": thing, "of": "kite", "answer": "red"} for thing in ("apple", "boat", "cloud", "door")]


@pytest.fixture(scope="module")
def setting(toy):
    return toy, few_shot.pool(toy, experts(sva.decompose(toy, "mlp", progress=False)), progress=False)


@pytest.mark.parametrize("per_matrix", [False, True])
def test_the_gradient_is_that_of_the_merged_models_log_likelihood(setting, per_matrix):
    lm, pool = setting
    start = pool.start(per_matrix=per_matrix)
    rows = scored_rows(lm, [[3, 9, 10, 4], [3, 11, 4]], [[5, 1], [6, 7, 1]])
    worth = jnp.asarray([1.0, 0.5])
    value, gradient = jax.value_and_grad(objective)(start, lm.model, lm.params, pool.bank, rows, worth)

    def merged(alphas):
        logps = jax.nn.log_softmax(few_shot.mixed(lm, pool, alphas).logits(rows.ids, rows.mask)[:, :-1])
        picked = np.take_along_axis(np.asarray(logps), rows.ids[:, 1:, None], 2)[..., 0] * rows.scored[:, 1:]
        return float((picked.sum(axis=1) * np.asarray(worth)).sum())

    assert float(value) == pytest.approx(merged(start), abs=1e-4)
    direction = np.random.default_rng(0).normal(size=start.shape).astype(np.float32)
    direction /= np.linalg.norm(direction)
    slope = (merged(start + 1e-2 * direction) - merged(start - 1e-2 * direction)) / 2e-2
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("kind", ["likelihood", "accuracy"])
def test_climbing_raises_what_is_climbed(setting, kind):
    lm, pool = setting
    cfg = GradientConfig(kind, lr=0.2, samples=32)
    shots = Shots(TASK, tuple(RED))
    steps = list(adapt(lm, pool, shots, cfg, CFG, KEY, state=init(jnp.zeros(3), cfg), generations=range(1, 13)))
    if kind == "likelihood":
        assert steps[-1].row["nats"] > steps[0].row["nats"] + 0.1
    else:
        warm = FewShotConfig(temperature=1.0)
        ends = jnp.stack([jnp.zeros(3), jnp.asarray(steps[-1].alphas)])
        right = [few_shot.score(lm, pool, ends, shots, warm, jax.random.key(i)).right.mean(axis=1) for i in range(60)]
        before, after = np.mean(right, axis=0)
        assert after > before + 0.1


def test_votes_are_the_answer_that_most_draws_give(setting):
    lm, pool = setting
    shots = Shots(TASK, tuple(RED))
    voted = few_shot.vote(lm, pool, shots, CFG, KEY, samples=4)
    assert len(voted.examples) == len(voted.answers) <= 4
    places = list(range(len(voted.examples)))
    assert voted.right(list(voted.answers), places).all()
    assert not voted.right(["lamp lamp" if text != "lamp" else "kite" for text in voted.answers], places).any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda lm, pool: GradientConfig("luck"), "objective='luck' is not known"),
        (lambda lm, pool: GradientConfig(lr=0), "lr=0 must be above 0"),
        (lambda lm, pool: GradientConfig(samples=1), "samples=1 must be at least 2"),
        (lambda lm, pool: few_shot.vote(lm, pool, Shots(TASK, tuple(RED)), CFG, KEY, samples=1), "votes=1 must be"),
        (lambda lm, pool: scored_rows(lm, [[3] * 250], [[4] * 20]), "context is 256"),
    ],
)
def test_bad_settings_are_one_line(setting, call, words):
    with pytest.raises(UserError, match=words) as caught:
        call(*setting)
    assert "\n" not in str(caught.value)


def test_keys_in_int8_which_pass_no_gradient_are_refused(setting):
    lm, pool = setting
    small = dataclasses.replace(lm, model=lm.model.clone(kv_dtype=jnp.int8))
    cfg = GradientConfig("likelihood", lr=0.2)
    shots = Shots(TASK, tuple(RED))
    with pytest.raises(UserError, match="keys and values in int8 pass no gradient"):
        next(iter(adapt(small, pool, shots, cfg, CFG, KEY, state=init(jnp.zeros(3), cfg), generations=range(1, 2))))
