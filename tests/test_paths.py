from pathlib import Path

from sva.utils import paths


def test_data_is_looked_for_beside_the_checkout(tmp_path, monkeypatch):
    monkeypatch.delenv("SVA_DATA", raising=False)
    assert Path(paths._REPOSITORY, "pyproject.toml").is_file()
    monkeypatch.setattr(paths, "_REPOSITORY", tmp_path / "sva")
    assert paths.data_dir() is None
    (tmp_path / "shared" / "data").mkdir(parents=True)
    assert paths.data_dir() == tmp_path / "shared" / "data"
