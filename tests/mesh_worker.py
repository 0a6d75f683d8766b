"""Run as a process of its own, with several host devices: trains the toy model on meshes, and saves what came out.

python tests/mesh_worker.py RUN_DIR OUTPUT.npz STEPS:DATAxFSDPxTENSOR[:WHERE] ...

Each goes on where the last one stopped, or is another run, in the directory WHERE below RUN_DIR.
The environment's PARAMETRISATION is what is trained; linear by default.
"""

import contextlib
import os
import sys
from pathlib import Path

import jax
import numpy as np

import sva
from sva.generation.frozen import frozen_of
from sva.generation.testing import NameAColour, toy_lm
from sva.models import layout
from sva.models.weights import expected
from sva.parallel import sharding
from sva.parallel.mesh_config import MeshConfig
from sva.parallel.processes import is_loss, is_writer, lost, start, to_host
from sva.spectral.expert import Expert
from sva.spectral.parametrisations import family
from sva.training.config import Config
from sva.training.config.rollout import RolloutConfig
from sva.training.config.train import TrainConfig
from sva.training.loop import fit
from sva.utils.trees import select

SPELLING = os.environ.get("PARAMETRISATION", "linear")


def on_mesh(mesh):
    """The toy model and its spectra on a mesh, or what stays fixed of its weights where there are none."""
    lm, member = toy_lm(), family(SPELLING)
    spectra = frozen_of(lm, member, select(expected(lm.model.cfg), "mlp"), progress=False)
    if mesh.size == 1:
        return lm, spectra
    params = sharding.place(jax.tree.map(np.asarray, lm.params), sharding.shardings(layout.params(lm.model), mesh))
    placed_lm = sva.LM(lm.model, params, lm.tokenizer, lm.name, known_fingerprint=lm.fingerprint, mesh=mesh)
    if not member.has_spectra:
        return placed_lm, frozen_of(placed_lm, member, list(spectra), progress=False)
    leaves = sharding.shardings(layout.spectra(lm.model.cfg, spectra), mesh)
    placed = sharding.place(jax.tree.map(np.asarray, spectra), leaves)
    return placed_lm, placed


def main(run_dir, output, *stages):
    start()
    losses = []
    for stage in stages:
        steps, name, *where = stage.split(":")
        mesh = sharding.make_mesh(MeshConfig(*map(int, name.split("x"))))
        with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
            lm, spectra = on_mesh(mesh)
            state = fit(
                lm,
                spectra,
                NameAColour(),
                Path(run_dir, *where),
                Config(
                    parametrisation=SPELLING,
                    rollout=RolloutConfig(prompts=8, samples=2, max_new_tokens=4),
                    train=TrainConfig(steps=int(steps), micro_batch=8),
                ),
                on_step=lambda row: (losses.append(row["loss"]), print("step", row["step"], flush=True)),
            )
    divided = [x.sharding.shard_shape(x.shape) != x.shape for x in jax.tree.leaves(state.raw)]
    raw = Expert(to_host(state.raw), SPELLING).arrays
    if is_writer():
        np.savez(output, losses=losses, divided=divided, **raw)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except jax.errors.JaxRuntimeError as error:
        if not is_loss(error):
            raise
        lost(error)
