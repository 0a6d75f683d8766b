import json
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import threadpoolctl

from sva.spectral import store
from sva.spectral.store import Source
from sva.spectral.svd import reconstruction_error
from sva.utils.errors import UserError


def weight(out, into, seed=0):
    return np.random.default_rng(seed).standard_normal((out, into)).astype(np.float32)


def counted(weights):
    """Sources of the weights, and the list that each reading adds its name to."""
    calls = []

    def source(name, w):
        return Source(w.shape, lambda: calls.append(name) or w)

    return {name: source(name, w) for name, w in weights.items()}, calls


def decompose(sources, directory, fingerprint="f1", **settings):
    return store.decompose(sources, fingerprint, directory, progress=False, **settings)


@pytest.mark.parametrize("damage", ["flip", "truncate", "foreign", "format", "empty", "renamed", "dtype", "header"])
def test_damaged_or_foreign_spectra_are_said_in_one_line_and_only_they_are_made_again(tmp_path, capsys, damage):
    sources, calls = counted({"a": weight(8, 6), "b": weight(8, 6, 1)})
    first = decompose(sources, tmp_path)
    decompose(sources, tmp_path)
    assert sorted(calls) == ["a", "b"]
    calls.clear()
    path = tmp_path / "a.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    elif damage == "truncate":
        data = data[:-9]
    elif damage == "empty":
        data = b""
    elif damage == "format":  # as an earlier version of sva wrote
        data = data.replace(store.FORMAT.encode(), b"sva-spectrum-1")
    elif damage == "renamed":
        data = data.replace(rb"\"name\": \"a\"", rb"\"name\": \"c\"")
    elif damage == "header":
        data = data.replace(rb"\"sha256\"", rb"\"sha257\"")
    elif damage == "dtype":
        data = data.replace(rb"\"weights\": \"float32\"", rb"\"weights\": \"float64\"")
    path.write_bytes(data)
    fingerprint = "f2" if damage == "foreign" else "f1"
    again = decompose(sources, tmp_path, fingerprint)
    assert sorted(calls) == (["a", "b"] if damage == "foreign" else ["a"])
    (line,) = capsys.readouterr().err.splitlines()  # one for all files that have the same fault
    assert "decomposing again" in line
    assert ("a.safetensors and 1 more" in line) == (damage == "foreign")
    for one, two in zip(first["a"], again["a"], strict=True):
        np.testing.assert_array_equal(one, two)
    calls.clear()
    decompose(sources, tmp_path, fingerprint)
    assert calls == []  # what was made again is kept


def test_the_manifest_tells_of_every_matrix_what_was_measured(tmp_path):
    weights = {"a": weight(8, 6), "b": weight(5, 9)}
    spectra = decompose(counted(weights)[0], tmp_path)
    manifest = json.loads((tmp_path / store.MANIFEST).read_text())
    assert manifest["format"] == store.FORMAT
    for record in manifest["spectra"]:
        w, spectrum = weights[record["name"]], spectra[record["name"]]
        assert record["fingerprint"] == "f1"
        assert record["shape"] == list(w.shape)
        assert record["rank"] == record["full_rank"] == min(w.shape)
        assert record["relative_error"] == reconstruction_error(w, spectrum) < 1e-6
        assert 0 < record["u_error"] < 1e-6
        assert 0 < record["v_error"] < 1e-6
        assert record["dropped"] == record["largest_dropped"] == 0


def test_a_truncated_spectrum_is_stored_with_what_it_lacks(tmp_path):
    sources, calls = counted({"a": weight(8, 6), "b": weight(2, 3)})
    whole = decompose(sources, tmp_path / "whole")
    spectra = decompose(sources, tmp_path / "cut", rank=4)
    assert [len(spectra[name].s) for name in "ab"] == [4, 2]
    cut, small = json.loads((tmp_path / "cut" / store.MANIFEST).read_text())["spectra"]
    s = whole["a"].s
    assert cut["relative_error"] == pytest.approx(np.linalg.norm(s[4:]) / np.linalg.norm(s), rel=1e-5)
    assert cut["dropped"] == pytest.approx(cut["relative_error"], rel=1e-6)
    assert cut["largest_dropped"] == s[4]
    assert (cut["rank"], cut["full_rank"], small["dropped"]) == (4, 6, 0)
    calls.clear()
    decompose(sources, tmp_path / "cut", rank=4)
    assert calls == []
    decompose(sources, tmp_path / "cut", rank=3)  # another rank is another cache
    assert sorted(calls) == ["a", "b"]
    with pytest.raises(UserError, match="rank=0 must be at least 1"):
        decompose(sources, tmp_path, rank=0)


def test_a_weight_with_nan_is_named_and_the_others_are_kept(tmp_path):
    sources, calls = counted({"a": weight(4, 4), "b.c": np.full((2, 2), np.nan)})
    with pytest.raises(UserError, match=r"^b\.c: .*NaN"):
        decompose(sources, tmp_path)
    assert (tmp_path / "a.safetensors").exists()


def test_small_matrices_run_side_by_side_on_one_thread_and_large_ones_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "LARGE", 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(2))
    lock, now, most, threads = threading.Lock(), [0], {True: 0, False: 0}, {True: set(), False: set()}
    make = store._make

    def watched(source, *args):
        large = min(source.shape) >= 16
        with lock:
            now[0] += 1
            most[large] = max(most[large], now[0])
        threads[large] |= {
            pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"
        }
        try:
            return make(source, *args)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(store, "_make", watched)
    sizes = [8, 20] * 6
    decompose(counted({str(i): weight(size, 30, i) for i, size in enumerate(sizes)})[0], tmp_path)
    assert most[True] == 1
    assert most[False] == 2
    assert threads[False] == {1}
    assert max(threads[True]) <= 2


def test_no_more_matrices_are_held_than_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(2))
    sources, calls = counted({str(i): weight(4, 6, i) for i in range(9)})
    given = 0
    for _ in store.stream(sources, "f1", tmp_path, progress=False):
        given += 1
        assert len(calls) <= given + 2
    assert given == 9


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from sva.utils import files
from sva.spectral import store

directory, point, left = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def count_down():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def read(i):
    if point == "read":
        count_down()
    return np.random.default_rng(i).standard_normal((12, 20)).astype(np.float32)

replace = os.replace
def replacing(*args):
    if point == "before rename":
        count_down()
    replace(*args)
    if point == "after rename":
        count_down()
os.replace = replacing

store.decompose(
    {str(i): store.Source((12, 20), lambda i=i: read(i)) for i in range(8)}, "f1", directory, progress=False
)
"""


@pytest.mark.parametrize(
    ("point", "count"),
    [("read", 4), ("before rename", 1), ("before rename", 5), ("after rename", 3), ("after rename", 8)],
)
def test_killed_anywhere_it_goes_on_without_redoing_finished_matrices(tmp_path, monkeypatch, point, count):
    child = subprocess.run([sys.executable, "-c", KILLED, tmp_path, point, str(count)], timeout=120)
    assert child.returncode == -signal.SIGKILL
    finished = {path.stem for path in tmp_path.glob("*.safetensors") if not path.name.startswith(".")}
    assert 0 <= len(finished) <= 8
    if point == "after rename":
        assert len(finished) >= count
    left_behind = list(tmp_path.glob(".*.safetensors.*"))
    assert left_behind or point != "before rename"
    for path in left_behind:  # an hour later
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 3600))
    sources, calls = counted({str(i): weight(12, 20, i) for i in range(8)})
    spectra = decompose(sources, tmp_path)
    assert set(calls) == set(sources) - finished
    assert len(calls) == len(set(calls))
    assert all(reconstruction_error(sources[name].read(), spectrum) < 1e-6 for name, spectrum in spectra.items())
    assert not list(tmp_path.glob(".*.safetensors.*"))
    assert len(json.loads((tmp_path / store.MANIFEST).read_text())["spectra"]) == 8
