"""Settings of every test: JAX is strict about rank, and compiled functions are kept between runs."""

import jax
import pytest


def pytest_configure(config: pytest.Config) -> None:
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # A size limit makes JAX lock the directory, which several workers write to at once.
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_compilation_cache_max_size", 2**31)
