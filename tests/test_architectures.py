"""Every architecture and rope type beside transformers' own model of the same random weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from margins import assert_same_tokens

import sva
from sva.models import cache as kv_cache
from sva.models.config import from_hf, to_hf
from sva.models.rope import Rope
from sva.models.transformer import logits, positions_of
from sva.utils.errors import UserError

ROWS, LENGTH = 3, 30
LONG = ("phi4", "dynamic", "longrope")  # whose frequencies change beyond a length below LENGTH


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """kind, scan -> (transformers' model, model, params)."""

    load = tiny.loader(tmp_path_factory)
    return lambda kind, scan=False: load(kind, scan)[:3]


def prompts(side, length=LENGTH):
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB, (ROWS, length))
    mask = np.ones_like(ids)
    mask[1, :4] = side != "left"
    mask[1, -4:] = side != "right"
    return ids, mask


def truth(torch_model, kind, ids, mask):
    """transformers' logits; of a kind in `LONG` row by row, for there a row's depend on the longest one's length."""
    if kind not in LONG:
        return tiny.logits(torch_model, ids, mask)
    rows = []
    for row, seen in zip(ids, mask, strict=True):
        tiny.logits(torch_model, row[None, :4], np.ones((1, 4), int))  # else it remembers an earlier, longer row
        rows.append(tiny.logits(torch_model, row[None], seen[None]))
    return np.concatenate(rows)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", tiny.MORE)
def test_logits_equal_transformers_on_both_paddings(kind, scan, loaded):
    torch_model, model, params = loaded(kind, scan)
    for side in ("left", "right"):
        ids, mask = prompts(side)
        ours, theirs = np.asarray(logits(model, params, ids, mask)), truth(torch_model, kind, ids, mask)
        assert np.abs(ours - theirs)[mask > 0].max() < 3e-4
        assert np.ptp(theirs[mask > 0]) > 3  # a logit error of 3e-4 is small only beside logits that differ


@pytest.mark.parametrize(("kind", "scan"), [(kind, kind in ("gemma3", "smollm3")) for kind in tiny.MORE])
def test_cached_decoding_equals_a_full_pass(kind, scan, loaded):
    _, model, params = loaded(kind, scan)
    length = 12 if kind in LONG else LENGTH
    ids, mask = prompts("left", length)
    full = np.asarray(logits(model, params, ids, mask))

    @jax.jit
    def step(params, *piece):
        hidden, written = model.apply({"params": params}, *piece)
        return model.apply({"params": params}, hidden, method="unembed"), written

    positions, valid = positions_of(jnp.asarray(mask))

    def piece(start, stop):
        return ids[:, start:stop], positions[:, start:stop], valid[:, start:stop]

    one, first = step(params, *piece(0, 8))
    recent = kv_cache.start(model.cfg, ROWS, length - 8, model.dtype, scan=scan)
    outputs = [one]
    for start in range(8, length):
        out, recent = step(params, *piece(start, start + 1), [first], recent)
        outputs.append(out)
    assert np.abs(np.concatenate(outputs, axis=1) - full)[mask > 0].max() < 3e-4


@pytest.mark.parametrize("kind", [k for k in tiny.MORE if k in LONG or tiny.config(k).model_type != "llama"])
def test_greedy_tokens_equal_transformers(kind, tmp_path):
    torch_model = tiny.make(kind, tmp_path)
    lm = sva.load(str(tmp_path), progress=False)
    ids, mask = prompts("left", 6)
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    theirs = torch_model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **settings)[:, 6:].numpy()

    def next_logits(text):
        return truth(torch_model, kind, text[None], np.ones_like(text[None]))[0, -1]

    assert_same_tokens(lm.generate(ids, mask, 6).tokens, theirs, ids, mask, next_logits)


@pytest.mark.parametrize("kind", LONG)
def test_short_rows_keep_their_frequencies_beside_long_ones(kind, loaded):
    torch_model, model, params = loaded(kind)
    ids, mask = prompts("none")
    mask[2, 10:] = 0
    ours = np.asarray(logits(model, params, ids, mask))
    alone = truth(torch_model, kind, ids[2:, :10], mask[2:, :10])
    assert np.abs(ours[2, :10] - alone[0]).max() < 3e-4


@pytest.mark.parametrize("kind", LONG)
def test_answers_past_the_length_where_all_positions_change_are_refused(kind, tmp_path):
    tiny.make(kind, tmp_path)
    lm = sva.load(str(tmp_path), progress=False)
    ids, mask = prompts("none", 18)
    reason = "the model's context is 24" if kind == "dynamic" else "answers end at 24 tokens"
    with pytest.raises(UserError, match=f"prompt 0 has 18 tokens and 7 new ones are asked for, but {reason}"):
        lm.generate(ids, mask, 7)
    assert lm.generate(ids, mask, 6).tokens.shape == (ROWS, 6)


@pytest.mark.parametrize("kind", tiny.MORE)
def test_a_written_config_is_read_alike_by_sva_and_by_transformers(kind, tmp_path):
    cfg = from_hf(tiny.config(kind).to_dict())
    if kind == "olmo3":  # one theta of its own for each kind of layer, which transformers 4's spelling does not have
        with pytest.raises(UserError, match="rope_theta"):
            to_hf(cfg)
        cfg = dataclasses.replace(cfg, rope=Rope(500000.0), local_rope=None)
    (tmp_path / "config.json").write_text(json.dumps(to_hf(cfg)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert from_hf(theirs.to_dict()) == cfg


@pytest.mark.parametrize("kind", ["gemma3", "phi3", "olmo2"])
def test_factored_experts_give_what_merged_ones_give(kind, tmp_path):
    tiny.make(kind, tmp_path)
    lm = sva.load(str(tmp_path), progress=False)
    spectra = sva.decompose(lm, "all", progress=False)
    if kind == "phi3":
        assert {name.split(".")[-2] for name in spectra} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    rng = np.random.default_rng(1)
    z = {name: jnp.asarray(rng.uniform(0.5, 1.5, w.s.shape), jnp.float32) for name, w in spectra.items()}
    ids, mask = prompts("left", 12)
    factored = np.asarray(logits(lm.model, lm.params, ids, mask, sva.factored(spectra, z)))
    merged = np.asarray(sva.merge(lm, spectra, z).logits(ids, mask))
    assert np.abs(factored - merged)[mask > 0].max() < 1e-3
    assert np.abs(merged - np.asarray(lm.logits(ids, mask)))[mask > 0].max() > 0.1
