"""Training state on disk, through orbax: small, saved every few steps, whole or not there.

Of several processes, process 0 alone writes and reads, and tells the others: what it writes are whole arrays, so that
a state written on one mesh is read on any other, by any number of processes.
"""

import errno
import os
import shutil
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from sva.parallel.processes import broadcast_from_process_0, is_writer, to_host
from sva.utils.errors import UserError
from sva.utils.files import as_os_error, disk_error

_ROOM = 1 << 20  # bytes: orbax writes many small files beside the arrays


class Checkpoints:
    """The last few states of one run; a context that saves the state it holds where an exception leaves it."""

    def __init__(self, directory: Path, settings: bytes = b"") -> None:
        """`settings` is a digest of what the run depends on, of 32 bytes; it is saved and compared with each state."""
        self._directory = directory.resolve()
        self._settings = np.frombuffer(settings.ljust(32, b"\0"), np.uint8)
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="sva")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2,
            enable_async_checkpointing=False,
            **({"multiprocessing_options": alone, "create": False} if jax.process_count() > 1 else {}),
        )
        self._held: tuple[int, Any] | None = None
        self._manager = None
        if is_writer():
            self._directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, state: Any) -> None:
        """Writes `state` (a pytree of arrays) as that step's; returns when it is on disk.

        Every process must call it.

        Raises:
          UserError: the disk is full; the states saved before are untouched.
        """
        # Host arrays take orbax half the time of a device's; of an array that spans processes all bring their parts.
        state = to_host(state)
        if self._manager is None:
            return
        # Asked first, because orbax reports a disk that fills under it from several threads, with tracebacks.
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        try:
            if shutil.disk_usage(self._directory).free < 2 * size + _ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._manager.save(step, args=ocp.args.StandardSave({"state": state, "settings": self._settings}))
        except OSError as error:
            raise disk_error(self._directory, error) from error
        except ValueError as error:
            cause = as_os_error(error, self._directory)
            if cause is None:
                raise
            raise disk_error(self._directory, cause) from error

    def hold(self, step: int, state: Any) -> None:
        """Keeps the state of a step in memory, until it is saved or another takes its place."""
        self._held = step, state

    def save_held(self) -> None:
        """Saves the state that is held, if one is."""
        if self._held is not None:
            held, self._held = self._held, None
            self.save(*held)

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """(step, state) of the latest state, in the structure of `like`; None where there is none.

        Raises:
          UserError: the state is damaged, or one of other settings.
        """
        latest = self._manager.latest_step() if self._manager is not None else None
        step = int(broadcast_from_process_0(np.asarray(-1 if latest is None else latest)))
        if step < 0:
            return None
        if jax.process_count() > 1:
            like = to_host(like)
        state = like if self._manager is None else self._read(self._manager, step, like)
        return step, jax.tree.map(broadcast_from_process_0, state)

    def _read(self, manager: ocp.CheckpointManager, step: int, like: Any) -> Any:
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, {"state": like, "settings": self._settings})
        try:
            found = manager.restore(step, args=ocp.args.StandardRestore(target))
        except Exception as error:  # orbax and tensorstore have a dozen ways to say it
            earlier = [str(number) for number in manager.all_steps() if number < step]
            after = f"from step {earlier[-1]}" if earlier else "from the start"
            raise UserError(
                f"the state of step {step} cannot be read ({type(error).__name__}): files of "
                f"{self._directory / str(step)} are missing, damaged or of another version; remove that directory, and "
                f"the same command goes on {after}"
            ) from error
        if self._settings.any() and not np.array_equal(found["settings"], self._settings):
            raise UserError(f"{self._directory} holds states of other settings; choose another run_dir or delete it")
        return found["state"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Saves the state that is held where an exception ended the run, but not of processes at different steps."""
        try:
            if kind is not None and jax.process_count() == 1:
                self.save_held()
        finally:
            self.close()

    def close(self) -> None:
        """Ends orbax's background work."""
        if self._manager is not None:
            self._manager.close()
