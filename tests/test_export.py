import errno
import json
import os
import stat

import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors import SafetensorError

from sva.models import export
from sva.models.checkpoint_formats import open_checkpoint
from sva.models.export import save_checkpoint
from sva.utils.errors import UserError

TINY = np.ones((2, 2), np.float32)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    tiny.make("llama3", folder)
    return open_checkpoint(folder).config


def tensors_of(checkpoint):
    return ((name, checkpoint.read(name)) for name in checkpoint.shapes)


@pytest.mark.parametrize("max_shard_bytes", [4 << 30, 60_000])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_transformers_and_sva_read_back_what_was_saved(kind, max_shard_bytes, tmp_path):
    model = tiny.make(kind, tmp_path / "old")
    old = open_checkpoint(tmp_path / "old")
    save_checkpoint(tmp_path / "new", old.config, tensors_of(old), max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "new" / "model.safetensors").is_file() == (max_shard_bytes > 60_000)

    new = open_checkpoint(tmp_path / "new")
    assert new.config == old.config
    assert new.shapes == old.shapes
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values())
    for (name, weight), (other_name, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(weight, other), name
        np.testing.assert_array_equal(new.read(name), weight.detach().numpy())
    ids = np.random.default_rng(0).integers(3, tiny.VOCAB, (2, 20))
    mask = np.ones_like(ids)
    np.testing.assert_array_equal(tiny.logits(again, ids, mask), tiny.logits(model, ids, mask))
    assert (again.generation_config.eos_token_id, again.generation_config.pad_token_id) == (2, 0)


def test_shards_hold_no_more_than_the_limit_and_the_index_names_them(tmp_path, config):
    tiny.make("llama3", tmp_path / "old")
    old = open_checkpoint(tmp_path / "old")
    save_checkpoint(tmp_path / "new", old.config, tensors_of(old), max_shard_bytes=60_000)
    files = sorted(f.name for f in (tmp_path / "new").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 3
    assert all((tmp_path / "new" / file).stat().st_size < 60_000 + 5_000 for file in files)
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * int(np.prod(shape)) for shape in old.shapes.values())
    assert list(index["weight_map"]) == list(old.shapes)


def test_only_one_shard_is_asked_for_at_a_time(tmp_path, config, monkeypatch):
    asked, written = [], []
    monkeypatch.setattr(
        export, "save_tensors", lambda file, shard, _: (file.touch(), written.append((list(shard), len(asked))))
    )

    def stream():
        for i in range(5):
            asked.append(i)
            yield f"w{i}", TINY

    save_checkpoint(tmp_path / "new", config, stream(), max_shard_bytes=2 * TINY.nbytes)
    assert written == [(["w0", "w1"], 3), (["w2", "w3"], 5), (["w4"], 5)]


def test_the_stored_dtype_is_written_and_read(tmp_path):
    tiny.make("qwen3", tmp_path / "old", dtype="bfloat16")
    old = open_checkpoint(tmp_path / "old")
    save_checkpoint(tmp_path / "new", old.config, tensors_of(old))
    assert open_checkpoint(tmp_path / "new").read("model.norm.weight").dtype == ml_dtypes.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.dtype == torch.bfloat16


def test_a_directory_that_holds_something_is_left_alone(tmp_path, config):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for place in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        with pytest.raises(UserError, match="already holds something"):
            save_checkpoint(place, config, [("w", TINY)])
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save_checkpoint(tmp_path / "empty", config, [("w", TINY)])
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_failure_leaves_nothing_behind(tmp_path, config):
    def stream():
        yield "w", TINY
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        save_checkpoint(tmp_path / "new", config, stream())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, config, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(UserError, match="the disk is full") as caught:
        save_checkpoint(tmp_path / "new", config, [("w", TINY)])
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_files_are_as_readable_as_the_umask_says(tmp_path, config):
    before = os.umask(0o022)
    try:
        save_checkpoint(tmp_path / "new", config, [("w", TINY)])
    finally:
        os.umask(before)
    modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "new").iterdir()}
    assert modes == {
        "config.json": 0o644,
        "generation_config.json": 0o644,
        "model.safetensors": 0o644,
    }
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o755
