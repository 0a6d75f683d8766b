"""Several processes as one run: how they find each other, what each brings, and how they end.

Every process runs the same command. JAX's own runtime connects them (`jax.distributed`); nothing here sends a byte.
"""

import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from sva.utils.errors import TransientError, UserError

BY_HAND = ("SVA_COORDINATOR", "SVA_PROCESSES", "SVA_PROCESS")
HEARTBEAT = 60  # seconds without a sign of life after which a process counts as lost
LATEST = 1800  # seconds after which the others must have started: after a preemption a host may come late


def start(environ: Mapping[str, str] = os.environ) -> None:
    """Joins the other processes of this run where the environment tells of any; must come before JAX's first device.

    `SVA_COORDINATOR` (host:port of process 0), `SVA_PROCESSES` (how many) and `SVA_PROCESS` (which one this is) say it
    by hand. Without them JAX finds out by itself under SLURM (a step of more than one task), on GKE (more than one TPU
    worker) and, where `SVA_DISTRIBUTED=1`, on whatever else it knows, such as the workers of a Cloud TPU VM.

    Raises:
      UserError: some of the three are missing or no numbers, or JAX knows of no others.
      TransientError: the others were not found in time.
    """
    if not is_one_of_several(environ):
        return
    given = {name: environ[name] for name in BY_HAND if name in environ}
    settings: dict[str, Any] = {}
    if given:
        missing = [name for name in BY_HAND if name not in given]
        if missing:
            raise UserError(
                f"{', '.join(given)} set, but not {', '.join(missing)}; a run of several processes needs all"
            )
        if not (given["SVA_PROCESSES"].isdecimal() and given["SVA_PROCESS"].isdecimal()):
            raise UserError(
                f"SVA_PROCESSES={given['SVA_PROCESSES']} and SVA_PROCESS={given['SVA_PROCESS']} must be whole numbers"
            )
        count, index = int(given["SVA_PROCESSES"]), int(given["SVA_PROCESS"])
        if index >= count:
            raise UserError(f"SVA_PROCESS={index} does not exist: SVA_PROCESSES={count} count from 0 to {count - 1}")
        settings = {
            "coordinator_address": given["SVA_COORDINATOR"],
            "num_processes": count,
            "process_id": index,
            "cluster_detection_method": "deactivate",
        }
    on_sigterm = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    try:
        jax.distributed.initialize(**settings, initialization_timeout=LATEST, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        kind = TransientError if isinstance(error, RuntimeError) else UserError
        raise kind(f"the other processes of this run were not found: {str(error).splitlines()[0]}") from error
    # JAX has put a handler there that only sets a flag: a process that is told to end would not.
    signal.signal(signal.SIGTERM, on_sigterm)


def is_one_of_several(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment tells of other processes of this run, by hand or by a cluster's own means."""
    return any(name in environ for name in BY_HAND) or is_cluster(environ)


def is_cluster(environ: Mapping[str, str]) -> bool:
    """Whether the environment is that of one process among several which JAX can find by itself."""
    in_step = "SLURM_PROCID" in environ and "SLURM_STEP_NODELIST" in environ
    return (
        environ.get("SVA_DISTRIBUTED") == "1"
        or (in_step and int(environ.get("SLURM_NTASKS", "1")) > 1)
        or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
    )


def is_writer() -> bool:
    """Whether this process writes what the run leaves behind: process 0 does."""
    return jax.process_index() == 0


def to_host(tree: Any) -> Any:
    """The tree as whole host arrays, on every process."""

    def one(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            if x.is_fully_replicated:
                return np.asarray(x.addressable_data(0))
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(one, tree)


def broadcast_from_process_0(values: np.ndarray) -> np.ndarray:
    """Process 0's array, on every process: what one host alone decided, such as a verdict that hit a time limit."""
    return values if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(values))


def is_loss(error: Exception) -> bool:
    """Whether an error of JAX's runtime is that of a process that waits for one which is gone."""
    return jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError)


def lost(error: Exception) -> NoReturn:
    """Ends this process, because another one of the run is gone: one line, exit code 1.

    At once, without Python's own clearing up, which would wait for the lost one.
    """
    reason = str(error).splitlines()[0][:200]
    print(
        f"sva: process {jax.process_index()} of {jax.process_count()} ends, because another one was lost ({reason}); "
        "start the same command again, on as many hosts as there are: the run resumes after its last saved step",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
