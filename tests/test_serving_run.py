"""What a server starts with."""

import numpy as np
import pytest

from sva.serving.run import read_experts
from sva.spectral.expert import Expert
from sva.utils.errors import UserError


def test_experts_are_called_by_their_files_or_by_the_runs_that_wrote_them(tmp_path):
    paths = [
        tmp_path / name for name in ("capitals.safetensors", "lists-0/expert.safetensors", "a b:c-0/expert.safetensors")
    ]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        Expert({"w": np.ones(3, np.float32)}, "linear").save(path)
    assert list(read_experts(paths)) == ["capitals", "lists-0", "a_b_c-0"]
    (name,) = read_experts([tmp_path / "lists-0" / ".." / "lists-0" / "expert.safetensors"])
    assert name == "lists-0"
    with pytest.raises(UserError, match="two experts would be called 'capitals'; rename one of the files"):
        read_experts([*paths, tmp_path / "capitals.safetensors"])
