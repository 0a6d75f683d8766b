import dataclasses
import struct
import subprocess
import sys

import gguf
import numpy as np
import pytest
import tiny
import torch
import transformers

from sva.models import hub
from sva.models.checkpoint import match
from sva.models.checkpoint_formats import open_checkpoint
from sva.models.config import from_hf, to_hf
from sva.models.gguf_file import read_gguf
from sva.models.weights import expected
from sva.utils.errors import UserError


def message(path):
    with pytest.raises(UserError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama and its GGUF file."""
    folder = tmp_path_factory.mktemp("llama")
    model = tiny.make("llama", folder)
    tiny.write_gguf(model, folder / "model.gguf")
    return model, folder / "model.gguf"


@pytest.fixture
def damaged(llama, tmp_path):
    """Writes a changed copy of the file's bytes and returns its path."""

    def write(change):
        path = tmp_path / "damaged.gguf"
        path.write_bytes(change(llama[1].read_bytes()))
        return path

    return write


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "llama3"])
def test_a_gguf_file_holds_the_weights_it_was_made_from(kind, tmp_path):
    model = tiny.make(kind, tmp_path, **({"use_sliding_window": False} if kind == "qwen2" else {}))
    tiny.write_gguf(model, tmp_path / "model.gguf")
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    original = open_checkpoint(tmp_path)
    match({name: spec.shape for name, spec in expected(checkpoint.config).items()}, checkpoint.shapes)
    assert dict(checkpoint.shapes) == dict(original.shapes)
    for name in original.shapes:
        np.testing.assert_array_equal(checkpoint.read(name), original.read(name), err_msg=name)
    assert checkpoint.quantisation is None
    ours, theirs = checkpoint.config.__dict__, original.config.__dict__
    same = set(ours) - {"rope", "pad_token_id"}  # the test file holds no pad token
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
    assert checkpoint.config.rope.theta == original.config.rope.theta


def test_rope_factors_of_the_file_are_the_llama3_scaling(tmp_path):
    model = tiny.make("llama3", tmp_path)
    tiny.write_gguf(model, tmp_path / "model.gguf")
    config = open_checkpoint(tmp_path / "model.gguf").config
    assert config.rope.kind == "default"
    assert len(config.rope.factors) == config.head_dim // 2
    assert max(config.rope.factors) == pytest.approx(8.0, rel=1e-6)
    # written as a config and read by transformers, they give the frequencies of the original
    again = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**to_hf(config)))
    torch.testing.assert_close(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize("packed", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_packed_matrices_are_unpacked_as_the_gguf_package_does(packed, tmp_path):
    model = tiny.make("llama", tmp_path)
    tiny.write_gguf(model, tmp_path / "model.gguf", packed=packed)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    assert checkpoint.quantisation == (packed if packed.startswith("Q") else None)
    name = "model.layers.2.mlp.down_proj.weight"
    weight, read = model.get_parameter(name).detach().numpy(), checkpoint.read(name)
    kind = gguf.GGMLQuantizationType[packed]
    np.testing.assert_array_equal(read, gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind))
    assert read.dtype == np.float32
    assert np.abs(read - weight).max() < 0.15 * np.abs(weight).max()


def test_a_big_tensor_is_unpacked_in_blocks(llama, monkeypatch):
    whole = read_gguf(llama[1]).read("token_embd.weight")
    monkeypatch.setattr("sva.models.gguf_file._BLOCK", 1000)
    np.testing.assert_array_equal(read_gguf(llama[1]).read("token_embd.weight"), whole)


@pytest.fixture(scope="module")
def split(llama, tmp_path_factory):
    """The same Llama in files of ten tensors."""
    folder = tmp_path_factory.mktemp("split")
    tiny.write_gguf(llama[0], folder / "model.gguf", each=10)
    return sorted(folder.iterdir())


def test_a_split_model_is_loaded_as_one_whichever_part_is_named(llama, split):
    whole = open_checkpoint(llama[1])
    assert [path.name for path in split] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for path in split:
        parts = open_checkpoint(path)
        assert (parts.config, parts.path) == (whole.config, split[0])
        assert dict(parts.shapes) == dict(whole.shapes)
    for name in whole.shapes:
        np.testing.assert_array_equal(parts.read(name), whole.read(name), err_msg=name)
    assert hub.resolve(str(split[0].parent)) == split[0]


def test_missing_parts_are_named(split, tmp_path):
    for path in split[:2]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in split[:2]:
        assert "not beside it: model-00003-of-00003.gguf; fetch" in message(tmp_path / path.name)
    (tmp_path / split[0].name).unlink()
    text = message(tmp_path / split[1].name)
    assert "3 files of a split model; not beside it: model-00001-of-00003.gguf, model-00003-of-00003.gguf;" in text


def test_parts_that_do_not_belong_together_are_refused(split, tmp_path):
    content = [path.read_bytes() for path in split]
    first, second, third = (tmp_path / path.name for path in split)

    def write(*parts):
        for path, part in zip((first, second, third), parts, strict=True):
            path.write_bytes(part)

    write(content[0], content[1], content[1])
    with pytest.raises(UserError, match=r"model-00003-of-00003\.gguf is part 1 \(from 0\) of 3, not 2 of 3"):
        open_checkpoint(first)
    at = content[1].index(b"split.no") + len(b"split.no") + 4  # behind the key and its type
    copy = content[1][:at] + (2).to_bytes(2, "little") + content[1][at + 2 :]
    write(content[0], content[1], copy)
    with pytest.raises(UserError, match="is set twice, in .*00002-of-00003.gguf and in .*00003-of-00003.gguf"):
        open_checkpoint(first)
    write(*content)
    first.rename(tmp_path / "renamed.gguf")
    assert "one of the 3 files of a split model" in message(tmp_path / "renamed.gguf")
    assert "NAME-0000N-of-00003.gguf" in message(tmp_path / "renamed.gguf")


def test_settings_come_from_the_metadata(tmp_path):
    model = tiny.make("llama", tmp_path)
    path = tmp_path / "model.gguf"
    tiny.write_gguf(model, path, metadata={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert (open_checkpoint(path).config.rope.kind, open_checkpoint(path).config.rope.factor) == ("linear", 4.0)
    tiny.write_gguf(model, path, metadata={"rope.freq_base": None, "attention.key_length": None})
    config = open_checkpoint(path).config
    assert (config.rope.theta, config.head_dim, config.eos_token_ids) == (10000.0, 16, (2,))
    assert config.rms_norm_eps == 1e-5  # stored as float32, read as what was meant
    tiny.write_gguf(model, path, metadata={"attention.sliding_window": 6, "attention.head_count_kv": [2, 2, 2]})
    config = open_checkpoint(path).config
    assert (config.architecture, config.windows, config.num_kv_heads) == ("mistral", (6, 6, 6), 2)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"block_count": None}, "llama.block_count is missing"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "unsupported rope type 'yarn'"),
        ({"rope.scaling.attn_factor": 1.5}, "rope.scaling.attn_factor other than 1"),
        ({"attention.head_count_kv": [2, 1, 2]}, "differs between layers"),
        ({"attention.value_length": 8}, "attention.value_length 8"),
        ({"rope.dimension_count": 8}, "rope.dimension_count 8"),
        ({"expert_count": 8}, "mixtures of experts are not read from GGUF files"),
        ({"attention.scale": 0.5}, "llama.attention.scale 0.5 is not implemented"),
        ({"logit_scale": 4.0}, "llama.logit_scale 4.0"),
        ({"residual_scale": 0.3}, "llama.residual_scale 0.3"),
        ({"attention.causal": False}, "llama.attention.causal 0"),
        ({"attention.head_count_kv": 3}, "num_key_value_heads 3"),
    ],
)
def test_settings_that_are_not_supported_are_named(metadata, words, llama, tmp_path):
    tiny.write_gguf(llama[0], tmp_path / "model.gguf", metadata=metadata)
    assert words in message(tmp_path / "model.gguf")


def test_other_architectures_and_tensors_are_named(tmp_path):
    for name, kind, words in [
        ("token_embd.weight", "falcon", "unsupported architecture falcon; supported GGUF files: llama, "),
        ("blk.0.ffn_gate_inp.weight", "llama", "unmapped: the file has no tensor for token_embd.weight"),
    ]:
        writer = gguf.GGUFWriter(tmp_path / "model.gguf", kind)
        writer.add_tensor(name, np.zeros((2, 32), np.float32))
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        assert words in message(tmp_path / "model.gguf")


def test_a_tensor_that_no_weight_takes_is_named(damaged):
    path = damaged(lambda data: data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xp.weight"))
    assert "unexpected: no weight of a llama model takes blk.1.ffn_xp.weight" in message(path)


def test_a_tensor_set_twice_is_named(damaged):
    path = damaged(lambda data: data.replace(b"blk.1.ffn_up.weight", b"blk.0.ffn_up.weight"))
    assert message(path).startswith("blk.0.ffn_up.weight is set twice in ")


def test_a_packed_type_that_cannot_be_unpacked_is_named(damaged):
    def change(data, kind):
        at = data.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4 + 2 * 8
        return data[:at] + struct.pack("<I", kind) + data[at + 4 :]

    q8_k = gguf.GGMLQuantizationType.Q8_K.value
    assert "blk.1.ffn_up.weight is packed as Q8_K" in message(damaged(lambda data: change(data, q8_k)))
    assert "blk.1.ffn_up.weight is packed as 999" in message(damaged(lambda data: change(data, 999)))


def test_a_truncated_file_is_named_wherever_it_ends(llama, damaged):
    data = llama[1].read_bytes()
    for end in [*range(4, 2000, 37), len(data) // 2, len(data) - 1]:
        assert "truncated or corrupt" in message(damaged(lambda data, end=end: data[:end]))


def test_a_file_of_another_kind_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    assert "is not a GGUF file" in message(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    assert "git lfs pull" in message(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    assert "GGUF version 1 is not supported" in message(path)
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    assert "(big-endian) is not supported" in message(path)


def test_a_corrupt_header_is_one_line_whatever_its_bytes(llama, damaged):
    header = llama[1].read_bytes().index(b"token_embd.weight")
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(200):
        at, value = int(rng.integers(4, header + 200)), int(rng.integers(256))
        path = damaged(lambda data, at=at, value=value: data[:at] + bytes([value]) + data[at + 1 :])
        try:
            open_checkpoint(path)  # a changed letter of a name nobody needs does no harm
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert not [text for text in messages if "\n" in text]


def test_a_file_that_shrinks_after_opening_is_noticed(damaged):
    path = damaged(lambda data: data)
    checkpoint = open_checkpoint(path)
    path.write_bytes(path.read_bytes()[:-8000])
    with pytest.raises(UserError, match="shorter"):
        checkpoint.read("lm_head.weight")


def test_smollm2_opens_quickly_and_completely():
    checkpoint = open_checkpoint(tiny.smollm2())
    match({name: spec.shape for name, spec in expected(checkpoint.config).items()}, checkpoint.shapes)
    config = checkpoint.config
    assert checkpoint.quantisation == "Q4_1"
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.vocab_size, config.intermediate_size, config.head_dim) == (49152, 1536, 64)
    assert (config.rope.theta, config.rope.factors, config.rms_norm_eps) == (1e5, (), 1e-5)
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (
        1,
        (0, 2),
        2,
    )  # <|endoftext|>, <|im_end|>
    assert np.isfinite(checkpoint.read("model.layers.29.self_attn.q_proj.weight")).all()


def test_reading_gguf_needs_no_torch(llama):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from sva.models.checkpoint_formats import open_checkpoint\n"
        f"c = open_checkpoint({str(llama[1])!r}); print(c.read('model.norm.weight').shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "(64,)"), done.stderr


@pytest.mark.parametrize(
    ("kind", "changes", "metadata"),
    [
        ("gemma2", {}, {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 6.0}),
        ("gemma3", {"num_hidden_layers": 6, "sliding_window_pattern": 6},
         {"rope.freq_base_swa": 50.0, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    ],
)  # fmt: skip
def test_gemma_files_are_the_models_that_they_were_made_of(kind, changes, metadata, tmp_path):
    model = tiny.make(kind, tmp_path / "model", **changes)
    tiny.write_gguf(model, tmp_path / "model.gguf", metadata={"attention.sliding_window": 6} | metadata)
    directory, file = open_checkpoint(tmp_path / "model"), open_checkpoint(tmp_path / "model.gguf")
    assert file.config == dataclasses.replace(directory.config, pad_token_id=file.config.pad_token_id)
    assert directory.shapes == file.shapes
    for name in directory.shapes:
        np.testing.assert_allclose(file.read(name), directory.read(name), atol=1e-6)


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [(2, (6, 0, 6)), (1, (0, 0, 0)), (0, (6, 6, 6)), ([True, True, False], (6, 6, 0)), ([True] * 3, (6, 6, 6))],
)
def test_gemmas_pattern_is_a_period_or_the_layers_themselves(pattern, windows, tmp_path):
    path = tmp_path / "model.gguf"
    metadata = {"attention.sliding_window": 6, "attention.sliding_window_pattern": pattern}
    tiny.write_gguf(tiny.make("gemma3", tmp_path), path, metadata=metadata)
    assert open_checkpoint(path).config.windows == windows


def test_a_pattern_of_other_layers_is_named(tmp_path):
    path = tmp_path / "model.gguf"
    tiny.write_gguf(tiny.make("gemma3", tmp_path), path, metadata={"attention.sliding_window_pattern": [True, False]})
    assert "gemma3.attention.sliding_window_pattern must be a number, or one flag for each of 3 layers" in message(path)
