from pathlib import Path

import pytest

from sva.utils import paths
from sva.utils.errors import UserError


def test_data_is_looked_for_beside_the_checkout(tmp_path, monkeypatch):
    monkeypatch.delenv("SVA_DATA", raising=False)
    assert Path(paths._REPOSITORY, "pyproject.toml").is_file()
    monkeypatch.setattr(paths, "_REPOSITORY", tmp_path / "sva")
    assert paths.data_dir() is None
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert paths.data_dir() == tmp_path / "shared" / "data"


def test_a_data_folder_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("SVA_DATA", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"\$SVA_DATA=.*none is not a folder; set it to one that has the data"):
        paths.data_dir()
