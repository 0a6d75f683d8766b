"""One training run's settings: a YAML file and `a.b=c` overrides, typed by the modules' own dataclasses."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from sva.errors import UserError
from sva.reinforce import ReinforceConfig
from sva.rollout import RolloutConfig
from sva.train import TrainConfig
from sva.trees import nearest


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Settings of the evaluation before and after training."""

    split: str = "test"
    size: int = 200
    batch_size: int = 32


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of `sva train`."""

    model: str = "smollm2-135m-instruct"
    dtype: str = "float32"
    task: str = "last_letter"
    routes: tuple[str, ...] = ()  # for the task `routing`: the tasks to tell apart
    targets: str = "mlp"
    parametrisation: str = "sigmoid_nuclear"
    seed: int = 0
    run_dir: str = "runs/${task}-${seed}"
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    reinforce: ReinforceConfig = dataclasses.field(default_factory=ReinforceConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = dataclasses.field(default_factory=EvaluateConfig)


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The settings of a YAML file with `name=value` overrides on top; defaults are in the dataclasses.

    Raises:
      UserError: no such file, broken YAML, an unknown setting (the nearest ones are named) or a value of the wrong
        type or out of range.
    """
    merged = OmegaConf.structured(Config)
    layers = []
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"no configuration file at {path}; see configs/ for examples")
        try:
            layers.append(OmegaConf.load(path))
        except (OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{path} is not readable as YAML: {_one_line(error)}") from error
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override!r} is no override; write name=value, e.g. train.lr=2e-3")
        layers.append(OmegaConf.from_dotlist([override]))
    try:
        for layer in layers:
            merged = OmegaConf.merge(merged, layer)
        return OmegaConf.to_object(merged)  # pyright: ignore[reportReturnType]
    except ConfigKeyError as error:
        key = str(error.full_key)
        raise UserError(f"unknown setting {key!r}{nearest(key, settings())}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"setting {getattr(error, 'full_key', '')!r}: {_one_line(error)}") from error


def settings() -> list[str]:
    """Every setting's dotted name."""
    names = []
    for key, value in dataclasses.asdict(Config()).items():
        names += [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
    return names


def to_yaml(config: Config) -> str:
    """The resolved settings as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def _one_line(error: Exception) -> str:
    return str(error).split("\n")[0]
