"""The network of a model whose weights are not read."""

import pytest
import tiny

from sva.models import hub, packaged
from sva.models.shape import model_config
from sva.utils.errors import UserError


def test_packaged_weights_that_are_here_are_a_shape(tmp_path, monkeypatch):
    model = tiny.make("llama", tmp_path)
    tiny.write_gguf(model, tmp_path / "model.gguf")
    monkeypatch.setattr(hub, "is_sound", lambda *_: True)
    monkeypatch.setattr(packaged.Packaged, "file", lambda _: tmp_path / "model.gguf")
    assert model_config("smollm2-135m-instruct-q4_1").num_layers == model.config.num_hidden_layers


def test_a_name_that_is_no_model_is_told_which_there_are():
    with pytest.raises(UserError, match=r"model smollm2-135m-instrukt not found: did you mean smollm2-135m-instruct"):
        model_config("smollm2-135m-instrukt")
