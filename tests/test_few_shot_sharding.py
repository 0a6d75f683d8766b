"""The few-shot search on several devices and on several processes finds what it finds on one device."""

import socket
from pathlib import Path

import numpy as np
import pytest
from test_sharding import ROOT, finish, run

from sva.generation.testing import toy_lm

WORKER = ROOT / "tests" / "few_shot_worker.py"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(the model's directory, what one device finds)."""
    directory = tmp_path_factory.mktemp("few_shot")
    toy_lm().save(directory / "toy")
    return directory / "toy", searched(directory, directory / "toy", "1x1x1")


def searched(directory: Path, model: Path, mesh: str, processes: int = 1):
    """The solution and the mean accuracy of every generation."""
    out, environ = directory / f"{mesh}-{processes}.npz", {"SVA_CACHE": str(directory / "cache")}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environ |= {"SVA_COORDINATOR": f"127.0.0.1:{free.getsockname()[1]}", "SVA_PROCESSES": str(processes)}
    started = [
        run(
            WORKER,
            model,
            out,
            mesh,
            devices=8 // processes,
            **environ,
            **({"SVA_PROCESS": str(i)} if processes > 1 else {}),
        )
        for i in range(processes)
    ]
    for process in started:
        finish(process)
    with np.load(out) as found:
        return found["alphas"], found["means"]


@pytest.mark.parametrize(("mesh", "processes"), [pytest.param("2x2x2", 1, marks=pytest.mark.long), ("4x2x1", 2)])
def test_a_mesh_finds_what_one_device_finds(alone, tmp_path, mesh, processes):
    model, (alphas, means) = alone
    found, told = searched(tmp_path, model, mesh, processes)
    np.testing.assert_allclose(told, means)
    np.testing.assert_allclose(found, alphas, atol=1e-6)
