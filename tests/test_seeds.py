import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sva.cli import main as cli
from sva.tasks.batches import batch_indices
from sva.training import config
from sva.utils import seeds
from sva.utils.errors import UserError

FAR = [2**32, 2**32 + 7, 2**33, 2**40 + 1, 2**63 - 1, 2**63, 2**64 - 1]
BAD = [-1, -(2**40), 2**64, 10**30]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_seeds_within_32_bits_make_jaxs_own_key(seed):
    np.testing.assert_array_equal(jax.random.key_data(seeds.key(seed)), jax.random.key_data(jax.random.key(seed)))


def test_every_seed_makes_a_key_of_its_own():
    every = [0, 1, 7, 2**31, 2**32 - 1, *FAR]
    keys = [seeds.key(seed) for seed in every]
    assert len({tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in keys}) == len(every)
    draws = [float(jax.random.normal(jax.random.fold_in(key, 3))) for key in keys]
    assert len(set(draws)) == len(every)
    assert {str(jax.random.normal(key).dtype) for key in keys} == {"float32"}
    assert seeds.key(np.int64(2**40)) == seeds.key(2**40)


@pytest.mark.parametrize("seed", [*BAD, True, 1.0, "3", None])
def test_what_is_no_seed_is_one_line(seed):
    with pytest.raises(UserError, match=r"^seed=.* is not a seed; give a whole number from 0 to 18446744073709551615"):
        seeds.key(seed)


@pytest.mark.parametrize("seed", FAR)
def test_a_run_with_a_seed_beyond_32_bits_sees_rows_in_an_order_of_its_own(seed):
    assert config.load(overrides=[f"seed={seed}"]).seed == seed
    orders = [batch_indices(50, 50, 0, each) for each in (seed, seed % 2**32)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert (orders[0] == orders[1]) == (seed < 2**32)


@pytest.mark.parametrize("seed", BAD)
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["generate", "Hi.", "--seed"], "--seed"),
        (["evaluate", "largest", "--seed"], "--seed"),
        (["adapt", "largest", "--expert", "e.safetensors", "--seed"], "--seed"),
        (["expert", "transfer", "e.safetensors", "--model", "m", "-o", "new.safetensors", "--shuffle"], "--shuffle"),
    ],
)
def test_every_command_refuses_a_seed_out_of_range_before_any_model(words, name, seed, capsys):
    *words, option = words
    assert cli.main([*words, f"{option}={seed}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sva: {name}={seed} is not a seed; ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("seed", BAD)
def test_a_training_seed_out_of_range_is_refused(seed):
    with pytest.raises(UserError, match=rf"seed={seed} is not a seed"):
        config.load(overrides=[f"seed={seed}"])


def test_a_rows_key_depends_on_its_number_alone():
    one, many = seeds.of_rows(seeds.key(3), [7]), seeds.of_rows(seeds.key(3), [2, 7])
    assert (jax.random.key_data(one[0]) == jax.random.key_data(many[1])).all()
    assert (jax.random.key_data(one[0]) == jax.random.key_data(jax.random.fold_in(jax.random.key(3), 7))).all()
