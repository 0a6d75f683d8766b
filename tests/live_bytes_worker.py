"""Run as a process of its own, with several host devices: what a run holds on one of them, beside what is reported.

python tests/live_bytes_worker.py DIRECTORY FORM:SCAN:DATAxFSDPxTENSOR ...   prints {argument: [held, reported]} bytes
"""

import contextlib
import dataclasses
import gc
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sva
from sva.cli.aot import report as ahead
from sva.generation.testing import NameAColour, tokenizer, toy_config
from sva.models.transformer import Transformer
from sva.models.weights import expected
from sva.parallel.mesh_config import MeshConfig
from sva.parallel.sharding import make_mesh
from sva.training.config import Config
from sva.training.config.reinforce import ReinforceConfig
from sva.training.config.rollout import RolloutConfig
from sva.training.config.train import TrainConfig
from sva.training.loop import fit

# Wide enough that what a step leaves behind, a few numbers, is little beside the weights.
WIDE = dataclasses.replace(
    toy_config(), hidden_size=128, intermediate_size=192, num_layers=4, head_dim=32, windows=(0,) * 4
)


def save(directory):
    rng = np.random.default_rng(0)
    named = {
        name: jnp.asarray(rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[-1]), jnp.float32)
        for name, leaf in expected(WIDE).items()
    }
    model = Transformer(WIDE)
    sva.LM(model, model.nest(named), tokenizer(), "wide").save(directory)


def on_one_device():
    """Bytes of all live arrays on the first device; several views of one buffer count once."""
    gc.collect()
    first = jax.devices()[0]
    shards = [shard for x in jax.live_arrays() for shard in x.addressable_shards if shard.device == first]
    return sum({shard.data.unsafe_buffer_pointer(): shard.data.nbytes for shard in shards}.values())


def compared(directory, form, scan, axes):
    sizes = MeshConfig(*map(int, axes.split("x")))
    config = Config(
        model=str(directory / "wide"),
        rollout=RolloutConfig(prompts=8, samples=2, max_new_tokens=8, rows=8, form=form),
        reinforce=ReinforceConfig(kl_coef=0.1),
        train=TrainConfig(steps=2, micro_batch=8),
        mesh=sizes,
        scan_layers=str(scan).lower(),
    )
    mesh, held = make_mesh(sizes), []
    with jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext():
        without = "mlp" if form == "factored" else None
        on = mesh if mesh.size > 1 else None
        lm = sva.load(config.model, scan_layers=scan, mesh=on, without=without, progress=False)
        spectra = sva.decompose(lm, "mlp", progress=False)
        run_dir = directory / f"{form}-{scan}-{axes}"
        fit(lm, spectra, NameAColour(), run_dir, config, on_step=lambda _: held.append(on_one_device()))
    result = ahead.report(config, jax.devices()[: mesh.size], hbm_gib=1, prompt_tokens=31, programs=())
    return held[-1], sum(result["run"]["resident"].values())


def main(directory, *settings):
    save(Path(directory) / "wide")
    found = {}
    for each in settings:
        form, scan, axes = each.split(":")
        found[each] = compared(Path(directory), form, scan == "scan", axes)
        gc.collect()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
