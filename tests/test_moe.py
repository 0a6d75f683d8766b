"""Mixture-of-experts bases: configs, both spellings of weights, and the sparse layers beside transformers'."""

import dataclasses
import json
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from margins import assert_same_tokens
from safetensors.numpy import load_file, save_file

import sva
from sva.cli.throughput import bench, random_lm
from sva.models import cache as kv_cache
from sva.models import moe
from sva.models.cache import DecodeCache
from sva.models.checkpoint_formats import open_checkpoint
from sva.models.config import from_hf, to_hf
from sva.models.flops import linear_flops
from sva.models.load import load_params
from sva.models.moe_config import sparse_cuts
from sva.models.shape import model_config
from sva.models.transformer import Transformer, logits, positions_of
from sva.models.weights import expected
from sva.utils.errors import UserError
from sva.utils.trees import select

ROWS, LENGTH = 3, 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """kind -> (transformers' model, directory)."""

    @cache
    def make(kind):
        directory = tmp_path_factory.mktemp(kind)
        return tiny.make(kind, directory), directory

    return make


def _load(directory, scan=False):
    found = open_checkpoint(directory)
    model = Transformer(found.config, scan_layers=scan and (sparse_cuts(found.config.moe) or True))
    return model, *load_params(found, model, progress=False)


def _prompts(side, length=LENGTH):
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB, (ROWS, length))
    mask = np.ones_like(ids)
    mask[1, : length // 3] = side != "left"
    mask[1, -(length // 3) :] = side != "right"
    return ids, mask


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", tiny.MOE_KINDS)
def test_logits_equal_transformers_on_both_paddings(kind, scan, checkpoint):
    torch_model, directory = checkpoint(kind)
    model, params, _ = _load(directory, scan)
    for side, length in (("left", LENGTH), ("right", LENGTH), ("left", 3)):
        ids, mask = _prompts(side, length)
        ours = np.asarray(logits(model, params, ids, mask))
        theirs = tiny.logits(torch_model, ids, mask)
        assert np.abs(ours - theirs)[mask > 0].max() < 3e-4
        assert np.ptp(theirs[mask > 0]) > 3


@pytest.mark.parametrize(("kind", "scan"), [("mixtral", True), ("qwen3_moe", True), ("olmoe", False)])
def test_cached_decoding_equals_a_full_pass(kind, scan, checkpoint):
    model, params, _ = _load(checkpoint(kind)[1], scan)
    ids, mask = _prompts("left")
    full = np.asarray(logits(model, params, ids, mask))
    positions, valid = positions_of(jnp.asarray(mask))

    @jax.jit
    def step(params, *piece):
        hidden, written = model.apply({"params": params}, *piece)
        return model.apply({"params": params}, hidden, method="unembed"), written

    def piece(start, stop):
        return ids[:, start:stop], positions[:, start:stop], valid[:, start:stop]

    one, first = step(params, *piece(0, 12))
    outputs = [one]
    slots = kv_cache.empty(model.cfg, ROWS, LENGTH - 12, model.dtype, scan=model.scan_layers)
    recent = DecodeCache(slots, jnp.zeros((), jnp.int32))
    for start in range(12, LENGTH):
        out, recent = step(params, *piece(start, start + 1), [first], recent)
        outputs.append(out)
    assert np.abs(np.concatenate(outputs, axis=1) - full)[mask > 0].max() < 3e-4


@pytest.mark.parametrize("kind", tiny.MOE_KINDS)
def test_greedy_tokens_equal_transformers(kind, checkpoint):
    torch_model, directory = checkpoint(kind)
    lm = sva.load(str(directory), scan_layers=kind == "qwen3_moe", progress=False)
    ids, mask = _prompts("left", 9)
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    theirs = torch_model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **settings)[:, 9:].numpy()

    def last(text):
        return tiny.logits(torch_model, text[None], np.ones_like(text[None]))[0, -1]

    assert_same_tokens(lm.generate(ids, mask, 12).tokens, theirs, ids, mask, last)


def test_tokens_packed_without_their_padding_give_what_they_give_in_place(checkpoint):
    model, params, _ = _load(checkpoint("olmoe")[1])
    ids, mask = _prompts("left")
    places = np.flatnonzero(mask).astype(np.int32)
    run = jax.jit(lambda ids, places: model.apply({"params": params}, ids, *positions_of(mask), token_indices=places))
    np.testing.assert_allclose(run(ids, places)[0][mask > 0], run(ids, None)[0][mask > 0], atol=1e-5)


def test_names_are_by_module_and_shapes_are_the_checkpoints(checkpoint):
    for kind in tiny.MOE_KINDS:
        found = open_checkpoint(checkpoint(kind)[1])
        assert {name: leaf.shape for name, leaf in expected(found.config).items()} == dict(found.shapes)
    assert found.shapes["model.layers.2.mlp.experts.6.down_proj.weight"] == (64, 96)
    assert found.shapes["model.layers.0.mlp.gate.weight"] == (7, 64)


def _fuse(directory, target):
    """A copy of a checkpoint, its modules fused as transformers 5 holds them in memory."""
    target.mkdir()
    weights = load_file(directory / "model.safetensors")
    fused = {}
    for name in [name for name in weights if ".experts." in name]:
        prefix, module, kind = re.fullmatch(r"(.*\.experts\.)(\d+)\.(\w+)\.weight", name).groups()
        fused.setdefault((prefix, kind), {})[int(module)] = weights.pop(name)
    stacks = {key: np.stack([found[i] for i in sorted(found)]) for key, found in fused.items()}
    for prefix in {prefix for prefix, _ in stacks}:
        first, second, third = ("w1", "w3", "w2") if (prefix, "w1") in stacks else ("gate_proj", "up_proj", "down_proj")
        weights[f"{prefix}gate_up_proj"] = np.concatenate([stacks[prefix, first], stacks[prefix, second]], axis=1)
        weights[f"{prefix}down_proj"] = stacks[prefix, third]
    save_file(weights, target / "model.safetensors")
    (target / "config.json").write_text((directory / "config.json").read_text())
    return weights


@pytest.mark.parametrize("kind", tiny.MOE_KINDS)
def test_fused_tensors_are_the_same_model_as_those_by_module(kind, checkpoint, tmp_path):
    directory = checkpoint(kind)[1]
    fused = _fuse(directory, tmp_path / "fused")
    assert any(name.endswith("mlp.experts.gate_up_proj") or "block_sparse_moe" in name for name in fused)
    _, params, known = _load(directory)
    _, again, known_again = _load(tmp_path / "fused")
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert known == known_again


@pytest.mark.parametrize("kind", tiny.MOE_KINDS)
def test_what_is_saved_loads_in_transformers_and_here(kind, checkpoint, tmp_path):
    torch_model, directory = checkpoint(kind)
    lm = sva.load(str(directory), scan_layers=False, progress=False)
    lm.save(tmp_path / "new")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    ids, mask = _prompts("left")
    np.testing.assert_array_equal(tiny.logits(again, ids, mask), tiny.logits(torch_model, ids, mask))
    assert sva.load(str(tmp_path / "new"), progress=False).fingerprint == lm.fingerprint
    with_w1 = any("block_sparse_moe.experts.0.w1" in name for name in load_file(tmp_path / "new/model.safetensors"))
    assert with_w1 == (kind == "mixtral")


def test_int8_and_bfloat16_run_near_float32(checkpoint):
    directory = str(checkpoint("qwen3_moe")[1])
    ids, mask = _prompts("left")
    exact = np.asarray(sva.load(directory, progress=False).logits(ids, mask))[mask > 0]
    for dtype, scan in (("bfloat16", True), ("int8", False)):
        rough = np.asarray(sva.load(directory, dtype, scan_layers=scan, progress=False).logits(ids, mask))[mask > 0]
        # Where two modules are nearly as likely, rounding picks another one: most tokens are near, not all.
        near = np.abs(rough - exact).max(axis=-1) < 0.15 * np.abs(exact).max()
        assert near.mean() > 0.8, dtype


def test_a_token_meets_only_the_modules_that_its_router_chose(checkpoint):
    model, params, _ = _load(checkpoint("olmoe")[1])
    ids, mask = _prompts("none")
    _, sown = model.apply({"params": params}, ids, *positions_of(mask), mutable=[moe.COLLECTION])
    found = moe.loads(sown[moe.COLLECTION], mask > 0, 7)
    loads = np.stack([found[f"layers_{i}"] for i in range(3)])
    assert loads.shape == (3, 7)
    np.testing.assert_array_equal(loads.sum(axis=1), [ROWS * LENGTH * 2] * 3)
    share = moe.balance(model, params, ids, mask)
    np.testing.assert_allclose(np.stack([share[i] for i in range(3)]), loads / loads.sum(axis=1, keepdims=True))
    largest = moe.largest_load(sown[moe.COLLECTION], mask > 0, 7)
    assert float(largest) == pytest.approx(np.mean([7 * share[i].max() for i in range(3)]))


def test_balance_leaves_padding_out_and_is_the_same_scanned(checkpoint):
    directory = checkpoint("qwen3_moe")[1]
    ids, mask = _prompts("left")
    model, params, _ = _load(directory)
    found = moe.balance(model, params, ids, mask)
    assert set(found) == {1, 2}  # the first layer is dense
    changed = np.where(mask > 0, ids, 5)
    jax.tree.map(np.testing.assert_array_equal, moe.balance(model, params, changed, mask), found)
    scanned, params, _ = _load(directory, True)
    jax.tree.map(np.testing.assert_allclose, moe.balance(scanned, params, ids, mask), found)


def test_a_router_that_sends_nothing_to_a_module_makes_no_nan(checkpoint):
    model, params, _ = _load(checkpoint("mixtral")[1])
    ids, mask = _prompts("left")
    params = jax.tree.map(lambda x: x, params)
    for layer in range(3):
        gate = params[f"layers_{layer}"]["mlp"]["gate"]
        gate["weight"] = jnp.zeros_like(gate["weight"])  # equal shares: ties go to the first modules
    found = moe.balance(model, params, ids, mask)
    np.testing.assert_allclose(found[0], [0.5, 0.5, 0, 0, 0])

    def loss(params):
        return jnp.sum(logits(model, params, ids, mask) ** 2 * mask[..., None])

    value, gradient = jax.value_and_grad(loss)(params)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    unused = gradient["layers_0"]["mlp"]["experts"]["up_proj"]["weight"][2:]
    assert not np.asarray(unused).any()


BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("kind", tiny.MOE_KINDS)
def test_a_config_is_read_as_transformers_means_it_and_written_back(kind):
    theirs = tiny.config(kind)
    cfg = from_hf(theirs.to_dict())
    sizes = {"mixtral": (5, 2, 96, True), "qwen3_moe": (6, 3, 40, True), "olmoe": (7, 2, 96, False)}[kind]
    assert (cfg.moe.modules, cfg.moe.top_k, cfg.moe.width, cfg.moe.renormalise) == sizes
    assert cfg.moe.layers == ((False, True, True) if kind == "qwen3_moe" else (True, True, True))
    assert from_hf(to_hf(cfg)) == cfg
    assert from_hf(json.loads(theirs.to_json_string(use_diff=False))) == cfg
    again = transformers.AutoConfig.for_model(**to_hf(cfg))
    assert again.num_experts_per_tok == cfg.moe.top_k
    assert getattr(again, "num_local_experts", None) == getattr(again, "num_experts", None) == cfg.moe.modules


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, (True,) * 4),
        ({"decoder_sparse_step": 2}, (False, True, False, True)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (False, True, False, False)),
        ({"mlp_only_layers": [0, 1]}, (False, False, True, True)),
    ],
)
def test_sparse_layers_are_those_of_transformers(changes, layers):
    raw = BASE | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    cfg = from_hf(raw | changes)
    assert cfg.moe.layers == layers
    with torch.device("meta"):
        theirs = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**raw | changes))
    assert tuple(hasattr(layer.mlp, "experts") for layer in theirs.layers) == layers
    assert from_hf(to_hf(cfg)) == cfg


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than the 8 modules"),
        ("olmoe", {"num_experts": 4}, "num_experts_per_tok 8 is more than the 4 modules"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0 is not implemented"),
        ("qwen3_moe", {"num_experts": 4, "num_local_experts": 8}, "num_local_experts 8 and num_experts 4 contradict"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts must be a positive whole number"),
        ("qwen3_moe", {"mlp_only_layers": "first"}, "mlp_only_layers must be a list of layers"),
        ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob must be true or false"),
    ],
)
def test_an_impossible_config_is_refused_by_name(kind, changes, message):
    with pytest.raises(UserError, match=message):
        from_hf(BASE | {"model_type": kind} | changes)


def test_layers_of_two_kinds_in_one_scan_are_refused(checkpoint):
    found = open_checkpoint(checkpoint("qwen3_moe")[1])
    model = Transformer(found.config, scan_layers=True)
    with pytest.raises(UserError, match="sparse and dense layers lie in one scan"):
        jax.eval_shape(lambda ids: model.init(jax.random.key(0), ids, ids, ids == 0), jnp.zeros((1, 2), jnp.int32))


def _damaged(directory, target, change):
    target.mkdir()
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors")
    (target / "config.json").write_text((directory / "config.json").read_text())
    return target


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_missing_or_unequal_module_is_refused_by_name(is_fused, checkpoint, tmp_path):
    directory = checkpoint("olmoe")[1]
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    if is_fused:
        _fuse(directory, tmp_path / "fused")
        directory, name = tmp_path / "fused", "model.layers.1.mlp.experts.gate_up_proj"
    lost = _damaged(directory, tmp_path / "lost", lambda weights: weights.pop(name))
    said = "model.layers.1.mlp.experts.0.gate_proj.weight" if is_fused else name
    with pytest.raises(UserError, match=f"unmapped: the checkpoint has no tensor for {re.escape(said)}"):
        _load(lost)
    uneven = _damaged(directory, tmp_path / "uneven", lambda weights: weights.update({name: weights[name][:-1]}))
    with pytest.raises(UserError, match=f"wrong shape: {re.escape(name)}"):
        _load(uneven)
    if not is_fused:
        return
    both = {"model.layers.1.mlp.experts.3.down_proj.weight": np.zeros((64, 96), np.float32)}
    twice = _damaged(directory, tmp_path / "twice", lambda weights: weights.update(both))
    with pytest.raises(UserError, match=r"experts\.3\.down_proj\.weight is set twice"):
        _load(twice)


def test_a_missing_tensor_of_mixtral_is_named_as_its_files_do(checkpoint, tmp_path):
    sva.load(str(checkpoint("mixtral")[1]), progress=False).save(tmp_path / "whole")
    name = "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    lost = _damaged(tmp_path / "whole", tmp_path / "lost", lambda weights: weights.pop(name))
    with pytest.raises(UserError, match=re.escape(name)):
        _load(lost)


def test_moe_is_hashable_and_part_of_the_config():
    cfg = from_hf(tiny.config("olmoe").to_dict())
    assert hash(cfg) == hash(dataclasses.replace(cfg))
    assert cfg != dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, top_k=1))


def test_a_token_costs_the_modules_that_it_meets_and_bench_refuses_a_mixture():
    cfg = from_hf(tiny.config("olmoe").to_dict())
    attention = 2 * (2 * 64 * 64 + 2 * 32 * 64)
    assert linear_flops(cfg) == 3 * (attention + 2 * 7 * 64 + 2 * 3 * 2 * 96 * 64)
    with pytest.raises(UserError, match="is a mixture of experts"):
        bench(random_lm(cfg, "float32"), [1], prompt=2, new_tokens=2)


@pytest.mark.parametrize(
    ("name", "weights", "matrices"),
    [("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704, 768), ("Qwen/Qwen3-30B-A3B", 30_532_122_624, 18_432)],
)
def test_real_shapes_have_their_published_numbers_of_weights(name, weights, matrices):
    specs = expected(model_config(name))
    assert sum(int(np.prod(leaf.shape)) for leaf in specs.values()) == weights
    assert len(select(specs, "moe")) == matrices
