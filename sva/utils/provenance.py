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
    """The running command with its arguments, as it is given at the root of a checkout."""
    return " ".join([_program(), *sys.argv[1:]])


def _program() -> str:
    """`sva`, `python -m MODULE`, `python SCRIPT` of a checkout, or a program's name alone."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        module = spec.name.removesuffix(".__main__")
        return "sva" if module in ("sva.cli", "sva.cli.main") else f"python -m {module}"
    path, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[2]
    inside = path.relative_to(root) if path.is_relative_to(root) else None
    return f"python {inside}" if inside is not None and inside.suffix == ".py" else path.name
