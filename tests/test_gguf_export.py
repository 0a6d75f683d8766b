import errno
import os

import gguf
import numpy as np
import pytest
import tiny

import sva
from sva.interop.gguf_export import save_gguf, tokenizer_metadata
from sva.models.checkpoint_formats import open_checkpoint
from sva.models.gguf_file import read_gguf
from sva.utils.errors import UserError

IDS = np.random.default_rng(0).integers(3, tiny.VOCAB, (2, 20))
MASK = np.ones_like(IDS)


def save(lm, path, **settings):
    named = lm.named_params()
    save_gguf(path, lm.model.cfg, lambda name: np.asarray(named[name]), name="mine", **({"tokenizer": {}} | settings))
    return path


def load(kind, folder, **changes):
    tiny.make(kind, folder, **changes)
    return sva.load(str(folder), progress=False)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_what_is_written_is_read_back_with_the_same_weights_and_logits(kind, tmp_path):
    lm = load(kind, tmp_path / "hf", **({"use_sliding_window": False} if kind == "qwen2" else {}))
    path = save(lm, tmp_path / "x.gguf")
    again = sva.load(str(path), progress=False)
    theirs = again.named_params()
    for name, weight in lm.named_params().items():
        np.testing.assert_array_equal(theirs[name], weight, err_msg=name)
    assert again.tokenizer is None
    assert again.model.cfg.windows == lm.model.cfg.windows
    assert (again.model.cfg.eos_token_ids, again.model.cfg.pad_token_id) == ((2,), 0)
    assert np.abs(np.asarray(again.logits(IDS, MASK)) - np.asarray(lm.logits(IDS, MASK))).max() < 1e-5
    assert read_gguf(path).metadata["general.name"] == "mine"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "llama3"])
def test_the_file_is_the_one_that_llama_cpps_rules_make(kind, tmp_path):
    changes = {"use_sliding_window": False} if kind == "qwen2" else {}
    model = tiny.make(kind, tmp_path / "hf", **changes)
    save(sva.load(str(tmp_path / "hf"), progress=False), tmp_path / "ours.gguf")
    tiny.write_gguf(model, tmp_path / "theirs.gguf")  # written apart from sva
    ours, theirs = gguf.GGUFReader(tmp_path / "ours.gguf"), gguf.GGUFReader(tmp_path / "theirs.gguf")
    wanted = {tensor.name: tensor.data for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == set(wanted)
    for tensor in ours.tensors:
        np.testing.assert_allclose(tensor.data, wanted[tensor.name], rtol=1e-6, err_msg=tensor.name)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):  # counts
            assert ours.fields[key].contents() == field.contents(), key


def test_matrices_are_rounded_to_bfloat16_and_vectors_are_not(tmp_path):
    import ml_dtypes

    lm = load("llama", tmp_path / "hf")
    path = save(lm, tmp_path / "x.gguf", dtype=ml_dtypes.bfloat16)
    read, named = open_checkpoint(path).read, lm.named_params()
    for name, weight in named.items():
        stored = np.asarray(weight).astype(ml_dtypes.bfloat16 if weight.ndim == 2 else np.float32)
        np.testing.assert_array_equal(read(name), stored.astype(np.float32))


def test_linear_rope_scaling_survives(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    lm = load("llama", tmp_path / "hf", rope_parameters=rope)
    again = open_checkpoint(save(lm, tmp_path / "x.gguf")).config.rope
    assert (again.kind, again.factor, again.theta) == ("linear", 4.0, 500.0)


def test_a_tokenizer_is_carried_over_whole(tmp_path):
    model = tiny.make("llama", tmp_path / "hf")
    tokens = [f"<{i}>" for i in range(tiny.VOCAB)]
    tiny.write_gguf(model, tmp_path / "first.gguf")
    lm = sva.load(str(tmp_path / "hf"), progress=False)
    tokenizer = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.full(tiny.VOCAB, 1, np.int32),
        "tokenizer.ggml.merges": ["< 0"],
        "tokenizer.ggml.scores": np.linspace(0, 1, tiny.VOCAB, dtype=np.float32),
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0xFFFFFFFF,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}\n",
    }
    first = save(lm, tmp_path / "x.gguf", tokenizer=tokenizer)
    found = tokenizer_metadata(first)
    assert found.keys() == tokenizer.keys()
    for key, value in tokenizer.items():
        np.testing.assert_array_equal(found[key], value)
    second = save(lm, tmp_path / "y.gguf", tokenizer=found)
    assert first.read_bytes() == second.read_bytes()
    assert tokenizer_metadata(tmp_path / "hf") == {}


def test_what_a_gguf_file_cannot_express_is_named(tmp_path):
    path = tmp_path / "x.gguf"
    for kind, changes, words in (
        ("qwen2", {}, "differ in their attention window"),
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("qwen3", {"rope_parameters": tiny._LLAMA3_ROPE}, "rope scaling llama3 of a qwen3 model"),
    ):
        lm = load(kind, tmp_path / kind, **changes)
        with pytest.raises(UserError, match=words):
            save(lm, path)
        assert not path.exists()


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch):
    lm = load("llama", tmp_path / "hf")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(UserError, match="the disk is full"):
        save(lm, tmp_path / "x.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


def test_the_real_model_keeps_its_fingerprint_tokenizer_and_template(tmp_path):
    lm = sva.load(str(tiny.smollm2()), progress=False)
    path = save(lm, tmp_path / "x.gguf", tokenizer=tokenizer_metadata(tiny.smollm2()))
    again = sva.load(str(path), progress=False)
    assert again.fingerprint == lm.fingerprint
    assert again.model.cfg == lm.model.cfg
    assert again.tokenizer.encode("In 1999, it was 12.") == lm.tokenizer.encode("In 1999, it was 12.")
    assert again.tokenizer.chat_template == lm.tokenizer.chat_template
