"""One training run of a table: its settings, and the key that its record is filed under."""

import functools
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.paper.methods import METHODS
from experiments.paper.revisions import CURRENT
from experiments.paper.scales import OF_KINDS, Scale
from sva.adapters import spelling
from sva.training.config import Config, in_file, load
from sva.utils.settings import override

_ELSEWHERE = (
    "run_dir",
    "wandb",
    "mesh",
    "checkpoint",
    "scan_layers",
    "evaluate.batch_size",
)  # settings that change no result


@dataclass(frozen=True)
class Cell:
    """A method on a task, with so many different training prompts and a seed; `stage` says what it is for."""

    scale: Scale
    stage: str
    method: str
    task: str
    examples: int | None  # None: the whole split
    seed: int
    lr: float
    split: str = "test"
    routes: tuple[str, ...] = ()  # of the task `routing`: the tasks to tell apart

    @property
    def name(self) -> str:
        """What it is called in lists: stage/method/task/examples/seed, and the learning rate where that is tried."""
        parts = (self.stage, self.method, self.task, self.examples or "all", f"seed {self.seed}")
        return "/".join(map(str, (*parts, f"lr {self.lr:g}") if "rates" in self.stage else parts))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `sva.train`, by dotted name, that are not its defaults."""
        begun = self.scale.begun(self.task)
        return {
            **begun,
            "model": self.scale.model,
            "task": self.task,
            **({"routes": list(self.routes)} if self.routes else {}),
            "seed": self.seed,
            **METHODS[self.method].settings,
            **(_fitting(begun, METHODS[self.method].settings) if self.scale.files else {}),
            "train.examples": self.examples,
            "train.lr": self.lr,
            "evaluate.split": self.split,
            "evaluate.size": self.scale.held_out or begun["evaluate.size"],
        }

    @property
    def command(self) -> str:
        """`sva train` with its file of configs/paper and the settings that differ from it."""
        path = self.scale.file(self.task)
        begun = _default() | in_file(path)
        changed = {name: value for name, value in self.settings.items() if begun[name] != value}
        words = [f"run_dir=runs/paper/{self.key}", *(override(name, value) for name, value in changed.items())]
        return " ".join(["sva train", f"configs/paper/{path.name}", *map(shlex.quote, words)])

    @property
    def config(self) -> Config:
        """The same as sva has them."""
        return config_of(_hashable(self.settings))

    @property
    def flat(self) -> dict[str, Any]:
        """All settings by dotted name, without those that change no result."""
        return flat(self.config)

    @property
    def is_kept(self) -> bool:
        """Whether the trained expert is kept, for the studies that read experts.

        By what the cell is and not by its stage: of equal cells of two stages one is trained, whichever comes first.
        """
        is_of_a_kind = {"examples": self.examples, "seed": self.seed} == OF_KINDS
        is_read = is_of_a_kind or bool(self.routes) or self.examples == max(self.scale.examples)
        return self.method == "svf" and is_read

    @property
    def is_sampled(self) -> bool:
        """Whether answers are drawn from the trained model too: the main cells with the most prompts, first seed."""
        is_first = self.seed == self.scale.seeds[0] and self.examples == max(self.scale.examples)
        return self.stage == "main" and is_first

    def started_in(self, directory: Path) -> Config:
        """The same with a run directory, and with no state on disk before the last step's: a cell is over in seconds.

        Saving each step would take most of a small model's step.
        """
        last = {"checkpoint.every": dict(self.scale.settings)["train.steps"]}
        return config_of(_hashable({**self.settings, "run_dir": str(directory), **last}))

    @functools.cached_property
    def digest(self) -> str:
        """What the cell is, whatever the revision: 12 hex digits of its settings."""
        return digest_of(_hashable(self.settings))

    @property
    def key(self) -> str:
        """The name of its record: `digest` and the two revisions."""
        return f"{self.digest}-{CURRENT.training}-{CURRENT.grading}"


def _fitting(begun: Mapping[str, Any], method: Mapping[str, Any]) -> dict[str, Any]:
    """What of a file's settings must be otherwise for a method, and what of a method's for the file's z."""
    changed: dict[str, Any] = {}
    if method["parametrisation"] == "sigmoid_nuclear":
        changed["parametrisation"] = begun["parametrisation"]
    if spelling.parse(method["parametrisation"]).name not in spelling.DIAGONAL:
        changed["rollout.form"] = "dense"  # spectra alone stand for diagonal changes
    if method.get("train.param_dtype") == "bfloat16":
        changed |= {"train.optimizer": "adam", "train.weight_decay": 0.0}
    return changed


def _hashable(settings: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in settings.items())


@functools.cache
def config_of(settings: tuple[tuple[str, Any], ...]) -> Config:
    """The configuration that these settings make.

    Raises:
      UserError: a setting does not exist, or two do not go together.
    """
    return load(None, [override(name, list(x) if isinstance(x, tuple) else x) for name, x in settings])


@functools.cache
def digest_of(settings: tuple[tuple[str, Any], ...]) -> str:
    """12 hex digits of the resolved settings that differ from the defaults.

    A setting that a later version adds leaves them as they are, and so does one that changes no result.
    """
    return digest_of_flat(flat(config_of(settings)))


def digest_of_flat(settings: Mapping[str, Any]) -> str:
    """`digest_of` settings by dotted name; those that this version does not have count as changed.

    All settings of a study count (`Study.flat`): it has no defaults, though some of its names are those of a cell.
    """
    default = {} if "study" in settings else _default()
    changed = {
        name: value
        for name, value in without_elsewhere(settings).items()
        if name not in default or value != default[name]
    }
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]


@functools.cache
def _default() -> dict[str, Any]:
    return flat(Config())


def flat(config: Config) -> dict[str, Any]:
    """All settings by dotted name, without those that change no result."""
    return flat_of(asdict(config))


def flat_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same of settings that are nested, as in a run's result.json."""

    def named(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in tree.items():
            if isinstance(value, Mapping):
                found |= named(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = list(value) if isinstance(value, tuple) else value
        return found

    return without_elsewhere(named(settings, ""))


def without_elsewhere(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name, without those that change no result."""
    return {
        name: value
        for name, value in settings.items()
        if name not in _ELSEWHERE and name.partition(".")[0] not in _ELSEWHERE
    }
