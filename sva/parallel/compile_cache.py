"""Process-wide JAX settings, made by commands and never by an import."""

import jax

from sva.utils.paths import compiled_dir


def start() -> None:
    """Keeps compiled programs (`compiled_dir`), so that the next process does not compile them again."""
    jax.config.update("jax_compilation_cache_dir", compiled_dir())
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
