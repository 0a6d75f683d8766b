"""Settings are read and checked before JAX is imported."""

import subprocess
import sys

import pytest

from sva.adapters import spelling
from sva.spectral.parametrisations import EXAMPLES, Diagonal
from sva.training import advantages
from sva.training.config.reinforce import BASELINES

PROGRAM = """
import sys
from sva.training import config
from sva.utils.errors import UserError

try:
    config.load(overrides=[sys.argv[1]])
except UserError as error:
    print(error)
print(*(name for name in ("jax", "jaxlib", "flax", "optax", "torch", "transformers") if name in sys.modules))
"""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("train.stepz=1", "train.stepz=1: unknown setting 'train.stepz' (did you mean train.steps"),
        ("parametrisation=linea", "unknown parametrisation 'linea'"),
        ("rollout.temperature=1e-9", "rollout.temperature=1e-09 must be a finite number"),
        ("evolution.strategy=cem2", "evolution.strategy='cem2' is not known"),
        ("seed=-1", "seed=-1 is not a seed"),
    ],
)
def test_a_wrong_setting_is_told_before_jax_is_imported(given, said):
    done = subprocess.run([sys.executable, "-c", PROGRAM, given], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(said), done.stdout + done.stderr
    assert done.stdout.endswith("\n\n"), f"imported: {done.stdout.splitlines()[-1]}"


def test_names_that_settings_know_are_those_that_exist():
    assert tuple(advantages.BASELINES) == BASELINES
    assert tuple(map(str, EXAMPLES)) == tuple(map(str, spelling.EXAMPLES.values()))
    assert tuple(example.name for example in EXAMPLES if isinstance(example, Diagonal)) == spelling.DIAGONAL
