import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
LOCKS = ("requirements.lock", "requirements-serve.lock", "requirements-test.lock")


def pins(lock: str) -> dict[str, int]:
    """{"name==version ; marker": how many hashes} of a lock file."""
    found: dict[str, int] = {}
    for line in (ROOT / lock).read_text().splitlines():
        if re.match(r"\w", line):
            pin = line.removesuffix("\\").strip()
            found[pin] = 0
        elif "--hash=sha256:" in line:
            found[pin] += 1
    return found


@pytest.mark.parametrize("lock", [*LOCKS, "requirements-torch.txt", "experiments/benchmarks/trl/requirements.txt"])
def test_no_lock_records_an_address(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert not re.search(r"://|--(extra-)?index-url|--find-links|--trusted-host| @ |/opt/|\bfile:", text)


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_is_exact_and_hashed(lock: str) -> None:
    for pin, hashes in pins(lock).items():
        assert re.match(r"[\w.-]+(\[[\w,-]+\])?==[\w.]+( ; .+)?$", pin), pin
        assert hashes > 0, pin


def test_hashes_are_those_of_all_builds_not_of_one_machine() -> None:
    counts = {pin.partition("==")[0]: hashes for pin, hashes in pins("requirements.lock").items()}
    for compiled in ("jaxlib", "numpy", "safetensors", "tokenizers", "regex", "pyyaml"):
        assert counts[compiled] >= 10, compiled


def test_torch_is_in_no_lock() -> None:
    for lock in LOCKS:
        names = {pin.partition("==")[0] for pin in pins(lock)}
        assert not names & {"torch", "triton", "tensorflow"}


def test_serving_is_the_runtime_and_more_and_the_test_environment_is_both_and_more() -> None:
    runtime, serve, test = (
        {pin.partition(" ;")[0] for pin in pins(lock)} for lock in LOCKS
    )  # wherever they are needed
    assert runtime < serve < test


def test_importing_sva_imports_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; sys.modules['tensorflow'] = None; import sva.cli.main"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


# scripts/env.py


@pytest.fixture
def env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/env.py in a checkout of its own, whose installs are only noted down, in `env.done`."""
    spec = importlib.util.spec_from_file_location("env", ROOT / "scripts" / "env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    venv = tmp_path / ".venv"
    venv.mkdir()
    for name in module.MADE_FROM["test"]:
        (tmp_path / name).write_text(name)
    for name, value in {"ROOT": tmp_path, "STAMP": venv / "stamp", "LOG": venv / "log"}.items():
        monkeypatch.setattr(module, name, value)
    done: list[str] = []
    monkeypatch.setattr(module, "done", done, raising=False)
    monkeypatch.setattr(module, "install", lambda what, *_: done.append(what))
    monkeypatch.setattr(module, "venv_version", lambda: "3.11.7")
    return module


def test_a_second_call_installs_nothing(env: ModuleType) -> None:
    env.main("runtime")
    assert len(env.done) == 2
    env.main("runtime")
    assert len(env.done) == 2


def test_the_test_environment_serves_the_demo_but_not_the_other_way(env: ModuleType) -> None:
    env.main("runtime")
    env.main("test")
    assert len(env.done) == 2 + 3
    env.main("runtime")
    assert len(env.done) == 2 + 3


def test_a_changed_lock_installs_again(env: ModuleType) -> None:
    env.main("runtime")
    (env.ROOT / "requirements.lock").write_text("numpy==9.9")
    env.main("runtime")
    assert len(env.done) == 2 + 2


def test_an_interrupted_install_is_not_taken_for_a_whole_one(env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    env.main("runtime")
    (env.ROOT / "requirements.lock").write_text("numpy==9.9")
    install = env.install

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "install", interrupt)
    with pytest.raises(KeyboardInterrupt):
        env.main("runtime")
    (env.ROOT / "requirements.lock").write_text("requirements.lock")
    monkeypatch.setattr(env, "install", install)
    env.main("runtime")
    assert len(env.done) == 2 + 2


def test_an_old_python_is_told_what_to_do(env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env.sys, "version_info", (3, 10, 13))
    with pytest.raises(SystemExit, match=r"needs Python 3\.11 or newer.*PYTHON=/path/to/python3\.12"):
        env.make_venv()


def test_a_python_without_venv_is_told_what_to_do(env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="apt-get install python3-venv"):
        env.make_venv()
