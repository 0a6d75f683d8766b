"""One training run's settings: a YAML file and `a.b=c` overrides, typed by the dataclasses of this package.

Nothing here imports JAX, so that a wrong setting is told at once; OmegaConf is imported where a file is read.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from sva.adapters import spelling
from sva.parallel.mesh_config import MeshConfig
from sva.training.config.checkpoint import CheckpointConfig
from sva.training.config.evaluation import EvaluateConfig, ValidationConfig
from sva.training.config.evolution import EvolutionConfig
from sva.training.config.guards import GuardConfig
from sva.training.config.reinforce import ReinforceConfig
from sva.training.config.rollout import RolloutConfig
from sva.training.config.together import check
from sva.training.config.train import TrainConfig
from sva.utils import seeds
from sva.utils.errors import UserError, at_least
from sva.utils.files import decoded
from sva.utils.remote import local_path
from sva.utils.settings import leaves, pairs, parse, settings_of, value_of
from sva.utils.trees import layer_numbers

DTYPES = ("float32", "bfloat16")  # int8 weights are for inference
SCANS = {"auto": None, "true": True, "false": False}


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of `sva train`."""

    model: str = "smollm2-135m-instruct"  # a path, a hub id or a known name
    dtype: str = "float32"  # of weights and activations; or "bfloat16"
    task: str = "last_letter"  # a name, or the path of a .jsonl or .py file
    routes: tuple[str, ...] = ()  # for the task `routing`: the tasks to tell apart
    grader: str = "strict"  # or "reference": the verdicts of Transformer-Squared's public code, faults included
    splits: str = "clean"  # or "reference": the public code's, overlaps included
    prompt: str = "own"  # or "reference": the public code's system message, question and budget
    shots: int = 0  # worked examples before the question: how a base model is asked
    sandbox: str = "strict"  # in which programs are run and graded; or "best-effort"
    targets: str = "auto"  # mlp, or ia3 where that is trained; see `sva.utils.trees.select`
    layers: str | None = None  # those that are adapted, e.g. 0-39 or 0-3,8; null: all
    # One compiled layer for all, which compiles faster and decodes slower; auto: on a TPU. May change as mesh may.
    scan_layers: str = dataclasses.field(default="auto", metadata={"words": tuple(SCANS)})
    parametrisation: str = "sigmoid_nuclear"  # how raw values become z; or of another adapter, e.g. lora:r=16,alpha=32
    seed: int = 0  # of everything that is drawn
    run_dir: str = "runs/${task}-${seed}"  # where the run is kept, and from where it resumes
    wandb: str | None = dataclasses.field(default=None, metadata={"off": True})  # a project of Weights & Biases
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    reinforce: ReinforceConfig = dataclasses.field(default_factory=ReinforceConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    evolution: EvolutionConfig = dataclasses.field(default_factory=EvolutionConfig)
    guards: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)  # may change from one start of a run to the next

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype!r} is not for training; use {' or '.join(DTYPES)}")
        seeds.check("seed", self.seed)
        at_least("shots", self.shots, 0)
        run_dir = self.run_dir
        if "${" in run_dir:  # the task's name and the seed, or other settings
            from omegaconf import OmegaConf

            run_dir = _explained(lambda: OmegaConf.create(dataclasses.asdict(self)).run_dir)
        # The task's name may be a path in the home directory; no directory is called ~.
        object.__setattr__(self, "run_dir", run_dir.replace("/~/", "/"))
        parametrisation = spelling.parse(self.parametrisation)
        if self.targets == "auto":
            object.__setattr__(self, "targets", "ia3" if parametrisation.name == "ia3" else "mlp")
        if self.layers is not None:
            layer_numbers(self.layers)
        if self.scan_layers not in SCANS:
            raise UserError(f"scan_layers={self.scan_layers!r} is not one of {', '.join(SCANS)}")
        check(parametrisation, self.rollout, self.reinforce, self.train, self.evolution, self.guards)

    @property
    def scan(self) -> bool | None:
        """`scan_layers` as `sva.load` takes it."""
        return SCANS[self.scan_layers]


SETTINGS = settings_of(Config)


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The settings of a YAML file with `name=value` overrides on top; defaults are in the dataclasses.

    Raises:
      UserError: no such file, broken YAML, an unknown setting (the nearest ones are named) or a value of the wrong
        type or out of range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values |= in_file(path)
    for given in overrides:
        values |= _of_override(given)
    tree: dict[str, Any] = {}
    for name, value in values.items():
        section, _, last = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[last] = value
    from omegaconf import OmegaConf

    merged = _explained(OmegaConf.merge, _schema(), tree)
    return _explained(OmegaConf.to_object, merged)


@functools.cache
def _schema() -> Any:
    """The settings as OmegaConf types them; made once, because that takes longer than reading a file."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(Config)


def in_file(path: str | Path) -> dict[str, Any]:
    """The values that a YAML file sets, by dotted name.

    Raises:
      UserError: no such file, broken YAML, an unknown setting or a value of the wrong type.
    """
    path = local_path(path, "the configuration")
    if not path.is_file():
        raise UserError(f"no configuration file at {path}; see configs/ for examples")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} is not readable as YAML: {error}") from error
    node = parse(decoded(text, f"{path} is not readable as YAML: it"), str(path))
    entries = [] if node is None else pairs(node, str(path))
    where = str(path)
    return {name: value_of(value, SETTINGS[name], name, where) for name, value in leaves(entries, SETTINGS, where)}


def _of_override(given: str) -> dict[str, Any]:
    """The values of one `name=value`, by dotted name."""
    name, equals, text = given.partition("=")
    name = name.strip()
    if not name or not equals:
        raise UserError(f"{given!r} is no override; write name=value, e.g. train.lr=2e-3")
    node = parse(text, repr(given))
    if node is None:
        node = yaml.ScalarNode("tag:yaml.org,2002:null", "null")  # so that an empty section is not passed over
    return {
        full: value_of(value, SETTINGS[full], full, given) for full, value in leaves([(name, node)], SETTINGS, given)
    }


def settings() -> list[str]:
    """Every setting's dotted name."""
    return list(SETTINGS)


def to_yaml(config: Config) -> str:
    """The resolved settings as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def _explained(action: Callable[..., Any], *args: Any) -> Any:
    """What `action` returns; OmegaConf's errors, of `${...}`, become one line that names the setting."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        return action(*args)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        said = str(error).split("\n")[0]
        raise UserError(f"{f'setting {key!r}' if key else 'the settings'}: {said}") from error
