"""Modules of a mixture of experts divided over a mesh."""

import json

import jax
import pytest
from jax.sharding import PartitionSpec as P
from test_sharding import ROOT, finish, run

from sva.models.config import from_hf
from sva.models.weights import expected
from sva.parallel.mesh_config import MeshConfig, parse
from sva.parallel.sharding import abstract_mesh, make_mesh, partition
from sva.utils.errors import UserError

MESHES = {"1x1x1x8": 1, "2x1x2x2": 4, "1x2x2x2": 4, "2x2x2x1": 8}


def test_logits_and_gradient_on_a_mesh_are_those_of_one_device(tmp_path):
    out = finish(run(ROOT / "tests" / "moe_mesh_worker.py", *MESHES, SVA_CACHE=str(tmp_path / "cache")))
    found = json.loads(out.splitlines()[-1])
    assert {name: about["modules of a device"] for name, about in found.items()} == MESHES
    for name, about in found.items():
        assert about["logits"] < 3e-4, name
        assert about["one token"] < 3e-4, name
        assert about["gradient"] < 1e-4, name
        assert about["size"] > 1


def test_modules_lie_over_moe_and_a_mesh_has_that_axis_only_where_it_divides_them():
    raw = {"model_type": "olmoe", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16}
    raw |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_experts": 8, "num_experts_per_tok": 2}
    leaf = expected(from_hf(raw))["model.layers.0.mlp.experts.5.up_proj.weight"]
    stacked = leaf._replace(shape=(8, *leaf.shape), axes=("moe", *leaf.axes), units=(8, *leaf.units))
    assert partition(stacked, abstract_mesh(MeshConfig(1, 2, 2, 4), 16)) == P("moe", "tensor", "fsdp")
    assert partition(stacked, abstract_mesh(MeshConfig(1, 1, 1, 16), 16)) == P(None, None, None)
    assert dict(make_mesh(MeshConfig(), jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert parse("moe=4,fsdp=-1") == MeshConfig(1, -1, 1, 4)
    assert str(parse("moe=4")) == "mesh.data=1 x mesh.fsdp=1 x mesh.tensor=1 x mesh.moe=4"
    with pytest.raises(UserError, match=r"mesh\.moe=0 must be at least 1"):
        parse("moe=0")
