import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_server_on_a_mesh_answers_as_on_one_device(toy, tmp_path):
    toy.save(tmp_path / "toy")
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(Path(__file__).with_name("serving_mesh_worker.py")), str(tmp_path / "toy")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-2000:]
    alone, together = json.loads(run.stdout.splitlines()[-1])
    assert together == alone
    assert len(alone[2]) == 3
