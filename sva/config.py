"""One training run's settings: a YAML file and `a.b=c` overrides, typed by the modules' own dataclasses."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from sva import seeds
from sva.errors import UserError, at_least
from sva.evolution import EvolutionConfig
from sva.files import decoded
from sva.guards import GuardConfig
from sva.reinforce import ReinforceConfig
from sva.rollout import RolloutConfig
from sva.sharding import MeshConfig
from sva.spectral.family import family
from sva.train import TrainConfig, check
from sva.trees import nearest
from sva.validation import ValidationConfig


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Settings of the evaluation before and after training."""

    split: str = "test"
    size: int = 200
    batch_size: int = 32

    def __post_init__(self) -> None:
        at_least("evaluate.size", self.size, 1)
        at_least("evaluate.batch_size", self.batch_size, 1)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of `sva train`."""

    model: str = "smollm2-135m-instruct"
    dtype: str = "float32"
    task: str = "last_letter"
    routes: tuple[str, ...] = ()  # for the task `routing`: the tasks to tell apart
    grader: str = "strict"  # or "reference", as the next two: what Transformer-Squared's public code does
    splits: str = "clean"
    prompt: str = "own"
    sandbox: str = "strict"  # at which programs run, or "best-effort"
    targets: str = "mlp"
    parametrisation: str = "sigmoid_nuclear"
    seed: int = 0
    run_dir: str = "runs/${task}-${seed}"
    wandb: str | None = None  # a project of Weights & Biases, where its package is installed
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    reinforce: ReinforceConfig = dataclasses.field(default_factory=ReinforceConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    evolution: EvolutionConfig = dataclasses.field(default_factory=EvolutionConfig)
    guards: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)  # may change from one start of a run to the next

    def __post_init__(self) -> None:
        seeds.check("seed", self.seed)
        check(family(self.parametrisation), self.rollout, self.reinforce, self.train, self.evolution, self.guards)


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The settings of a YAML file with `name=value` overrides on top; defaults are in the dataclasses.

    Raises:
      UserError: no such file, broken YAML, an unknown setting (the nearest ones are named) or a value of the wrong
        type or out of range.
    """
    merged = OmegaConf.structured(Config)
    layers: list[tuple[str, Any]] = []
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"no configuration file at {path}; see configs/ for examples")
        try:
            layer = OmegaConf.load(io.StringIO(decoded(Path(path).read_bytes(), "it")))
        except (OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path} is not readable as YAML: {_one_line(error)}") from error
        if not OmegaConf.is_dict(layer):
            raise UserError(f"{path} holds a list; write one `name: value` a line")
        layers.append((str(path), layer))
    for override in overrides:
        if not override.partition("=")[0] or "=" not in override:
            raise UserError(f"{override!r} is no override; write name=value, e.g. train.lr=2e-3")
        try:
            layers.append((override, OmegaConf.from_dotlist([override])))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UserError(f"{override!r} is not readable: {_one_line(error)}") from error
    for where, layer in layers:
        merged = _explained(where, OmegaConf.merge, merged, layer)
    return _explained("the settings", OmegaConf.to_object, merged)


def settings() -> list[str]:
    """Every setting's dotted name."""
    names = []
    for key, value in dataclasses.asdict(Config()).items():
        names += [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
    return names


def to_yaml(config: Config) -> str:
    """The resolved settings as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def _explained(where: str, action: Callable[..., Any], *args: Any) -> Any:
    """What `action` returns; OmegaConf's errors become one line that names the setting, or else `where`."""
    try:
        return action(*args)
    except ConfigKeyError as error:
        key = str(error.full_key)
        raise UserError(f"unknown setting {key!r}{nearest(key, settings())}") from error
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{f'setting {key!r}' if key else where}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return str(error).split("\n")[0]
