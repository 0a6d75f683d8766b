"""What the parts of paper_step.py have in common: the model's shape, its targets, and the step's lengths."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from sva.models.config import ModelConfig, from_hf
from sva.utils.padding import prompt_bucket

ROOT = Path(__file__).parents[3]
NEW = 512  # tokens of a completion at most
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s: NVIDIA's data sheets


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Of the step's rows, in tokens."""

    prompts: np.ndarray  # [P]
    answers: np.ndarray  # [P]
    new: int  # of an answer at most
    width: int  # of a padded prompt


def config_of(arguments: Any) -> ModelConfig:
    """Llama-3-8B, some of its layers, or for `--toy` two narrow ones."""
    path = ROOT / "configs" / "models" / "llama-3-8b" / "config.json"
    cfg = from_hf(json.loads(path.read_text()), str(path))
    layers = 2 if arguments.toy else arguments.layers or cfg.num_layers
    cfg = dataclasses.replace(cfg, num_layers=layers, windows=cfg.windows[:layers])
    if not arguments.toy:
        return cfg
    return dataclasses.replace(
        cfg, hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=256
    )


def targets_of(names: Any) -> list[str]:
    """The paper's: the three matrices of the mlp, and q and v."""
    kinds = ("gate_proj", "up_proj", "down_proj", "q_proj", "v_proj")
    return [name for name in names if name.split(".")[-2] in kinds and name.endswith(".weight")]


def lengths_of(arguments: Any) -> Lengths:
    """The first rows of the committed list; a sixteenth of its tokens for `--toy`."""
    listed = json.loads((Path(__file__).parents[1] / "rollout" / "lengths.json").read_text())
    part = 16 if arguments.toy else 1
    prompts, answers = np.asarray(listed["prompts"]), np.asarray(listed["answers"])[:, 0]
    prompts, answers = (np.maximum(x[: arguments.prompts] // part, 2) for x in (prompts, answers))
    return Lengths(prompts, answers, NEW // part, prompt_bucket(int(prompts.max())))
