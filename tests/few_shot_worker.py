"""Run as a process of its own, with several host devices: a few-shot search on a mesh, and what it found.

python tests/few_shot_worker.py MODEL OUTPUT.npz DATAxFSDPxTENSOR
"""

import contextlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

import sva
from sva.adaptation import few_shot
from sva.adaptation.few_shot import FewShotConfig, Shots
from sva.generation.testing import NameAColour
from sva.parallel import sharding
from sva.parallel.mesh_config import MeshConfig
from sva.parallel.processes import is_writer, start
from sva.training.search import CEM


def experts(shapes):
    """Three experts that change what the toy model says."""
    found = []
    for seed in (1, 2, 3):
        rng = np.random.default_rng(seed)
        raw = {name: rng.uniform(0.2, 1.8, size).astype(np.float32) for name, size in shapes.items()}
        found.append(sva.Expert(raw))
    return found


def main(model, output, mesh_name):
    start()
    mesh = sharding.make_mesh(MeshConfig(*map(int, mesh_name.split("x"))))
    with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
        lm = sva.load(model, mesh=mesh if mesh.size > 1 else None, progress=False)
        spectra = sva.decompose(lm, "mlp", progress=False)
        made = experts({name: len(spectrum.s) for name, spectrum in spectra.items()})
        pool = few_shot.pool(lm, made, progress=False)
        task, search = NameAColour(), CEM(population=8, elite_ratio=0.25)
        shots, cfg = Shots(task, tuple(task.source("validation")[:6])), FewShotConfig(rows=20)
        begin = search.init(jnp.zeros(3))
        steps = list(few_shot.adapt(lm, pool, shots, search, cfg, jax.random.key(0), state=begin, generations=3))
    if is_writer():
        np.savez(output, alphas=[step.alphas for step in steps], means=[step.row["mean"] for step in steps])


if __name__ == "__main__":
    main(*sys.argv[1:])
