import importlib.util

import jax
import numpy as np
import pytest

from sva.cli.main import main
from sva.generation.decompose import decompose
from sva.generation.load import load
from sva.spectral import store
from sva.spectral.expert import Expert
from sva.utils import remote
from sva.utils.errors import TransientError, UserError
from sva.utils.files import write_atomically
from sva.utils.remote import Mirror, is_remote, local_directory, local_file, reading_directory, to_path


def test_addresses_and_paths_are_told_apart():
    assert str(to_path("gs://bucket/a") / "b") == "gs://bucket/a/b"
    assert is_remote(to_path("s3://bucket/a"))
    assert not is_remote(to_path("runs/a"))
    with pytest.raises(UserError, match="ftp://host/a: ftp:// is not reached; use a path or gs://, s3://, az://"):
        to_path("ftp://host/a")


def test_an_address_of_another_kind_is_one_line_of_the_command(capsys):
    with pytest.raises(SystemExit) as end:
        main(["report", "ftp://host/a"])
    assert end.value.code == 2
    assert "argument RUN: ftp://host/a: ftp:// is not reached; use a path or gs://" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_package_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match="gs://bucket/x: gcsfs is not installed, which reaches it"):
        Expert.load("gs://bucket/x")


def test_a_file_there_is_written_whole_and_read_by_a_copy(bucket):
    there = to_path("gs://bucket/a/b.txt")
    write_atomically(there, lambda path: path.write_text("hello"))
    assert (bucket / "a" / "b.txt").read_text() == "hello"
    with local_file(there) as copy:
        assert not is_remote(copy)
        assert copy.read_text() == "hello"
    assert not copy.exists()
    with local_file(to_path("gs://bucket/none")) as copy:
        assert not copy.exists()


def test_a_model_there_is_the_model_that_was_copied_there(toy, bucket, tmp_path):
    toy.save(bucket / "model")
    local, there = load(str(bucket / "model"), progress=False), load("gs://bucket/model", progress=False)
    assert there.fingerprint == local.fingerprint
    jax.tree.map(np.testing.assert_array_equal, there.params, local.params)
    assert there.tokenizer.get_vocab() == local.tokenizer.get_vocab()
    with pytest.raises(UserError, match="gs://bucket/none holds no model"):
        load("gs://bucket/none")
    with pytest.raises(UserError, match=r"gs://bucket/x.gguf: a .gguf file is read from a local disk"):
        load("gs://bucket/x.gguf")


def test_weights_that_are_cut_off_there_are_one_line(toy, bucket):
    toy.save(bucket / "model")
    file = bucket / "model" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model.safetensors has become shorter"):
        load("gs://bucket/model", progress=False)
    file.write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"model.safetensors is truncated or not a safetensors file"):
        load("gs://bucket/model", progress=False)


def test_spectra_there_are_made_once_for_all_hosts(toy, bucket, monkeypatch):
    monkeypatch.setenv("SVA_SPECTRA", "gs://bucket/spectra")
    toy.spectra.clear()
    made = decompose(toy, "mlp", progress=False)
    (directory,) = (bucket / "spectra").iterdir()
    assert {path.name for path in directory.iterdir()} == {"manifest.json", *(f"{name}.safetensors" for name in made)}
    monkeypatch.setattr(store, "svd", lambda w: 1 / 0)
    toy.spectra.clear()
    jax.tree.map(np.testing.assert_array_equal, decompose(toy, "mlp", progress=False), made)
    toy.spectra.clear()


def test_a_mirror_sends_what_changed_and_forgets_what_is_gone(bucket, tmp_path):
    mirror = Mirror(to_path("gs://bucket/run"), tmp_path / "one" / "run")
    (mirror.local / "state").mkdir()
    (mirror.local / "state" / "1").write_text("first")
    (mirror.local / "log").write_text("a")
    (mirror.local / ".lock").write_text("")
    mirror.push()
    mirror.close()
    with reading_directory(to_path("gs://bucket/run")) as copy:
        assert {path.relative_to(copy).as_posix() for path in copy.rglob("*")} == {"state", "state/1", "log"}
    again = Mirror(to_path("gs://bucket/run"), tmp_path / "two" / "run")
    (again.local / "state" / "1").unlink()
    (again.local / "state" / "2").write_text("second")
    with (again.local / "log").open("a") as log:
        log.write("b")
    again.push()
    again.close()
    assert (bucket / "run" / "log").read_text() == "ab"
    assert [path.name for path in (bucket / "run" / "state").iterdir()] == ["2"]


def test_what_a_lost_machine_had_not_listed_is_not_there(bucket, tmp_path):
    with local_directory(to_path("gs://bucket/run")) as mirror:
        (mirror.local / "a").write_text("a")
    (bucket / "run" / "half").write_text("ha")
    with reading_directory(to_path("gs://bucket/run")) as copy:
        assert [path.name for path in copy.iterdir()] == ["a"]
    (bucket / "run" / "a").unlink()
    with (
        pytest.raises(UserError, match=r"gs://bucket/run lacks files that its list .sva-files names"),
        reading_directory(to_path("gs://bucket/run")),
    ):
        pass


def test_whoever_opens_a_directory_last_owns_it(bucket, tmp_path):
    there = to_path("gs://bucket/run")
    lost = Mirror(there, tmp_path / "lost")
    new = Mirror(there, tmp_path / "new")
    (lost.local / "a").write_text("of the machine that was thought lost")
    lost.push()
    with pytest.raises(UserError, match=r"another process has taken gs://bucket/run over"):
        lost.close()
    assert not (bucket / "run" / "a").exists()
    (new.local / "a").write_text("of the new one")
    new.push()
    new.close()
    assert (bucket / "run" / "a").read_text() == "of the new one"


def test_a_bucket_that_is_lost_after_the_first_contact_is_no_mistake_of_the_users(bucket, tmp_path, monkeypatch):
    def copy(source, target):
        raise OSError("503")

    mirror = Mirror(to_path("gs://bucket/run"), tmp_path / "run")
    (mirror.local / "a").write_text("a")
    monkeypatch.setattr(remote, "_copy", copy)
    mirror.push()
    with pytest.raises(TransientError, match=r"^gs://bucket/run cannot be reached \(OSError: 503\)$"):
        mirror.push()
    mirror.close()
    monkeypatch.setattr(remote, "_read", lambda path: copy(path, path))
    with pytest.raises(UserError, match="gs://bucket/run cannot be reached"):
        Mirror(to_path("gs://bucket/run"), tmp_path / "again")


def test_errors_name_the_place_and_not_its_copy(bucket):
    with (
        pytest.raises(UserError, match="^gs://bucket/run/x is damaged$"),
        local_directory(to_path("gs://bucket/run")) as mirror,
    ):
        raise UserError(f"{mirror.local}/x is damaged")
