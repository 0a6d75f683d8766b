"""Settings of every test: JAX is strict about rank, compilers work little, and what they made is kept between runs."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import jax
import pytest
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

# Most of a test's time is LLVM's, over programs that run for milliseconds: no optimisation, and loops without MLIR.
# What JAX traces and the passes over the whole program stay as users have them. Child processes inherit the flags.
XLA_FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()


# Compiled programs, shared by all workers and their child processes. JAX reads these when it is imported, as they do.
_CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
_CACHE_SIZE = 2**30  # JAX's own limit would read every entry at every new one


def pytest_configure(config: pytest.Config) -> None:
    jax.config.update("jax_numpy_rank_promotion", "raise")
    directory = config.cache.mkdir("jax")
    os.environ.update(_CACHE | {"JAX_COMPILATION_CACHE_DIR": str(directory)})
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if not hasattr(config, "workerinput"):
        _keep_newest(directory, _CACHE_SIZE)


def _keep_newest(directory: Path, size: int) -> None:
    """Removes the oldest files beyond so many bytes; called before there are workers that read them."""
    for file in sorted(directory.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True):
        size -= file.stat().st_size
        if size < 0:
            file.unlink()


_MAPS = 20_000  # of the 65,530 memory maps that Linux gives a process; a compiled program takes several


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module() -> Iterator[None]:
    """Compiled programs go when there are many: a worker that keeps all of them runs out of maps, and crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > _MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Grows by the name of every function that XLA is asked for meanwhile, compiled anew or kept on disk."""
    names: list[str] = []

    def listen(event: str, _: float, **about: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """`sva.generation.testing.toy_lm()`, and a cache directory of the module's own."""
    from sva.generation.testing import toy_lm

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield toy_lm()


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Path]:
    """The folder in which gs://bucket lies for etils.epath while the test runs: no network, and no gcsfs."""

    class Folder(LocalFileSystem):
        protocol = ("gs", "gcs")
        cachable = False

        def __init__(self, **_: object) -> None:
            super().__init__(auto_mkdir=True)

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(tmp_path / str(path).removeprefix("gs://").removeprefix(f"{tmp_path}/"))

    fsspec.register_implementation("gcs", Folder, clobber=True)
    backend.fsspec_backend._get_filesystem.cache_clear()
    yield tmp_path / "bucket"
    backend.fsspec_backend._get_filesystem.cache_clear()
    _registry.pop("gcs")
