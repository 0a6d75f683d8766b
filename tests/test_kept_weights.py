"""A large checkpoint's fingerprint and unpacked weights are kept, and never taken for another file's."""

import json

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from sva.models import kept_weights
from sva.models.checkpoint_formats import open_checkpoint
from sva.models.hf_directory import EMBEDDING, HEAD
from sva.models.load import load_params
from sva.models.transformer import Transformer


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A packed checkpoint, which counts as large; the cache is the test's own."""
    monkeypatch.setenv("SVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_weights, "LEAST", 1)
    model = tiny.make("llama", tmp_path / "model")
    tiny.write_gguf(model, tmp_path / "model.gguf", packed="Q8_0")
    return tmp_path / "model.gguf"


def _load(path):
    """(params, fingerprint) of the checkpoint at this path."""
    checkpoint = open_checkpoint(path)
    return load_params(checkpoint, Transformer(checkpoint.config), progress=False)


def _kept(path):
    kept = kept_weights.entry(open_checkpoint(path))
    assert kept is not None
    return kept


def _forbid_unpacking(monkeypatch):
    monkeypatch.setattr("sva.models.gguf_file.GGUFFile.read", lambda *_: pytest.fail("a weight was unpacked again"))
    monkeypatch.setattr("sva.models.load.digest", lambda *_: pytest.fail("a weight was hashed again"))


def test_a_second_load_gives_the_same_weights_and_unpacks_and_hashes_nothing(path, monkeypatch):
    checkpoint = open_checkpoint(path)
    plain = {name: checkpoint.read(name) for name in checkpoint.shapes}
    monkeypatch.setattr(kept_weights, "LEAST", 1 << 60)
    _, fingerprint = _load(path)
    monkeypatch.setattr(kept_weights, "LEAST", 1)
    first, _ = _load(path)
    _forbid_unpacking(monkeypatch)
    second, again = _load(path)
    assert again == fingerprint
    jax.tree.map(np.testing.assert_array_equal, first, second)
    mapped = kept_weights.unpacked(open_checkpoint(path), _kept(path))
    for name, weight in plain.items():
        np.testing.assert_array_equal(mapped.read(name), weight, err_msg=name)


def test_the_kept_file_is_safetensors_and_its_pages_are_not_copied(path):
    _load(path)
    kept = _kept(path)
    checkpoint = kept_weights.unpacked(open_checkpoint(path), kept)
    tensors = load_file(kept.weights)
    assert set(tensors) == set(checkpoint.shapes)
    name = "model.embed_tokens.weight"
    weight = checkpoint.read(name)
    np.testing.assert_array_equal(tensors[name], weight)
    assert not weight.flags.writeable
    assert jax.device_put(weight).unsafe_buffer_pointer() == weight.ctypes.data


def test_a_file_that_was_written_again_is_another_one(path):
    _, before = _load(path)
    old = _kept(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # within the last weight's numbers
    path.write_bytes(content)
    _, after = _load(path)
    assert after != before
    assert not old.directory.exists()  # swept out when the new one was kept


@pytest.mark.parametrize("damage", ["flipped", "truncated", "removed", "source"])
def test_damaged_weights_are_made_again(damage, path):
    first, fingerprint = _load(path)
    kept = _kept(path)
    content = bytearray(kept.weights.read_bytes())
    kept.weights.unlink()
    if damage == "flipped":
        content[len(content) // 2] ^= 8
    if damage == "source":
        (kept.directory / "source.json").write_text("{")
    if damage != "removed":
        kept.weights.write_bytes(content[:-4] if damage == "truncated" else content)
    again, known = _load(path)
    assert known == fingerprint
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_without_room_on_the_disk_the_weights_are_read_as_they_are(path, monkeypatch):
    monkeypatch.setattr(kept_weights.shutil, "disk_usage", lambda _: type("", (), {"free": 0}))
    _, fingerprint = _load(path)
    assert not _kept(path).weights.exists()
    assert _kept(path).fingerprint() == fingerprint


def test_of_unpacked_weights_the_fingerprint_is_kept(path, monkeypatch):
    directory = path.with_suffix("")
    _, fingerprint = _load(directory)
    monkeypatch.setattr("sva.models.load.digest", lambda *_: pytest.fail("a weight was hashed again"))
    assert _load(directory)[1] == fingerprint
    assert not _kept(directory).weights.exists()


def test_a_config_that_makes_another_model_of_the_same_files_has_a_fingerprint_of_its_own(tmp_path, path):
    directory = tmp_path / "tied"
    tiny.make("llama3", directory)
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBEDDING].copy()}, directory / "model.safetensors", {"format": "pt"})
    _, tied = _load(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    params, untied = _load(directory)
    assert "lm_head" in params
    assert untied != tied
    assert _load(directory)[1] == untied
