"""Run as a process of its own, with several host devices: the toy model's two passes on a mesh, and what came out.

python tests/two_pass_worker.py OUTPUT.npz DATAxFSDPxTENSOR
"""

import contextlib
import sys

import jax
import numpy as np
from mesh_worker import on_mesh

from sva.adaptation import two_pass as adapt
from sva.adaptation.adaptive_lm import adaptive
from sva.adaptation.dispatchers import Blend
from sva.generation.sampling import Greedy
from sva.generation.testing import THINGS
from sva.parallel import sharding
from sva.parallel.mesh_config import MeshConfig
from sva.parallel.processes import is_writer, start, to_host
from sva.spectral.expert import Expert

QUESTIONS = [f"what colour the {thing} of the {other} ?" for thing, other in zip(THINGS[:8], THINGS[4:], strict=True)]
NEW = 8


def main(output, name):
    start()
    mesh = sharding.make_mesh(MeshConfig(*map(int, name.split("x"))))
    with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
        lm, spectra = on_mesh(mesh)
        lm.spectra.update(spectra)  # a toy has no checkpoint for several processes to decompose
        experts = []
        for seed, label in enumerate(("colour", "thing")):
            rng = np.random.default_rng(seed)
            raw = {name: rng.uniform(0.3, 1.7, x.s.shape).astype(np.float32) for name, x in sorted(spectra.items())}
            experts.append(Expert(raw, "linear", {"label": label, "description": f"a {label}"}))
        model = adaptive(lm, experts, progress=False)
        # Two rows are scored, two generate a label, one draws it, three are told it: all experts are at work.
        members = tuple(model.by(kind).dispatcher for kind in ("prompt", "generated", "random", "oracle"))
        own = jax.nn.one_hot(np.array([0, 0, 1, 1, 2, 3, 3, 3]), 4)
        rows = model.rows(QUESTIONS, ["other"] * 5 + ["colour", "thing", "other"])
        keys = jax.random.split(jax.random.key(0), len(QUESTIONS))
        limit, eos = np.int32(NEW), np.full(4, -1, np.int32)
        request = adapt.Request(rows.prompts, limit, eos, keys, max_new_tokens=NEW, sampling=Greedy())
        out = to_host(adapt.two_pass(model.served, Blend(members, own), rows, request))
    if is_writer():
        found = {"probs": out.decision.probs, "alphas": out.decision.alphas, "tokens": out.generation.tokens}
        np.savez(output, **found, logprobs=out.generation.logprobs)


if __name__ == "__main__":
    main(*sys.argv[1:])
