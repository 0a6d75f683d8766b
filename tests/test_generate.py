import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch

from sva import generate as generation
from sva.errors import UserError
from sva.lm import LM, decompose, load
from sva.sampling import Greedy, Temperature, TopP


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[torch.nn.Module, LM]:
    directory = tmp_path_factory.mktemp("tiny")
    return tiny.make("qwen3", directory), load(str(directory), progress=False)


def _prompts(lm, rows=3, width=9):
    ids = np.random.default_rng(0).integers(0, lm.model.cfg.vocab_size, (rows, width))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def test_greedy_tokens_equal_transformers_by_the_margin_rule(pair):
    torch_model, lm = pair
    ids, mask = _prompts(lm)
    ours = lm.generate(ids, mask, 10)
    settings = dict(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs = torch_model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **settings).numpy()[:, 9:]
    for row in range(3):
        differing = np.flatnonzero(np.asarray(ours.tokens[row]) != theirs[row])
        if differing.size:
            full = np.concatenate([ids[row][mask[row] > 0], theirs[row][: differing[0]]])[None]
            top = np.sort(np.asarray(lm.logits(full, np.ones_like(full)))[0, -1])[-2:]
            assert top[1] - top[0] < 1e-3


def test_logprobs_equal_a_teacher_forced_pass_and_rows_end_at_the_end_token(pair):
    _, lm = pair
    ids, mask = _prompts(lm)
    free = lm.generate(ids, mask, 6)
    end = int(free.tokens[0, 2])
    out = lm.generate(ids, mask, 6, eos_ids=[end])
    stop = int(np.flatnonzero(np.asarray(free.tokens[0]) == end)[0]) + 1
    assert int(out.lengths[0]) == stop
    assert not np.asarray(out.tokens[0, stop:]).any()
    full = np.concatenate([ids[:1], np.asarray(out.tokens[:1, :stop])], axis=1)
    logps = jax.nn.log_softmax(lm.logits(full, np.ones_like(full)), axis=-1)[0, 8:-1]
    expected = np.take_along_axis(np.asarray(logps), full[0, 9:, None], axis=1)[:, 0]
    np.testing.assert_allclose(out.logprobs[0, :stop], expected, atol=1e-4)


def test_a_row_depends_on_neither_its_neighbours_nor_its_slot(pair):
    _, lm = pair
    ids, mask = _prompts(lm, rows=4)
    keys = jax.random.split(jax.random.key(1), 4)
    one = lm.generate(ids, mask, 8, sampling=Temperature(), key=keys)
    order = np.array([2, 0, 3, 1])
    other = lm.generate(ids[order], mask[order], 8, sampling=Temperature(), key=keys[order])
    np.testing.assert_array_equal(np.asarray(one.tokens)[order], other.tokens)
    np.testing.assert_array_equal(np.asarray(one.logprobs)[order], other.logprobs)


def test_another_batch_prompt_or_expert_of_the_same_bucket_compiles_nothing(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path))
    _, lm = pair
    spectra = decompose(lm, "mlp", progress=False)
    z = {name: jnp.ones((3, len(spectrum.s))) for name, spectrum in spectra.items()}
    ids, mask = _prompts(lm)
    base = lm.generate(ids, mask, 5)
    same = lm.generate(ids, mask, 5, z=z)
    np.testing.assert_array_equal(base.tokens, same.tokens)
    size = generation.generate._cache_size()
    lm.generate(ids[:, 2:], mask[:, 2:], 7)
    lm.generate(ids, mask, 5, z={name: 1.1 * x for name, x in z.items()})
    assert generation.generate._cache_size() == size


def test_unit_z_is_the_identity_and_a_merged_model_equals_the_factored_one(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path))
    from sva.lm import merge

    _, lm = pair
    spectra = decompose(lm, "all", progress=False)
    ids, mask = _prompts(lm)
    keep = mask > 0
    base = np.asarray(lm.logits(ids, mask))[keep]
    ones = {name: np.ones(len(spectrum.s), np.float32) for name, spectrum in spectra.items()}
    assert np.abs(np.asarray(lm.logits(ids, mask, ones))[keep] - base).max() < 1e-5 * np.abs(base).max()
    z = {name: np.linspace(0.8, 1.2, len(x)).astype(np.float32) for name, x in ones.items()}
    merged = np.asarray(merge(lm, spectra, z).logits(ids, mask))[keep]
    assert np.abs(merged - np.asarray(lm.logits(ids, mask, z))[keep]).max() < 1e-4 * np.abs(merged).max()
    assert np.abs(merged - base).max() > 1e-2


def test_samples_follow_softmax():
    logits = jnp.asarray([2.0, 1.0, 0.0, -1.0])
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = Temperature(1.0)(jnp.tile(logits, (4000, 1)), keys)
    counts, expected = np.bincount(np.asarray(drawn), minlength=4), 4000 * np.asarray(jax.nn.softmax(logits))
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-squared, 3 degrees, p = 0.001


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 500)
    assert set(np.asarray(TopP(0.75)(jnp.tile(logits, (500, 1)), keys)).tolist()) == {0, 1}


def test_bad_requests_are_one_clear_line(pair):
    _, lm = pair
    ids, mask = _prompts(lm)
    empty = mask.copy()
    empty[2] = 0
    with pytest.raises(UserError, match="prompt 2 is empty"):
        lm.generate(ids, empty, 4)
    with pytest.raises(UserError, match="context is"):
        lm.generate(ids, mask, lm.model.cfg.max_position_embeddings)
    with pytest.raises(UserError, match="needs a key"):
        lm.generate(ids, mask, 4, sampling=Temperature())
    for bad in (lambda: TopP(0), lambda: Temperature(0), lambda: lm.generate(ids + 10**6, mask, 4)):
        with pytest.raises(UserError):
            bad()
    assert Greedy() == Greedy()
