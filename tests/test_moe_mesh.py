"""Modules of a mixture of experts divided over a mesh."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from mixtures import toy_mixture
from test_meshes import TASK
from test_sharding import ROOT, finish, pair, run

from sva.models.config import from_hf
from sva.models.weights import expected
from sva.parallel.mesh_config import MeshConfig, parse
from sva.parallel.sharding import Leaf, abstract_mesh, check_rows, make_mesh, partition
from sva.spectral.expert import Expert
from sva.training import metrics
from sva.utils.errors import UserError

MESHES = {"1x1x1x8": 1, "2x1x2x2": 4, "1x2x2x2": 4, "2x2x2x1": 8}


def test_logits_and_gradient_on_a_mesh_are_those_of_one_device(tmp_path):
    out = finish(run(ROOT / "tests" / "moe_mesh_worker.py", *MESHES, SVA_CACHE=str(tmp_path / "cache")))
    found = json.loads(out.splitlines()[-1])
    alone = found.pop("modules alone")
    assert set(alone) == {"6 rows", "6 modules"}
    assert max(alone.values()) < 1e-5
    assert {name: about["modules of a device"] for name, about in found.items()} == MESHES
    for name, about in found.items():
        assert about["logits"] < 3e-4, name
        assert about["one token"] < 3e-4, name
        assert about["gradient"] < 1e-4, name
        assert about["size"] > 1


@pytest.mark.slow  # two processes, each with all programs of a run
def test_a_run_whose_modules_lie_over_two_processes_is_that_of_one_device(tmp_path):
    toy_mixture(8).save(tmp_path / "model")
    (tmp_path / "colours.py").write_text(TASK)
    (tmp_path / "train.yaml").write_text("train: {steps: 2}")
    settings = [
        tmp_path / "train.yaml",
        f"model={tmp_path / 'model'}",
        f"task={tmp_path / 'colours.py'}",
        "targets=moe",
    ]
    settings += ["rollout.form=factored", "rollout.prompts=8", "rollout.samples=2", "rollout.max_new_tokens=4"]
    settings += [
        "train.micro_batch=8",
        "reinforce.baseline=none",
        "evaluate.size=4",
        "validation.every=1",
        "validation.size=4",
    ]
    sva = Path(sys.executable).with_name("sva")
    finish(run(sva, "train", *settings, f"run_dir={tmp_path / 'one'}", devices=1, SVA_CACHE=str(tmp_path / "cache")))
    for process in pair(tmp_path, "train", *settings, f"run_dir={tmp_path / 'two'}", "mesh.moe=8", worker=sva):
        finish(process)
    alone, found = (Expert.load(tmp_path / name / "expert.safetensors") for name in ("one", "two"))
    assert set(found.raw) == set(alone.raw)
    assert (tmp_path / "two" / "spectrum.png").exists()
    for name, raw in alone.raw.items():
        np.testing.assert_allclose(found.raw[name], raw, atol=1e-4)
    rows, wanted = (metrics.read(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert len(rows) == len(wanted) == 2
    for row, of_one in zip(rows, wanted, strict=True):
        assert of_one["grad_norm"] > 0
        for name in ("loss", "grad_norm", "z_spread", "moe_load", "validation_accuracy"):
            assert row[name] == pytest.approx(of_one[name], rel=1e-3, abs=1e-5), name


def test_modules_and_rows_lie_over_moe_and_a_mesh_has_that_axis_only_where_it_divides_modules():
    raw = {"model_type": "olmoe", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16}
    raw |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_experts": 8, "num_experts_per_tok": 2}
    leaf = expected(from_hf(raw))["model.layers.0.mlp.experts.5.up_proj.weight"]
    stacked = leaf._replace(shape=(8, *leaf.shape), axes=("moe", *leaf.axes), units=(8, *leaf.units))
    assert partition(stacked, abstract_mesh(MeshConfig(1, 2, 2, 4), 16)) == P("moe", "tensor", "fsdp")
    assert partition(stacked, abstract_mesh(MeshConfig(1, 1, 1, 16), 16)) == P(None, None, None)
    rows = Leaf((16, 5), ("batch", None))
    assert partition(rows, abstract_mesh(MeshConfig(2, 2, 1, 4), 16)) == P(("data", "moe", "fsdp"), None)
    assert partition(rows._replace(shape=(4, 5)), abstract_mesh(MeshConfig(2, 2, 1, 4), 16)) == P(
        ("data", "fsdp"), None
    )
    with pytest.raises(UserError, match=r"micro_batch=4 does not divide over mesh.data x mesh.moe x mesh.fsdp = 8;"):
        check_rows("train.micro_batch", 4, abstract_mesh(MeshConfig(1, 1, 1, 8), 8))
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert parse("moe=4,fsdp=-1") == MeshConfig(1, -1, 1, 4)
    assert str(parse("moe=4")) == "mesh.data=1 x mesh.fsdp=1 x mesh.tensor=1 x mesh.moe=4"
    with pytest.raises(UserError, match=r"mesh\.moe=0 must be at least 1"):
        parse("moe=0")
