import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sva.evaluation import likelihood
from sva.generation.complete import complete
from sva.generation.decode import PromptBatch
from sva.generation.finite import cause, check_finite
from sva.generation.population_batch import Members, answers
from sva.generation.sampling import Greedy
from sva.utils.errors import UserError

CAUSE = r"model\.norm\.weight of toy-0 holds NaN or infinite values; fetch the checkpoint again"


@pytest.fixture(scope="module")
def broken(toy):
    """The toy model with NaN in its last norm."""
    return dataclasses.replace(toy, params={**toy.params, "norm": {"weight": jnp.full(32, jnp.nan)}})


@pytest.mark.parametrize(
    "ask",
    [
        lambda lm: lm.generate([[5, 6]], [[1, 1]], 2),
        lambda lm: list(complete(lm, [[5, 6]], 2)),
        lambda lm: likelihood.option_logprobs(lm, ["red"], [[" green"]]),
    ],
)
def test_log_probabilities_that_are_not_finite_are_an_error_that_names_the_weight(ask, broken):
    with pytest.raises(UserError, match=f"0: the model gives nan: {CAUSE}") as caught:
        ask(broken)
    assert "\n" not in str(caught.value)


def test_finite_weights_leave_the_activations_as_the_cause(toy):
    check_finite(toy, np.zeros((2, 3)), "prompt")
    with pytest.raises(UserError, match=r"^prompt 6: the model gives -inf: every weight of toy-0 is finite, so activa"):
        check_finite(toy, np.array([[0, 1], [2, -np.inf]]), "prompt", first=5)
    huge = {name: jnp.full_like(weight, 3e38) for name, weight in toy.params["norm"].items()}
    lm = dataclasses.replace(toy, params={**toy.params, "norm": huge})
    assert "activations overflow" in cause(lm)


def test_one_member_that_overflows_is_a_bad_member_and_all_are_an_error(toy, monkeypatch):
    def batch(lm, members, prompts, eos_ids, sampling):
        logprobs = np.asarray(members.values, np.float32).repeat(2)[:, None]
        return np.ones((len(logprobs), 1), np.int32), logprobs, np.ones(len(logprobs), np.int32)

    monkeypatch.setattr("sva.generation.population_batch._batch", batch)
    prompts = PromptBatch(np.ones((2, 1)), np.ones((2, 1)), jax.random.split(jax.random.key(0)), np.int32(1))
    some, none = (Members(None, None, np.array(values)) for values in ([np.nan, -1.0], [np.nan, np.inf]))
    assert np.isfinite(answers(toy, some, prompts, sampling=Greedy(), rows=8).logprobs).all(axis=1).tolist() == [
        False,
        False,
        True,
        True,
    ]
    with pytest.raises(UserError, match="answer 0: the model gives nan"):
        answers(toy, none, prompts, sampling=Greedy(), rows=8)
