"""The benchmark command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sva
from sva.cli import throughput as bench
from sva.generation.testing import toy_lm
from sva.utils.errors import UserError


def test_bench_counts_what_a_step_reads_and_multiplies(monkeypatch):
    monkeypatch.setattr(bench, "_READ", 1 << 16)
    lm = toy_lm(scan_layers=True)
    cfg = lm.model.cfg
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32
    weights = 2 * layer + cfg.vocab_size * 32  # the head; untied embeddings are looked up
    slots = 2 * 2 * 3 * 2 * 8 * (4 + 3)  # k and v, layers, rows, heads, width, slots
    for model, size in ((lm, 4), (sva.quantise(lm), 1)):
        row = bench.bench(model, [3], prompt=4, new_tokens=3, rounds=1)["batches"]["3"]
        assert row["step_flops"] == 2 * 3 * weights
        scales = 0 if size == 4 else 4 * (2 * (32 + 16 + 16 + 32 + 48 + 48 + 32) + cfg.vocab_size)
        assert row["step_bytes"] == size * weights + scales + 4 * slots
    assert "of read rate" in bench.table(bench.bench(lm, [1], prompt=4, new_tokens=2, rounds=1))


@pytest.mark.parametrize(("dtype", "held"), [("bfloat16", "bfloat16"), ("int8", "int8")])
def test_a_model_of_a_shape_alone_has_random_weights(dtype, held):
    lm = bench.random_lm(toy_lm().model.cfg, dtype, kv_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(bench.step_matrices(lm))} <= {held, "float32"}
    hidden = lm.logits(np.arange(12).reshape(2, 6), np.ones((2, 6), int))
    assert 0.3 < float(hidden.std()) < 3
    assert lm.model.kept_dtype == jnp.bfloat16


def test_prompts_that_fill_the_context_are_refused():
    with pytest.raises(UserError, match="context is 256"):
        bench.bench(toy_lm(), [1], prompt=250, new_tokens=7)


@pytest.mark.parametrize("bad", [{"prompt": 0}, {"new_tokens": 1}, {"rounds": 0}])
def test_bench_names_a_setting_that_makes_no_sense(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        bench.bench(toy_lm(), [1], **bad)
