import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from sva.errors import UserError
from sva.models import layout
from sva.models.config import from_hf
from sva.models.transformer import Transformer
from sva.models.weights import expected
from sva.sharding import AXES, Leaf, MeshConfig, check_rows, make_mesh, notes, partition
from sva.testing import toy_lm

ROOT = Path(__file__).parent.parent
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
QUERY, KEY = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def run(script, *arguments, devices=8, **environ):
    """A process of its own with so many host devices."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    env = os.environ | flags | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"} | environ
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_spectra_inherit_their_weights_axes():
    weights, on = expected(from_hf(SMOLLM2)), mesh(2, 2, 2)
    assert partition(weights[UP], on) == P("tensor", "fsdp")
    assert partition(weights[DOWN], on) == P("fsdp", "tensor")
    for name in (UP, DOWN):
        u, s, vt = layout.spectrum(weights[name], 576)
        (out_axis, in_axis) = partition(weights[name], on)
        assert partition(u, on)[0] == out_axis
        assert partition(vt, on)[1] == in_axis
        assert partition(s, on) == P(None)
        # Between them lies the axis of singular values, on what the other dimension leaves free.
        assert {partition(u, on)[1], out_axis} == {partition(vt, on)[0], in_axis} == {"fsdp", "tensor"}


def test_heads_that_do_not_divide_are_repeated_and_told_of_once_an_axis():
    model = Transformer(from_hf(SMOLLM2))
    weights, on = expected(model.cfg), mesh(2, 2, 2)
    assert partition(weights[QUERY], on) == P(None, "fsdp")  # 576 = 9 heads of 64 would divide by 2, the heads do not
    assert partition(weights[KEY], on) == P(None, "fsdp")
    told = notes(layout.params(model), on)
    assert told == [
        "heads (9) is repeated: tensor = 2 does not divide it",
        "kv_heads (3) is repeated: tensor = 2 does not divide it",
    ]
    assert notes(layout.params(model), mesh(2, 4, 1)) == []
    assert notes(layout.params(toy_lm().model), on) == []


def test_every_matrix_of_a_large_model_falls_into_as_many_parts_as_there_are_devices():
    cfg = from_hf(SMOLLM2 | {"num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192, "head_dim": 128})
    for sizes in ((1, 16, 1), (1, 4, 4), (1, 2, 8)):
        on = mesh(*sizes)
        spectra = [layout.spectrum(leaf, min(leaf.shape)) for name, leaf in expected(cfg).items() if "mlp" in name]
        for u, _, vt in spectra:
            for leaf in (u, vt):
                parts = [on.shape[axis] for axis in partition(leaf, on) if axis]
                assert int(np.prod(parts)) == 16


def test_the_layout_of_stacked_layers_is_that_of_the_arrays(toy):
    for scan in (False, True):
        lm = toy_lm(scan_layers=scan)
        shapes = jax.tree.map(lambda leaf: leaf.shape, layout.params(lm.model), is_leaf=lambda x: isinstance(x, Leaf))
        assert jax.tree.map(lambda x: x.shape, lm.params) == shapes


def test_a_mesh_that_does_not_make_the_devices_is_one_line():
    devices = jax.devices() * 8
    with pytest.raises(UserError, match=r"mesh.data=3 x mesh.fsdp=1 x mesh.tensor=1 makes 3 devices, but there are 8"):
        make_mesh(MeshConfig(3), devices)
    with pytest.raises(UserError, match=r"does not divide 8 devices: 3 is no divisor"):
        make_mesh(MeshConfig(-1, 3), devices)
    with pytest.raises(UserError, match="mesh.fsdp=0 must be at least 1"):
        MeshConfig(1, 0)
    with pytest.raises(UserError, match="more than one axis open"):
        MeshConfig(-1, -1)
    assert dict(make_mesh(MeshConfig()).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_a_batch_that_does_not_divide_the_mesh_is_one_line():
    check_rows("rollout.prompts", 8, mesh(2, 4, 1))
    with pytest.raises(UserError, match=r"rollout.prompts=6 does not divide over mesh.data x mesh.fsdp = 8"):
        check_rows("rollout.prompts", 6, mesh(2, 4, 1))


def check_equal(rows):
    for row in rows.values():
        assert row["loss_difference"] < 1e-5
        assert row["gradient"] < 1e-5
        assert row["gradient_worst_matrix"] < 1e-4
        assert row["first_pass_difference"] < 1e-5
        assert all(step["margin"] < 1e-3 for step in row["rollout_rows_differing"] + row["answers_differing"])


def test_meshes_equal_one_device(tmp_path):
    script = ROOT / "experiments/sharding/equality.py"
    process = run(script, "--model", "toy", "--output", tmp_path / "result.json", "--meshes", "2x2x2", "--scan")
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-2000:]
    check_equal(json.loads((tmp_path / "result.json").read_text())["meshes"])
