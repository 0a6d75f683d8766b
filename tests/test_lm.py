import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers
from safetensors.numpy import load_file, save_file

import sva
from sva.generation.prompts import pad_eos, row_keys
from sva.generation.sampling import Greedy, Temperature
from sva.generation.testing import toy_lm
from sva.utils.errors import UserError

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    return tiny.make("llama", directory), directory


@pytest.fixture
def prompts():
    ids = np.random.default_rng(0).integers(0, 32, (3, 7))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def _changed(directory, target, change):
    """A copy of a checkpoint with `change` made to its tensors."""
    shutil.copytree(directory, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return str(target)


def _message(action, *args, **settings):
    with pytest.raises(UserError) as caught:
        action(*args, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_loaded_logits_equal_transformers_scanned_and_unrolled(checkpoint, prompts):
    torch_model, directory = checkpoint
    ids, mask = prompts
    theirs = tiny.logits(torch_model, ids, mask)
    models = [sva.load(str(directory), scan_layers=scan, progress=False) for scan in (False, True)]
    for lm in models:
        assert np.abs(np.asarray(lm.logits(ids, mask)) - theirs)[mask > 0].max() < 3e-4
        assert lm.tokenizer is None
    assert models[0].fingerprint == models[1].fingerprint


def test_fingerprint_is_of_the_weights_and_not_of_the_files(checkpoint, tmp_path):
    _, directory = checkpoint
    known = sva.load(str(directory), progress=False).fingerprint
    tiny.make("llama", tmp_path / "shards", shards=True)
    assert sva.load(str(tmp_path / "shards"), progress=False).fingerprint == known
    # The order in the header is the order of the data: a file of the same tensors the other way round.
    reverse = tmp_path / "reverse"
    shutil.copytree(directory, reverse)
    blobs = load_file(directory / "model.safetensors")
    header, data = {}, b""
    for name in sorted(blobs, reverse=True):
        header[name] = {
            "dtype": "F32",
            "shape": blobs[name].shape,
            "data_offsets": [len(data), len(data) + blobs[name].nbytes],
        }
        data += blobs[name].tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (reverse / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert sva.load(str(reverse), progress=False).fingerprint == known


@pytest.mark.parametrize("name", [UP, "model.norm.weight", "lm_head.weight"])
def test_fingerprint_changes_with_any_weight(name, checkpoint, tmp_path):
    _, directory = checkpoint

    def nudge(tensors):
        tensors[name].flat[3] = np.nextafter(tensors[name].flat[3], np.float32(9))

    other = sva.load(_changed(directory, tmp_path / "x", nudge), progress=False)
    assert other.fingerprint != sva.load(str(directory), progress=False).fingerprint


@pytest.mark.parametrize("scan", [False, True])
def test_a_merged_model_saves_as_a_checkpoint_that_transformers_answers_alike(
    scan, checkpoint, prompts, tmp_path, monkeypatch
):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path / "cache"))
    lm = sva.load(str(checkpoint[1]), scan_layers=scan, progress=False)
    spectra = sva.decompose(lm, "mlp", progress=False)
    z = {name: np.linspace(0.7, 1.3, len(x.s)).astype(np.float32) for name, x in spectra.items()}
    merged = sva.merge(lm, spectra, z)
    merged.save(tmp_path / "merged")
    torch_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    ids, mask = prompts
    theirs = tiny.logits(torch_model, ids, mask)
    assert np.abs(np.asarray(merged.logits(ids, mask)) - theirs)[mask > 0].max() < 3e-4
    assert np.abs(np.asarray(lm.logits(ids, mask)) - theirs)[mask > 0].max() > 0.1
    again = sva.load(str(tmp_path / "merged"), progress=False)
    assert again.fingerprint == merged.fingerprint != lm.fingerprint


@pytest.mark.parametrize("scan", [False, True])
def test_unit_z_and_constant_p_are_the_identity_and_merged_equals_factored(scan, toy, prompts):
    lm = toy_lm(scan_layers=scan)
    spectra = sva.decompose(lm, "all", progress=False)
    keep = prompts[1] > 0
    base = np.asarray(lm.logits(*prompts))[keep]
    bound = 1e-5 * np.abs(base).max()
    experts = [
        sva.Expert({name: np.ones(len(x.s)) for name, x in spectra.items()}, "linear"),
        sva.Expert({name: np.full(len(x.s), -1.3) for name, x in spectra.items()}, "sigmoid_nuclear"),
    ]
    for expert in experts:
        z = expert.z(spectra)
        assert np.abs(np.asarray(lm.logits(*prompts, z))[keep] - base).max() < bound
        assert np.abs(np.asarray(sva.merge(lm, spectra, z).logits(*prompts))[keep] - base).max() < bound
    z = {name: np.linspace(0.8, 1.2, len(x.s)).astype(np.float32) for name, x in spectra.items()}
    merged = np.asarray(sva.merge(lm, spectra, z).logits(*prompts))[keep]
    assert np.abs(merged - np.asarray(lm.logits(*prompts, z))[keep]).max() < bound
    assert np.abs(merged - base).max() > 1e-2


def test_a_saved_toy_model_loads_with_its_tokenizer_and_fingerprint(toy, tmp_path):
    toy.save(tmp_path / "toy")
    again = sva.load(str(tmp_path / "toy"), progress=False)
    assert again.fingerprint == toy.fingerprint
    text = "<user> what colour the apple ? <assistant> red <end>"
    assert again.tokenizer(text)["input_ids"] == toy.tokenizer(text)["input_ids"]
    assert again.tokenizer.chat_template == toy.tokenizer.chat_template
    ids = np.arange(12).reshape(2, 6)
    np.testing.assert_array_equal(again.logits(ids, np.ones_like(ids)), toy.logits(ids, np.ones_like(ids)))


def test_bfloat16_runs_near_float32_and_keeps_the_fingerprint(checkpoint, prompts):
    one, half = (sva.load(str(checkpoint[1]), dtype, progress=False) for dtype in ("float32", "bfloat16"))
    ids, mask = prompts
    exact, rough = (np.asarray(lm.logits(ids, mask))[mask > 0] for lm in (one, half))
    assert rough.dtype == np.float32
    assert 1e-4 < np.abs(rough - exact).max() / np.abs(exact).max() < 0.1  # 8 bits a product, three layers
    assert half.generate(ids, mask, 3).tokens.shape == (3, 3)
    assert one.fingerprint == half.fingerprint  # of the weights as stored


def _swap_shape(tensors):
    tensors[UP] = np.ascontiguousarray(tensors[UP].T)


def _with_nan(tensors):
    tensors[UP].flat[5] = np.nan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(UP), ["unmapped", UP]),
        (lambda tensors: tensors.update(extra=np.ones(2, np.float32)), ["unexpected", "extra"]),
        (_swap_shape, ["wrong shape", UP, "[96, 64]", "[64, 96]"]),
        (_with_nan, [UP, "NaN"]),
    ],
)
def test_a_weight_gone_astray_is_named_with_its_file(change, words, checkpoint, tmp_path):
    path = _changed(checkpoint[1], tmp_path / "bad", change)
    message = _message(sva.load, path, progress=False)
    assert all(word in message for word in [*words, path])


def test_a_weight_set_twice_is_named(tmp_path):
    tiny.make("llama", tmp_path, shards=True)
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second, {"format": "pt"})
    message = _message(sva.load, str(tmp_path), progress=False)
    assert name in message
    assert "twice" in message


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (lambda lm, ids, mask: lm.generate(ids, mask * 0, 4), "prompt 0 is empty"),
        (lambda lm, ids, mask: lm.generate(ids, mask, 250), "context is 256"),
        (lambda lm, ids, mask: lm.generate(ids, mask, 0), "max_new_tokens=0"),
        (lambda lm, ids, mask: lm.generate(ids, mask, 4, sampling=Temperature()), "needs a key"),
        (lambda lm, ids, mask: lm.logits(ids + 90, mask), "the vocabulary has 32 tokens"),
        (lambda lm, ids, mask: lm.logits(ids - 32, mask), "the vocabulary has 32 tokens"),
        (lambda lm, ids, mask: lm.logits(ids * 0.5, mask), "whole numbers"),
        (lambda lm, ids, mask: lm.logits(ids[0], mask[0]), r"\[B, T\]"),
        (lambda lm, ids, mask: lm.logits(ids, mask[:, 1:]), r"\[B, T\]"),
        (lambda lm, ids, mask: lm.logits(ids, mask, {UP: np.ones(31)}), "31 entries, its spectrum has 32"),
        (lambda lm, ids, mask: lm.logits(ids, mask, {UP: np.ones((2, 32))}), r"shape \[2, 32\], expected .*\[3, 32\]"),
        (lambda lm, ids, mask: lm.generate(ids, mask, 4, z={UP: np.ones((2, 32))}), r"shape \[2, 32\]"),
        (lambda lm, ids, mask: lm.logits(ids, mask, {UP: np.full(32, np.nan)}), "NaN"),
        (lambda lm, ids, mask: lm.logits(ids, mask, {"model.norm.weight": np.ones(32)}), "no linear layer model.norm"),
        (lambda lm, ids, mask: lm.logits(ids, mask, {"model.embed_tokens.weight": np.ones(32)}), "no linear layer"),
        (lambda lm, ids, mask: lm.logits(ids, mask, {UP.replace("1", "7"): np.ones(32)}), "no linear layer model.lay"),
        (lambda lm, ids, mask: sva.decompose(lm, "mpl"), "matches no weight"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_line(request_, words, toy, prompts):
    with pytest.raises(UserError, match=words) as caught:
        request_(toy, *prompts)
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_names_the_known_ones(checkpoint):
    assert "float32, bfloat16" in _message(sva.load, str(checkpoint[1]), "float16")


def test_keys_are_one_a_row():
    key = jax.random.key(3)
    rows = row_keys(key, 3, 4, Temperature())
    assert rows.shape == (4,)
    assert rows[2] == jax.random.fold_in(key, 2)
    assert (row_keys(rows[:3], 3, 4, Temperature())[:3] == rows[:3]).all()
    assert row_keys(None, 2, 2, Greedy()).shape == (2,)
    for bad in (rows, jax.random.PRNGKey(0)):
        with pytest.raises(UserError, match="key"):
            row_keys(bad, 2, 2, Temperature())


def test_end_tokens_come_in_buckets():
    np.testing.assert_array_equal(pad_eos(()), [-1] * 4)
    np.testing.assert_array_equal(pad_eos((7, 2)), [7, 2, -1, -1])
    assert len(pad_eos(range(5))) == 8


def test_one_z_for_all_rows_and_the_same_z_for_each_row_give_the_same_answers(toy, prompts):
    spectra = sva.decompose(toy, "all", progress=False)
    z = {name: jnp.linspace(1.4, 0.6, len(x.s)) for name, x in spectra.items()}
    once = toy.generate(*prompts, 8, z=z)
    each = toy.generate(*prompts, 8, z={name: jnp.tile(x, (3, 1)) for name, x in z.items()})
    for row in range(3):
        differing = np.flatnonzero(np.asarray(once.tokens[row] != each.tokens[row]))
        if differing.size:  # only where the two likeliest tokens are within 1e-3
            ids = np.concatenate([prompts[0][row][prompts[1][row] > 0], each.tokens[row, : differing[0]]])[None]
            top = np.sort(np.asarray(toy.logits(ids, np.ones_like(ids), z))[0, -1])
            assert top[-1] - top[-2] < 1e-3
    np.testing.assert_allclose(once.logprobs[:, 0], each.logprobs[:, 0], atol=3e-4)
