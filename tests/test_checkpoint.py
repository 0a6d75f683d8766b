import json
import struct

import ml_dtypes
import numpy as np
import pytest
import tiny
import transformers
from safetensors.numpy import load_file, save_file

from sva.models.checkpoint import match
from sva.models.checkpoint_formats import open_checkpoint
from sva.models.hf_directory import EMBEDDING, HEAD
from sva.models.weights import expected
from sva.utils.errors import UserError

CONFIG = tiny.config("llama").to_dict()


def write(directory, tensors=None, config=CONFIG, name="model.safetensors"):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, directory / name)
    return directory


def small(*names):
    return {name: np.full((2, 3), i, np.float32) for i, name in enumerate(names)}


def message(action, *args):
    with pytest.raises(UserError) as caught:
        action(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_weight_of_a_checkpoint_is_found_and_read(kind, shards, tmp_path):
    model = tiny.make(kind, tmp_path, shards=shards)
    assert (tmp_path / "model.safetensors").is_file() != shards
    checkpoint = open_checkpoint(tmp_path)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    match({name: spec.shape for name, spec in expected(checkpoint.config).items()}, checkpoint.shapes)
    assert checkpoint.shapes == {name: w.shape for name, w in weights.items()}
    for name, weight in weights.items():
        read = checkpoint.read(name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, weight)


@pytest.mark.parametrize(
    ("torch_dtype", "dtype"),
    [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16), ("float64", np.float64)],
)
def test_weights_come_in_the_dtype_they_are_stored_in(torch_dtype, dtype, tmp_path):
    model = tiny.make("llama", tmp_path, dtype=torch_dtype)
    read = open_checkpoint(tmp_path).read("model.layers.1.mlp.up_proj.weight")
    assert read.dtype == dtype
    theirs = model.get_parameter("model.layers.1.mlp.up_proj.weight").detach().numpy()
    np.testing.assert_array_equal(read.astype(np.float32), theirs)


def test_end_tokens_of_the_generation_config_are_added(tmp_path):
    write(tmp_path, small("model.norm.weight"), CONFIG | {"eos_token_id": 5, "pad_token_id": None})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 5, 7], "pad_token_id": 3}')
    config = open_checkpoint(tmp_path).config
    assert (config.eos_token_ids, config.pad_token_id, config.bos_token_id) == ((5, 9, 7), 3, 1)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    assert "generation_config.json: eos_token_id" in message(open_checkpoint, tmp_path)


def test_files_without_an_index_are_read_together_but_adapters_are_not(tmp_path):
    write(tmp_path, small("model.a"), name="model-00001-of-00002.safetensors")
    write(tmp_path, small("model.b"), name="model-00002-of-00002.safetensors")
    write(tmp_path, small("lora"), name="adapter_model.safetensors")
    write(tmp_path, small("tok_embeddings.weight"), name="consolidated.safetensors")
    assert set(open_checkpoint(tmp_path).shapes) == {"model.a", "model.b"}


@pytest.mark.parametrize("kind", ["llama3", "gemma3"])
def test_names_of_a_base_model_are_completed(kind, tmp_path):
    model = tiny.make(kind, tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "base")
    whole, base = open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "base")
    assert whole.shapes == base.shapes
    np.testing.assert_array_equal(whole.read("model.norm.weight"), base.read("model.norm.weight"))


def test_harmless_leftovers_are_left_out(tmp_path):
    names = ("model.norm.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    assert set(open_checkpoint(write(tmp_path, small(*names))).shapes) == {"model.norm.weight"}


@pytest.mark.parametrize("file_holds", ["both, equal", "both, different", "only the head"])
def test_a_tied_head_is_used_as_transformers_uses_it(file_holds, tmp_path):
    tiny.make("llama3", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors[EMBEDDING]
    if file_holds == "both, equal":
        tensors[HEAD] = embedding.copy()
    elif file_holds == "both, different":
        tensors[HEAD] = embedding[::-1].copy()
    else:
        tensors[HEAD] = tensors.pop(EMBEDDING)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    match({name: spec.shape for name, spec in expected(checkpoint.config).items()}, checkpoint.shapes)
    np.testing.assert_array_equal(checkpoint.read(EMBEDDING), theirs.get_input_embeddings().weight.detach())
    head = EMBEDDING if checkpoint.config.tie_word_embeddings else HEAD
    assert head == (HEAD if file_holds == "both, different" else EMBEDDING)
    np.testing.assert_array_equal(checkpoint.read(head), theirs.get_output_embeddings().weight.detach())


def test_paths_that_hold_no_model_are_told_apart(tmp_path):
    assert "no such file or directory" in message(open_checkpoint, tmp_path / "nowhere")
    assert "has no config.json" in message(open_checkpoint, tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert "neither a GGUF file nor a directory" in message(open_checkpoint, tmp_path / "weights.safetensors")
    (tmp_path / "weights.safetensors").unlink()
    (tmp_path / "config.json").write_text("{not json")
    assert "config.json is not valid JSON" in message(open_checkpoint, tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json is not valid JSON" in message(open_checkpoint, tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "a JSON dictionary, not a list" in message(open_checkpoint, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert "unsupported architecture mamba; supported: llama" in message(open_checkpoint, tmp_path)


def test_a_directory_without_readable_weights_says_what_to_do(tmp_path):
    write(tmp_path)
    assert "no *.safetensors files; fetch" in message(open_checkpoint, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    text = message(open_checkpoint, tmp_path)
    assert "pytorch_model.bin" in text
    assert "save_pretrained" in text


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_a_truncated_file_is_named(keep, tmp_path):
    write(tmp_path, small("model.norm.weight", "model.embed_tokens.weight"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    text = message(open_checkpoint, tmp_path)
    assert str(file) in text
    assert "fetch it again" in text


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"<html>not found</html>" * 50, "not a safetensors file"),
        (struct.pack("<Q", 1 << 60) + b"{}", "not a safetensors file"),
        (struct.pack("<Q", 4) + b"{[}]", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_a_corrupt_file_is_named(content, word, tmp_path):
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert word in message(open_checkpoint, tmp_path)


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path, small("model.norm.weight")))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "shorter" in message(checkpoint.read, "model.norm.weight")
    file.unlink()
    assert "cannot be read" in message(checkpoint.read, "model.norm.weight")


def test_the_index_and_its_files_must_agree(tmp_path):
    write(tmp_path, small("model.a"), name="one.safetensors")
    write(tmp_path, small("model.b"), name="two.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.a": "one.safetensors", "model.b": "two.safetensors"}}')
    assert set(open_checkpoint(tmp_path).shapes) == {"model.a", "model.b"}
    index.write_text('{"weight_map": {"model.a": "one.safetensors", "model.b": "three.safetensors"}}')
    assert "names three.safetensors, not there" in message(open_checkpoint, tmp_path)
    index.write_text('{"weight_map": {"model.a": "one.safetensors", "model.c": "two.safetensors"}}')
    assert "promises model.c" in message(open_checkpoint, tmp_path)
    index.write_text("{}")
    assert "no weight_map" in message(open_checkpoint, tmp_path)


def test_a_tensor_set_twice_is_an_error(tmp_path):
    write(tmp_path, small("model.a", "model.b"), name="one.safetensors")
    write(tmp_path, small("model.b"), name="two.safetensors")
    text = message(open_checkpoint, tmp_path)
    assert text.startswith("model.b is set twice, in one.safetensors and in ")


def test_a_tensor_set_twice_in_one_file_is_an_error(tmp_path):
    entry = '"model.a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = f"{{{entry}, {entry}}}".encode()
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    text = message(open_checkpoint, tmp_path)
    assert "model.safetensors" in text


def test_an_unsupported_dtype_is_named(tmp_path):
    write(tmp_path, {"model.norm.weight": np.zeros(3, np.int8)})
    text = message(open_checkpoint, tmp_path)
    assert "model.norm.weight has dtype I8" in text
    assert "BF16" in text


def test_unmapped_unexpected_and_wrong_shape_are_different_errors():
    model = {f"w{i}": (2, i) for i in range(6)}
    match(model, dict(model))
    text = message(match, model, {"w0": (2, 0), "other": (9,)}, "there")
    assert text.startswith("there: unmapped: the checkpoint has no tensor for w1 [2, 1], w2 [2, 2], w3 [2, 3] and 2")
    assert "other [9]" in text
    text = message(match, model, model | {"x": (1,), "y": (2, 2)})
    assert text.startswith("unexpected: the model has no weight for x [1], y [2, 2]")
    text = message(match, model, model | {"w3": (3, 2)})
    assert text.startswith("wrong shape: w3 (expected [2, 3], found [3, 2])")


BUFFERS = [
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.1.self_attn.rotary_emb.cos_cached",
    "model.layers.1.self_attn.rotary_emb.sin_cached",
    "model.rotary_emb.inv_freq",
    "model.rotary_emb.original_inv_freq",
    "model.layers.0.self_attn.inv_freq",
    "model.layers.0.self_attn.bias",
    "model.layers.0.self_attn.masked_bias",
    "model.layers.0.attn.bias",
    "model.layers.0.attn.masked_bias",
    "model.layers.0.attention.masked_bias",
    "model.layers.0.self_attn.causal_mask",
    "model.causal_mask",
    "model.position_ids",
    "rope.freqs",
    "freqs_cis",
]


@pytest.mark.parametrize("name", BUFFERS)
def test_a_buffer_that_no_architecture_has_a_weight_for_is_passed_over(name, tmp_path):
    model = tiny.make("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for stored in (np.ones(4, np.float32), np.ones((1, 4), bool), np.arange(4)):
        save_file(weights | {name: stored}, tmp_path / "model.safetensors")
        assert dict(open_checkpoint(tmp_path).shapes) == {n: tuple(p.shape) for n, p in model.named_parameters()}


@pytest.mark.parametrize("kept", [True, False])
def test_buffers_named_in_the_index_are_harmless_there_or_not(kept, tmp_path):
    model = tiny.make("llama", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names, buffers = list(weights), {name: np.ones(4, np.float32) for name in BUFFERS}
    parts = {"one.safetensors": names[:9], "two.safetensors": names[9:]}
    index = {name: file for file, part in parts.items() for name in part} | dict.fromkeys(BUFFERS, "two.safetensors")
    for file, part in parts.items():
        beside = buffers if kept and file == "two.safetensors" else {}
        save_file({name: weights[name] for name in part} | beside, tmp_path / file, metadata={"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert dict(open_checkpoint(tmp_path).shapes) == {n: tuple(p.shape) for n, p in model.named_parameters()}
    transformers.LlamaForCausalLM.from_pretrained(tmp_path)  # which loads it too
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index | {names[0]: "two.safetensors"}})
    )
    assert f"promises {names[0]}" in message(open_checkpoint, tmp_path)


def test_names_that_only_look_like_buffers_stay_unexpected(tmp_path):
    for name in ("model.layers.0.self_attn.q_proj.masked", "model.layers.0.mlp.bias", "model.inv_freq_scale"):
        write(tmp_path, small("model.norm.weight", name))
        found = open_checkpoint(tmp_path).shapes
        assert "unexpected" in message(match, {"model.norm.weight": (2, 3)}, found)


def test_an_index_may_name_the_head_that_a_tied_model_saved_once(tmp_path):
    write(tmp_path, small(EMBEDDING), CONFIG | {"tie_word_embeddings": True}, name="one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {EMBEDDING: "one.safetensors", HEAD: "one.safetensors"}}))
    assert set(open_checkpoint(tmp_path).shapes) == {EMBEDDING}
    write(tmp_path, config=CONFIG)
    assert f"promises {HEAD}" in message(open_checkpoint, tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_are_skipped_in_every_json(tmp_path):
    tiny.make("llama", tmp_path, shards=True)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    expected_shapes, config = open_checkpoint(tmp_path).shapes, open_checkpoint(tmp_path).config
    for path in tmp_path.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert open_checkpoint(tmp_path).shapes == expected_shapes
    assert open_checkpoint(tmp_path).config == config
    (tmp_path / "config.json").write_text("{}", encoding="utf-16")
    assert "config.json is not valid JSON (it is not UTF-8 (byte 1); save" in message(open_checkpoint, tmp_path)
