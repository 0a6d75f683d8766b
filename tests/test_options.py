"""Options that several commands share."""

import dataclasses

import numpy as np
import pytest

from sva.cli.generate import Generate
from sva.cli.options import MODEL, LoadingOptions, completed
from sva.cli.serve import Serve
from sva.generation.testing import toy_lm
from sva.parallel.mesh_config import MeshConfig
from sva.spectral.expert import Expert


def of(base, path):
    """A file of an expert that was trained on this model."""
    Expert({"w": np.ones(3, np.float32)}, "linear", metadata={"base": base}).save(path)
    return path


@pytest.fixture
def expert(tmp_path):
    """Of the packaged weights."""
    return of("smollm2-135m-instruct-q4_1", tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", [Generate, Serve])
def test_without_a_model_a_command_takes_the_one_that_its_first_expert_was_trained_on(kind, expert):
    assert completed(kind(expert=(expert,))).model == "smollm2-135m-instruct-q4_1"
    assert completed(kind(expert=(expert,), model="other")).model == "other"
    assert completed(kind()).model == MODEL


def test_the_help_of_a_mesh_names_every_axis():
    (help_text,) = [
        field.metadata["about"].text for field in dataclasses.fields(LoadingOptions) if field.name == "mesh"
    ]
    assert all(axis.name in help_text for axis in dataclasses.fields(MeshConfig))


def test_a_base_of_another_machine_is_no_default_and_one_that_is_here_is(tmp_path):
    for base in (str(tmp_path / "elsewhere"), "somebody/some-model"):
        assert completed(Generate(expert=(of(base, tmp_path / "b.safetensors"),))).model == MODEL
    toy_lm().save(tmp_path / "toy")
    assert completed(Generate(expert=(of(str(tmp_path / "toy"), tmp_path / "c.safetensors"),))).model.endswith("toy")


def test_an_expert_that_does_not_say_its_base_or_cannot_be_read_leaves_the_default(tmp_path):
    Expert({"w": np.ones(3, np.float32)}, "linear").save(tmp_path / "silent.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no safetensors file")
    for name in ("silent", "damaged", "missing"):
        assert completed(Serve(expert=(tmp_path / f"{name}.safetensors",))).model == MODEL
