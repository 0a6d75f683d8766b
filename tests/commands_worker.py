"""Run as a process of its own, with several host devices: every command that takes a mesh, one after another.

python tests/commands_worker.py DIRECTORY commands|runs [MESH]    MESH as --mesh takes it; without it, one device
python tests/commands_worker.py DIRECTORY refused                 what two processes say of runs that cannot begin

DIRECTORY holds what `tests/test_meshes.py` puts there; the results go there too.
"""

import contextlib
import io
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from sva.cli.main import main as sva
from sva.evaluation import evaluate as evaluation
from sva.generation import load
from sva.generation.decompose import decompose
from sva.parallel import compile_cache, exchange, mesh_config, processes, sharding
from sva.spectral.forms import Factored
from sva.tasks import task
from sva.training import config
from sva.training import run as runs
from sva.utils.errors import UserError
from sva.utils.files import locked

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
EXPERTS = ["--expert", "island.safetensors", "--expert", "thing.safetensors"]
EVALUATE = ["evaluate", "colours.py", "--size", "12", "--batch-size", "8"]
ADAPT = ["adapt", "colours.py", "--shots", "3", "--population", "10", "--iterations", "2", "--rows", "16", *EXPERTS]
GENERATE = ["generate", "--file", "prompts.txt", "--rows", "8", "--max-new-tokens", "10"]

COMMANDS = {  # by the name of the result
    "merged.jsonl": [*EVALUATE, *EXPERTS[:2]],
    "refilled.jsonl": [*EVALUATE, "--max-new-tokens", "64"],
    "likelihood.jsonl": [*EVALUATE, "--by", "likelihood"],
    "two_pass.jsonl": [*EVALUATE, *EXPERTS],
    "classifier.jsonl": [*EVALUATE, *EXPERTS, "--classifier", "classifier.safetensors"],
    "generated.jsonl": [*EVALUATE, *EXPERTS, "--dispatch", "generated"],
    "embedding.jsonl": [*EVALUATE, *EXPERTS, "--dispatch", "embedding"],
    "cem.json": ADAPT,
    "gradient.json": [*ADAPT, "--method", "gradient", "--per-matrix"],
    "vote.json": [*ADAPT, "--method", "vote"],
    "alphas.jsonl": [*GENERATE, *EXPERTS, "--alphas", "cem.json"],
    "sampled.jsonl": [*GENERATE, "--temperature", "1", "--samples", "2", "--stop", "lamp"],
    "mixed.jsonl": [*GENERATE, *EXPERTS],
}
AGAIN = ("merged.jsonl", "cem.json", "sampled.jsonl")  # asked for once more, when nothing is left to do
REFUSED = {  # what is told on 8 devices before a model is loaded
    "--batch-size=6 does not divide over mesh.data x mesh.fsdp = 8; make it a multiple of 8": [
        *EVALUATE, "--batch-size", "6", "--mesh", "data=4,fsdp=2"
    ],
    "--rows=6 does not divide": [*GENERATE, "--rows", "6", "--mesh", "data=8"],
    "--rows=20 does not divide": [*ADAPT, "--rows", "20", "--mesh", "fsdp=-1"],
    "makes 6 devices, but there are 8": [*GENERATE, "--mesh", "data=3,fsdp=2"],
    "--dtype int8 is for one device": [*EVALUATE, "--dtype", "int8", "--mesh", "tensor=8"],
}  # fmt: skip
RUNS = {  # by run_dir
    f"{form}-{kl}": [f"rollout.form={form}", f"reinforce.kl_coef={kl}"]
    for form in ("dense", "factored")
    for kl in (0.0, 0.1)
}


def run_commands(mesh):
    more = ["--model", "toy", *(["--mesh", mesh] if mesh else [])]
    for out, words in COMMANDS.items():
        assert sva([*words, *more, "--out", out]) == 0, words
    for out in AGAIN:
        assert sva([*COMMANDS[out], *more, "--out", out]) == 0, out
    if mesh:
        check_refusals()
        check_factored(mesh)
    if jax.process_count() > 1:
        check_exchange()


def check_factored(mesh):
    """A factored product is the same rows in the same places, however many rows and tokens there are."""
    with sharding.on_mesh(mesh_config.parse(mesh)) as on:
        lm = load.load("toy", mesh=on, progress=False)
        spectra = decompose(lm, "mlp", progress=False)
        for name, axis in ((UP, None), (DOWN, "mlp")):
            spectrum = spectra[name]
            for rows, length in ((4, 6), (8, 6), (16, 6), (8, 1)):
                rng = np.random.default_rng(rows)
                x, z = (
                    rng.normal(size=(rows, n)).astype("f4") for n in (length * spectrum.vt.shape[1], len(spectrum.s))
                )
                x = x.reshape(rows, length, -1)
                found = processes.to_host(_product(spectrum, x, z, axis))
                u, s, vt = processes.to_host(spectrum)
                np.testing.assert_allclose(found, (x @ vt.T) * (s * z)[:, None] @ u.T, atol=1e-3)


@partial(jax.jit, static_argnames=("axis",))
def _product(spectrum, x, z, axis):
    return Factored(spectrum, z)(sharding.constrain(x, "batch", None, axis), None)


def check_refusals():
    real, load.load = load.load, None
    for told, words in REFUSED.items():
        refused([*words, "--model", "toy"], told)
    load.load = real


def check_exchange():
    """What one process brings reaches all, and so does its failure."""
    index = jax.process_index()
    assert exchange.gather(lambda: {"text": "é" * 2000 * index}) == [{"text": ""}, {"text": "é" * 2000}]
    assert exchange.from_process_0(lambda: [index]) == [0]
    assert exchange.divided(5, lambda places: [[place, index] for place in places]) == [[i, i % 2] for i in range(5)]
    assert exchange.divided(1, lambda places: [index for _ in places]) == [0]
    with pytest.raises(UserError, match="the grader"):
        exchange.divided(4, lambda places: fail(UserError("the grader")) if index else places)
    with pytest.raises(ZeroDivisionError if index else UserError, match="x" if index else "1: ZeroDivisionError: x"):
        exchange.gather(lambda: fail(ZeroDivisionError("x")) if index else None)
    with pytest.raises(UserError, match=r"process 1 does other work than process 0 \(n: 0 there, 1 on process 1\)"):
        exchange.require_same({"n": index})


def fail(error):
    raise error


def check_refused(_):
    """What one process alone sees ends the training of both, before a model is loaded."""
    index, words = jax.process_index(), ["train", "train.yaml", "task=colours.py", "mesh.data=-1"]
    runs.load = None
    refused([*words, f"seed={index}", "run_dir=seeds"], "seed: 0 there, 1 on process 1")
    old = config.load("train.yaml", [*words[2:], "run_dir=old", "train.lr=0.5"])
    exchange.from_process_0(lambda: write(Path("old/config.yaml"), config.to_yaml(old)))
    refused([*words, "run_dir=old"], "old holds a run of other settings (train.lr: 0.5 there")
    with contextlib.ExitStack() as stack:
        exchange.from_process_0(lambda: stack.enter_context(locked(Path("busy"), Path("busy/.lock"), "")))
        refused([*words, "run_dir=busy"], "another process trains in busy")
    check_answers()
    if index:
        os.chdir("elsewhere")
    refused([*words, "run_dir=files"], "rows of train: ")


def check_answers():
    """Where process 0 answers the held-out prompts anew, so do the others, whose devices it needs."""
    asked, held_out = [], evaluation.items(task("colours.py"), "test", 3)

    def evaluate(_, items, **__):
        asked.append([evaluation.Record(item.task.name, item.question, "red", None, False, 1) for item in items])
        return asked[-1]

    evaluation.evaluate = evaluate
    run = SimpleNamespace(config=config.Config(), directory=Path(), held_out=held_out, progress=False)
    exchange.from_process_0(
        lambda: evaluation.kept(Path("before.jsonl"), held_out[:2], lambda: evaluate(None, held_out[:2]))
    )
    asked.clear()
    for _ in range(2):
        runs._answers(run, None, "before.jsonl", "")
    assert len(asked) == 1


def write(path, text):
    path.parent.mkdir()
    path.write_text(text)


def refused(words, told):
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        assert sva(words) == 2, words
    assert told in shown.getvalue(), shown.getvalue()


def run_training(mesh):
    sizes = str(mesh_config.parse(mesh)).split(" x ") if mesh else []
    for run_dir, settings in RUNS.items():
        words = ["train", "train.yaml", "model=toy", "task=colours.py", *settings, *sizes, f"run_dir={run_dir}"]
        assert sva(words) == 0, settings


def main(directory, what, mesh=""):
    processes.start()
    for name in processes.BY_HAND:  # a process that has found the others does not look for them again
        os.environ.pop(name, None)
    compile_cache.start = lambda: None  # the tests' own stays
    os.chdir(directory)
    {"commands": run_commands, "runs": run_training, "refused": check_refused}[what](mesh)


if __name__ == "__main__":
    main(*sys.argv[1:])
