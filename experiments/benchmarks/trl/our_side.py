"""sva's parts of trl_step.py, through the loop that `sva train` runs."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks.trl.meter import Meter
from sva.generation import chat
from sva.generation.frozen import frozen_of
from sva.generation.load import load
from sva.models.weights import expected
from sva.spectral.parametrisations import count, family, matrix_infos
from sva.tasks.batches import batch_indices
from sva.training.config import Config
from sva.training.config import load as load_config
from sva.training.loop import fit
from sva.training.run import task_of
from sva.utils.provenance import versions
from sva.utils.trees import select

BASE = "smollm2-135m-instruct-q4_1"
SHARED = ("task=largest", "rollout.prompts=8", "rollout.samples=8", "rollout.max_new_tokens=8")
SHARED += ("reinforce.algorithm=grpo", "train.micro_batch=4", "train.remat=false", "checkpoint.every=1000")
METHODS = {
    "svf": ("parametrisation=sigmoid_nuclear", "targets=mlp", "train.lr=1e-2"),
    "lora": ("parametrisation=lora:r=16,alpha=32", "targets=all", "train.lr=1e-3"),
}


def config_of(method: str, directory: Path, steps: int) -> Config:
    """The settings of so many updates and one more rollout."""
    about = (f"model={directory / 'checkpoint'}", f"run_dir={directory / 'run'}", f"train.steps={steps + 1}")
    return load_config(None, (*SHARED, *METHODS[method], *about))


def prepare(directory: Path, steps: int, base: str = BASE) -> None:
    """Writes checkpoint/ and prompts.json: the prompts of every step, with token ids; keeps the spectra."""
    load(base, progress=False).save(directory / "checkpoint")
    config = config_of("svf", directory, steps)
    lm, task = load(config.model, progress=False), task_of(config)
    source = task.source("train")
    indices = [
        i for step in range(steps) for i in batch_indices(len(source), config.rollout.prompts, step, config.seed)
    ]
    texts = [chat.render_example(lm, task, source[i]) for i in indices]
    rows = zip(texts, chat.tokenize(lm, texts), indices, strict=True)
    prompts = [{"text": str(text), "ids": ids, "example": dict(source[i])} for text, ids, i in rows]
    (directory / "prompts.json").write_text(json.dumps(prompts))
    frozen_of(lm, family(config.parametrisation), select(expected(lm.model.cfg), config.targets), progress=False)


def measure(method: str, directory: Path, steps: int) -> dict[str, Any]:
    """Seconds and rewards of every step, peak of memory, number of trained parameters."""
    config = config_of(method, directory, steps)
    lm, task, member = load(config.model, progress=False), task_of(config), family(config.parametrisation)
    spectra = frozen_of(lm, member, select(expected(lm.model.cfg), config.targets), seed=config.seed, progress=False)
    run_dir = directory / f"run-{time.time_ns()}"
    run_dir.mkdir()
    meter = Meter()
    fit(lm, spectra, task, run_dir, config, on_step=lambda row: meter.step(row["reward"]))
    settings = dataclasses.asdict(config) | {"model": BASE, "run_dir": ""}
    about = {"parameters": count(member, matrix_infos(spectra)), "versions": versions(), "config": settings}
    return meter.result() | about


def main(directory: Path) -> None:
    job = json.loads((directory / "job.json").read_text())
    if job["part"] == "prepare":
        prepare(directory, job["steps"])
        found = {}
    else:
        found = measure(job["part"].removeprefix("short-"), directory, job["steps"])
    (directory / "out.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
