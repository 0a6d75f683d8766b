"""One training run from its configuration: a directory that can be killed, resumed, and read afterwards.

config.yaml          resolved settings; a directory of other settings is refused
state/               orbax, the last two steps
metrics.jsonl        one row a step;  tensorboard/  the same
verdicts.json        the rewards of the last step that was graded
failed/              batches of steps that went wrong
expert.safetensors   the expert;  spectrum.png  what it moved, where it is a z
result.json          accuracy before and after, warnings, settings, versions, command
before.jsonl         every held-out answer of the base;  after.jsonl  of the adapted model

A remote one (gs://...) is worked on in a copy, which is sent there after every step; see `sva.utils.remote`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from omegaconf import OmegaConf

from sva.adapters.family import Family, PerMatrix
from sva.evaluation import evaluate as evaluation
from sva.evaluation.evaluate import Record
from sva.evaluation.stats import accuracy, paired_difference
from sva.generation.frozen import frozen_of
from sva.generation.lm import LM
from sva.generation.load import load
from sva.generation.merge import merge
from sva.interop import expert_report
from sva.models.weights import by_module, expected, is_module
from sva.parallel import exchange
from sva.parallel import processes as distributed
from sva.parallel.sharding import check_rows, on_mesh
from sva.spectral.expert import Expert
from sva.spectral.parametrisations import Diagonal, Frozen, count, family, matrix_infos, singular_values
from sva.tasks import task as make_task
from sva.tasks.base import Task
from sva.tasks.routing import Routing
from sva.training import metrics, tracking
from sva.training.config import Config, to_yaml
from sva.training.config import load as load_config
from sva.training.loop import fit
from sva.training.outcome import nothing_learned
from sva.training.update import ExpertState
from sva.utils.errors import UserError, differing
from sva.utils.files import locked, write_atomically, write_json
from sva.utils.progress import progress_bar
from sva.utils.provenance import command, versions
from sva.utils.remote import Mirror, local_directory, to_path
from sva.utils.trees import select

_MAY_CHANGE = ("mesh.", "checkpoint.", "rollout.rows", "scan_layers")  # settings, or their sections, of a run begun
_SHOWN = (  # metric, its name in the progress bar, format
    ("reward", "reward", "+.2f"),
    ("loss", "loss", "+.3f"),
    ("kl", "kl", ".3f"),
    ("grad_norm", "grad", ".3f"),
    ("validation_accuracy", "validation", ".2f"),
    ("tokens_per_second", "tok/s", ".0f"),
)


def task_of(config: Config) -> Task:
    """The task that a configuration trains."""
    how = {name: getattr(config, name) for name in ("grader", "splits", "prompt", "shots", "sandbox")}
    return make_task(config.task, routes=config.routes, **how)


def train(
    config: Config, *, lm: LM | None = None, task: Task | None = None, profile: bool = False, progress: bool = True
) -> tuple[Expert, dict[str, Any]]:
    """The expert that `config` describes, trained from the start or from where its run directory stopped.

    Args:
      lm: the base model, if it is loaded already.
      task: the task, if it is made already; config.task is then its name.
      profile: trace one step, see `fit`.
    Returns:
      The expert, and what result.json holds.
    Raises:
      UserError: the directory holds a run of other settings (named), another process works in it, one of several
        processes has other settings or rows, or a setting does not fit the model or the task.
      TransientError: the directory's bucket can no longer be reached.
    """
    run_dir = to_path(config.run_dir)
    with contextlib.ExitStack() as stack:
        mirrors: list[Mirror | None] = []

        def take() -> None:
            mirror = stack.enter_context(local_directory(run_dir))
            local = mirror.local if mirror else run_dir
            busy = f"another process trains in {run_dir}; wait for it, or choose another run_dir"
            stack.enter_context(locked(local, local / ".lock", busy))
            _check_same(config, local / "config.yaml")
            mirrors.append(mirror)

        exchange.from_process_0(take)
        mirror = mirrors[0] if distributed.is_writer() else None
        local = mirror.local if mirror else Path(os.fspath(run_dir))
        return _train(config, local, mirror, lm, task, profile, progress and distributed.is_writer())


def _train(
    config: Config,
    run_dir: Path,
    mirror: Mirror | None,
    lm: LM | None,
    task: Task | None,
    profile: bool,
    progress: bool,
) -> tuple[Expert, dict[str, Any]]:
    with on_mesh(config.mesh) as mesh:
        check_rows("rollout.prompts", config.rollout.prompts, mesh)
        check_rows("train.micro_batch", config.train.micro_batch, mesh)
        if config.rollout.rows is not None:
            check_rows("rollout.rows", config.rollout.rows, mesh)
        run = _start(config, run_dir, lm, task or task_of(config), mesh, progress)
        before = _answers(run, run.lm, "before.jsonl", "evaluate base")
        if mirror is not None:
            mirror.push()
        state = _fit(run, mirror, profile)
        expert = _expert_of(run, state)
        z = expert.z(run.spectra)
        _draw(run, z)
        adapted = merge(run.lm, run.spectra, z)
        after = _answers(run, adapted, "after.jsonl", "evaluate adapted")
        return (expert, {}) if not distributed.is_writer() else _finish(run, state, expert, before, after)


class _Run(NamedTuple):
    """A run that has begun: its directory is taken, its model loaded."""

    config: Config
    directory: Path
    lm: LM
    spectra: Mapping[str, Frozen]
    task: Task
    family: Family
    held_out: Sequence[evaluation.Item]
    progress: bool
    started: float  # time.time()


def _start(config: Config, run_dir: Path, lm: LM | None, task: Task, mesh: Mesh | None, progress: bool) -> _Run:
    """The run, with its model loaded and decomposed; only then is its directory taken.

    A directory is not taken by settings that name no task, no model or no weight.
    """
    started = time.time()
    if jax.process_count() > 1:
        exchange.require_same(_shared(config, task))
    member = family(config.parametrisation)
    without = config.targets if config.rollout.form == "factored" else None
    how = {"scan_layers": config.scan, "layers": config.layers, "mesh": mesh, "without": without}
    lm = lm or load(config.model, config.dtype, **how, progress=progress)
    names = select(expected(lm.model.cfg), config.targets, config.layers)
    spectra = frozen_of(lm, member, names, seed=config.seed, progress=progress)
    count(member, matrix_infos(spectra))  # raises where a matrix is too small
    module = next((name for name in names if is_module(name)), None)
    if module and not isinstance(member, Diagonal):
        raise UserError(
            f"parametrisation={config.parametrisation} does not train in the modules of a mixture ({module}); use one "
            "with a z (linear, sigmoid_nuclear, top_k, tail_only), or other targets, e.g. targets=attention"
        )
    held_out = evaluation.items(task, config.evaluate.split, config.evaluate.size)
    if distributed.is_writer():
        write_atomically(run_dir / "config.yaml", lambda path: path.write_text(to_yaml(config)))
    return _Run(config, run_dir, lm, spectra, task, member, held_out, progress, started)


def _answers(run: _Run, lm: LM, name: str, title: str) -> list[Record]:
    """`evaluation.kept` of this model's answers on process 0; the others, whose devices they need, do as it does."""

    def answers() -> list[Record]:
        batch_size = run.config.evaluate.batch_size
        return evaluation.evaluate(lm, run.held_out, batch_size=batch_size, title=title, progress=run.progress)

    path = run.directory / name
    is_kept = exchange.from_process_0(lambda: evaluation.kept_before(path, run.held_out) is not None)
    if distributed.is_writer():
        return evaluation.kept(path, run.held_out, answers)
    return [] if is_kept else answers()


def _fit(run: _Run, mirror: Mirror | None, profile: bool) -> ExpertState:
    """The trained state; each step is shown, tracked and sent to where the run directory is."""
    config, title = run.config, f"train {run.task.name}"
    project = config.wandb if distributed.is_writer() else None  # one run of all processes
    with (
        tracking.wandb(project, to_path(config.run_dir), _resolved(config)) as track,
        progress_bar(title, config.train.steps, "step", hidden=not run.progress) as bar,
    ):

        def show(row: Mapping[str, Any]) -> None:
            track(row)
            if mirror is not None:
                mirror.push()
            bar.update(row["step"] + 1 - bar.n)
            shown = [f"{title} {row[name]:{form}}" for name, title, form in _SHOWN if name in row]
            bar.set_postfix_str(" ".join(shown))
            for alarm in row.get("alarms", ()):
                bar.write(f"alarm at step {row['step']}: {alarm}", file=sys.stderr)

        return fit(run.lm, run.spectra, run.task, run.directory, config, profile=profile, on_step=show)


def _expert_of(run: _Run, state: ExpertState) -> Expert:
    """The expert of the state's chosen values."""
    raw = jax.tree.map(lambda raw: np.asarray(raw, np.float32), distributed.to_host(state.chosen))
    return Expert(
        by_module(raw, run.spectra) if any(map(is_module, raw)) else raw,
        run.config.parametrisation,
        weights=() if isinstance(run.family, PerMatrix) else tuple(run.spectra),
    )


def _draw(run: _Run, z: Mapping[str, Any]) -> None:
    """The picture of what a z moved, by process 0; all gather what it needs, which may lie on their devices."""
    if not isinstance(run.family, Diagonal):
        return
    z, s = distributed.to_host(z), distributed.to_host(singular_values(run.spectra))
    if distributed.is_writer():
        moved = expert_report.movements(z, s)
        expert_report.draw(moved, z, f"{run.task.name} on {run.lm.name}", run.directory / "spectrum.png")


def _finish(
    run: _Run, state: ExpertState, expert: Expert, before: Sequence[Record], after: Sequence[Record]
) -> tuple[Expert, dict[str, Any]]:
    """(the expert with its metadata, result.json's content), both written."""
    config, lm = run.config, run.lm
    rows = metrics.read(run.directory / "metrics.jsonl")
    result = {
        "task": run.task.name,
        "model": lm.name,
        "quantisation": lm.quantisation,
        "fingerprint": lm.fingerprint,
        "split": config.evaluate.split,
        **compare(before, after),
        "train_steps": len(rows),
        **({} if state.best is None else {"best_step": int(state.best.step)}),
        "parameters": sum(np.size(x) for x in expert.arrays.values()),
        "seconds": round(time.time() - run.started, 1),
        "warnings": nothing_learned(rows, before),
        "config": _resolved(config),
        "versions": versions(),
        "command": command(),
    }
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    expert = dataclasses.replace(expert, metadata=describe(lm, run.task, config, result))
    expert.save(run.directory / "expert.safetensors")
    write_json(run.directory / "result.json", result)
    return expert, result


def _resolved(config: Config) -> dict[str, Any]:
    """The settings as plain values."""
    plain: Any = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    return plain


def describe(lm: LM, task: Task, config: Config, result: Mapping[str, Any]) -> dict[str, Any]:
    """An expert file's metadata; a classification expert's says which labels it tells apart."""
    return {
        "base": lm.name,
        "fingerprint": lm.fingerprint,
        "targets": config.targets,
        **({"layers": config.layers} if config.layers else {}),
        "task": task.name,
        "label": task.label,
        "description": task.description,
        **({"labels": {label.name: label.description for label in task.labels}} if isinstance(task, Routing) else {}),
        "metrics": {name: result[name] for name in ("before", "after", "gain", "n")},
        "config": result["config"],
    }


def compare(before: Sequence[Record], after: Sequence[Record]) -> dict[str, Any]:
    """Accuracies of the same items before and after, and their paired difference, with 95 % intervals."""
    old, new = (np.array([record.correct for record in records]) for records in (before, after))
    return {
        "n": len(old),
        "before": accuracy(old)._asdict(),
        "after": accuracy(new)._asdict(),
        "gain": paired_difference(new, old)._asdict(),
    }


def _shared(config: Config, task: Task) -> dict[str, Any]:
    """What every process of a run must have alike, by name: its settings, and a digest of the rows of each split."""
    validated = [config.validation.split] if config.validation.every else []
    splits = dict.fromkeys(["train", *validated, config.evaluate.split])
    return {
        **{name: value for name, value in _flat(_resolved(config)).items() if name != "run_dir"},
        **{f"rows of {split}": _digest(task, split) for split in splits},
    }


def _digest(task: Task, split: str) -> str:
    """Hexadecimal, of all that a split asks."""
    rows = [[task.question(row), dict(row)] for row in task.source(split)]
    return hashlib.sha256(json.dumps(rows, default=repr).encode()).hexdigest()[:16]


def _check_same(config: Config, path: Path) -> None:
    """Raises UserError where a run at `path` has other settings; where and how it runs may change."""
    if not path.exists():
        return
    # Read as settings, so that one which an earlier version did not have counts as its default.
    flat = (_flat(OmegaConf.create(to_yaml(one))) for one in (load_config(path), config))
    old, new = ({name: x for name, x in one.items() if not name.startswith(_MAY_CHANGE)} for one in flat)
    if others := differing(old, new):
        where = config.run_dir
        raise UserError(f"{where} holds a run of other settings ({others}); choose another run_dir or delete it")


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for key, value in config.items():
        settings |= _flat(value, f"{prefix}{key}.") if hasattr(value, "items") else {f"{prefix}{key}": value}
    return settings
