"""Where results come from: package versions and the command."""

import platform
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "sva")


def versions() -> dict[str, str]:
    """{package: version} of Python and the packages that compute: what a run's numbers depend on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def command() -> str:
    """The running command with its arguments, without the path of its program."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
