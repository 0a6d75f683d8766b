import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from margins import assert_same_tokens

import sva
from sva.generation import decode as generation
from sva.generation.decode import PromptBatch
from sva.generation.sampling import Greedy, OnPolicy, Temperature


def _prompts(vocab, rows=4, width=9):
    ids = np.random.default_rng(0).integers(0, vocab, (rows, width))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    mask[-1, :8] = 0
    return ids, mask


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_greedy_tokens_and_ends_equal_transformers(kind, tmp_path):
    torch_model = tiny.make(kind, tmp_path)
    lm = sva.load(str(tmp_path), scan_layers=kind in ("llama", "qwen2"), progress=False)
    ids, mask = _prompts(tiny.VOCAB)
    settings = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)

    def theirs(**changes):
        out = torch_model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **settings, **changes)
        return np.pad(out[:, 9:].numpy(), [(0, 0), (0, 20 - (out.shape[1] - 9))])

    def logits(text):
        return tiny.logits(torch_model, text[None], np.ones_like(text[None]))[0, -1]

    free = theirs(eos_token_id=None)
    assert_same_tokens(lm.generate(ids, mask, 20).tokens, free, ids, mask, logits)
    ends = [int(free[0, 3]), int(free[1, 5]), 77]
    ours = lm.generate(ids, mask, 20, eos_ids=ends)
    assert_same_tokens(ours.tokens, theirs(eos_token_id=ends), ids, mask, logits)
    assert (np.asarray(ours.lengths)[:2] <= [4, 6]).all()


def _kept_in(lm, dtype):
    """The model whose keys and values are kept in this dtype."""
    return dataclasses.replace(lm, model=lm.model.clone(kv_dtype=dtype))


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 1 / 2), ("int8", 1 / 4 + 1 / 8)])
def test_keys_and_values_may_be_kept_in_less_memory(toy, tmp_path, dtype, share):
    ids, mask = _prompts(32)
    toy.save(tmp_path / "toy")
    small = sva.load(str(tmp_path / "toy"), kv_dtype=dtype, progress=False)
    assert small.model == toy.model.clone(kv_dtype=jnp.dtype(dtype).type)
    parts = [
        jax.eval_shape(partial(generation.read, m.model, {"params": m.params}), ids, mask)[1] for m in (toy, small)
    ]
    whole, less = (sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(part.kv)) for part in parts)
    assert less == whole * share
    difference = np.abs(np.asarray(small.logits(ids, mask)) - np.asarray(toy.logits(ids, mask)))[mask > 0]
    assert 1e-5 < difference.max() < 1e-1


def test_an_unknown_dtype_of_keys_and_values_is_refused(toy, tmp_path):
    toy.save(tmp_path / "toy")
    with pytest.raises(sva.UserError, match="kv_dtype='int4' is not supported; use one of float32, bfloat16, int8"):
        sva.load(str(tmp_path / "toy"), kv_dtype="int4")


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Greedy(), None),
        (Temperature(0.7), None),
        (OnPolicy(0.7), None),
        (Greedy(), "bfloat16"),
        (Greedy(), "int8"),
    ],
)
def test_logprobs_are_those_of_a_teacher_forced_pass(sampling, kept, toy):
    toy = _kept_in(toy, jnp.dtype(kept).type) if kept else toy
    ids, mask = _prompts(32)
    end = 9
    out = toy.generate(ids, mask, 12, eos_ids=[end], sampling=sampling, key=jax.random.key(2))
    tokens, logprobs, lengths = map(np.asarray, out)
    full, valid = np.concatenate([ids, tokens], axis=1), np.concatenate([mask, np.ones_like(tokens)], axis=1)
    heat = sampling.temperature if isinstance(sampling, OnPolicy) else 1.0  # every other strategy's: the model's own
    logps = np.asarray(jax.nn.log_softmax(toy.logits(full, valid) / heat, axis=-1))[:, 8:-1]
    expected = np.take_along_axis(logps, tokens[:, :, None], axis=2)[:, :, 0]
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(logprobs[row, :length], expected[row, :length], atol=1e-4)
        assert end not in tokens[row, : length - 1]
        assert length == 12 or tokens[row, length - 1] == end
        assert not tokens[row, length:].any()
        assert not logprobs[row, length:].any()


def test_some_rows_end_early_and_others_at_the_limit(toy):
    ids, mask = _prompts(32)
    free = np.asarray(toy.generate(ids, mask, 12).tokens)
    end = int(free[0, 2])
    out = toy.generate(ids, mask, 12, eos_ids=[end])
    first = [int(np.argmax(row == end)) + 1 if end in row else 12 for row in free]
    np.testing.assert_array_equal(out.lengths, first)
    assert min(first) < 12


def test_a_row_depends_on_neither_its_neighbours_nor_its_slot(toy):
    ids, mask = _prompts(32)
    keys = jax.random.split(jax.random.key(1), 4)
    one = toy.generate(ids, mask, 8, sampling=Temperature(), key=keys)
    order = np.array([2, 0, 3, 1])
    moved = toy.generate(ids[order], mask[order], 8, sampling=Temperature(), key=keys[order])
    other = np.where(np.arange(4)[:, None] == 2, ids, (ids + 11) % 32)
    among = toy.generate(other, mask, 8, sampling=Temperature(), key=keys)
    for field in ("tokens", "logprobs", "lengths"):
        np.testing.assert_array_equal(np.asarray(getattr(one, field))[order], getattr(moved, field))
        np.testing.assert_array_equal(getattr(one, field)[2], getattr(among, field)[2])


def test_the_same_key_draws_the_same_and_another_key_something_else(toy):
    ids, mask = _prompts(32)
    draws = [
        np.asarray(toy.generate(ids, mask, 8, sampling=Temperature(), key=jax.random.key(seed)).tokens)
        for seed in (5, 5, 6)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()
    twins = np.tile(ids[:1], (4, 1))
    rows = np.asarray(toy.generate(twins, np.ones_like(twins), 8, sampling=Temperature(), key=jax.random.key(5)).tokens)
    assert len({tuple(row) for row in rows}) == 4  # rows draw apart, also of one prompt


@dataclasses.dataclass(frozen=True)
class _FromTheKey:
    """A token that depends on nothing but the key."""

    def __call__(self, logits, keys):
        return jax.vmap(lambda key: jax.random.randint(key, (), 0, 32))(keys)


def test_every_step_of_every_row_has_a_key_of_its_own(toy):
    ids, mask = _prompts(32, rows=3)
    key = jax.random.key(4)
    out = toy.generate(ids, mask, 6, sampling=_FromTheKey(), key=key)
    rows = [jax.random.fold_in(key, row) for row in range(3)]
    expected = [[jax.random.randint(jax.random.fold_in(row, step), (), 0, 32) for step in range(6)] for row in rows]
    np.testing.assert_array_equal(out.tokens, expected)


def test_first_tokens_are_drawn_in_proportion_to_softmax(toy):
    ids = np.array([[3, 27, 22, 31, 4]])
    draws = 2048
    keys = jax.random.split(jax.random.key(0), draws)
    out = generation.generate(
        toy.model,
        toy.params,
        PromptBatch(
            *(np.repeat(x.astype(np.int32), draws, axis=0) for x in (ids, np.ones_like(ids))), keys, np.int32(1)
        ),
        np.array([-1], np.int32),
        max_new_tokens=8,
        sampling=Temperature(2.0),
    )
    expected = draws * np.asarray(jax.nn.softmax(toy.logits(ids, np.ones_like(ids))[0, -1] / 2.0))
    counts = np.bincount(np.asarray(out.tokens[:, 0]), minlength=32)
    assert ((counts - expected) ** 2 / expected).sum() < 61.1  # chi-squared, 31 degrees, p = 0.001


def test_another_batch_prompt_or_expert_of_the_same_bucket_compiles_nothing(toy, compilations):
    spectra = sva.decompose(toy, "mlp", progress=False)
    z = {name: np.ones((3, len(spectrum.s)), np.float32) for name, spectrum in spectra.items()}
    one = {name: x[0] for name, x in z.items()}
    ids, mask = _prompts(32, rows=3)
    keys = [jax.random.key(0), jax.random.key(1), jax.random.split(jax.random.key(2), 4)]
    settings = dict(eos_ids=[1], sampling=Temperature(), key=keys[0])
    base, merged, rows = (toy.generate(ids, mask, 5, z=x, **settings) for x in (None, one, z))
    np.testing.assert_array_equal(base.tokens, merged.tokens)
    np.testing.assert_array_equal(base.tokens, rows.tokens)
    assert "jit(generate)" in compilations  # the counter works
    compilations.clear()
    settings = dict(eos_ids=[7, 8, 9], sampling=Temperature(), key=keys[1])
    toy.generate(ids[:, 2:], mask[:, 2:], 7, **settings)
    toy.generate(np.tile(ids, (1, 3))[::-1], np.tile(mask, (1, 3)), 8, **settings)
    four = [np.concatenate([x, x[:1]]) for x in (ids, mask)]
    toy.generate(*four, 6, **settings)
    toy.generate(*four, 6, **(settings | {"key": keys[2]}))
    toy.generate(ids, mask, 5, z={name: 1.1 * x for name, x in one.items()}, **settings)
    toy.generate(ids, mask, 5, z={name: 1.1 * x for name, x in z.items()}, **settings)
    assert compilations == []


def test_prompts_that_begin_alike_are_answered_as_each_alone(toy):
    ids, mask = _prompts(32, width=40)
    ids[:, 8:34] = ids[0, 8:34]
    mask[1, :4], mask[-1, :8], mask[:, :8] = 1, 1, 0
    together = toy.generate(ids, mask, 8)
    for row in range(len(ids)):
        alone = toy.generate(ids[row : row + 1], mask[row : row + 1], 8)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(together.logprobs[row], alone.logprobs[0], atol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA's CPU compiler makes of a step")
def test_a_step_of_decoding_copies_no_keys_or_values(toy):
    ids, mask = (jnp.asarray(x, jnp.int32) for x in _prompts(32))
    keys, ends = jax.random.split(jax.random.key(0), 4), jnp.full(4, -1, jnp.int32)
    arguments = toy.model, toy.params, PromptBatch(ids, mask, keys, jnp.int32(12)), ends
    compiled = generation.generate.lower(*arguments, max_new_tokens=12, sampling=Greedy()).compile()
    (step,) = [part for part in compiled.as_text().split("\n\n") if part.count("/while/body/") > 50]
    kept = [f"f32[4,{toy.model.cfg.num_kv_heads},8,21]", f"f32[4,{toy.model.cfg.num_kv_heads},21,8]"]
    assert all(shape in step for shape in kept)
    assert not [line for line in step.splitlines() if " copy(" in line and any(shape in line for shape in kept)]
