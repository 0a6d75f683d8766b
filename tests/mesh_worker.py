"""Run as a process of its own, with several host devices: trains the toy model on meshes, and saves what came out.

python tests/mesh_worker.py RUN_DIR OUTPUT.npz STEPS:DATAxFSDPxTENSOR ...    each goes on where the last one stopped
"""

import contextlib
import sys
from pathlib import Path

import jax
import numpy as np

import sva
from sva.generation.testing import NameAColour, toy_lm
from sva.models import layout
from sva.parallel import sharding
from sva.parallel.mesh_config import MeshConfig
from sva.parallel.processes import is_loss, is_writer, lost, start, to_host
from sva.spectral.parametrisations import LINEAR
from sva.training.config.reinforce import ReinforceConfig
from sva.training.config.rollout import RolloutConfig
from sva.training.config.train import TrainConfig
from sva.training.loop import fit


def on_mesh(mesh):
    """The toy model and its spectra on a mesh."""
    lm = toy_lm()
    spectra = sva.decompose(lm, "mlp", progress=False)
    if mesh.size == 1:
        return lm, spectra
    params = sharding.place(jax.tree.map(np.asarray, lm.params), sharding.shardings(layout.params(lm.model), mesh))
    leaves = sharding.shardings(layout.spectra(lm.model.cfg, spectra), mesh)
    placed = sharding.place(jax.tree.map(np.asarray, spectra), leaves)
    return sva.LM(lm.model, params, lm.tokenizer, lm.name, mesh=mesh), placed


def main(run_dir, output, *stages):
    start()
    losses = []
    for stage in stages:
        steps, _, name = stage.partition(":")
        mesh = sharding.make_mesh(MeshConfig(*map(int, name.split("x"))))
        with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
            lm, spectra = on_mesh(mesh)
            state = fit(
                lm,
                spectra,
                LINEAR,
                NameAColour(),
                Path(run_dir),
                rollouts=RolloutConfig(prompts=8, samples=2, max_new_tokens=4),
                loss=ReinforceConfig(),
                cfg=TrainConfig(steps=int(steps), micro_batch=8),
                seed=0,
                on_step=lambda row: (losses.append(row["loss"]), print("step", row["step"], flush=True)),
            )
    raw = to_host(state.raw)
    if is_writer():
        np.savez(output, losses=losses, **raw)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except jax.errors.JaxRuntimeError as error:
        if not is_loss(error):
            raise
        lost(error)
