"""How large the experiments are: `smol` runs here or in minutes on one GPU, `paper` is the paper's, `toy` for tests."""

from dataclasses import dataclass
from typing import Any

from sva.utils.errors import UserError


@dataclass(frozen=True)
class Scale:
    """Model, tasks and budgets."""

    name: str
    model: str
    candidates: tuple[str, ...]  # tasks to choose from, see `tasks.chosen`
    tasks: int  # how many are chosen
    settings: tuple[tuple[str, Any], ...]  # of every cell
    held_out: int  # test prompts a cell is measured on
    examples: tuple[int, ...] = (8, 32, 128)  # different training prompts of the main cells
    more_examples: tuple[int, ...] = (4, 16, 64, 256)  # of the axis, beside those
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100  # of cells that decide something on validation
    tuning_examples: int = 32
    other_model: str = "list_last"  # tables 5 and 9 move experts to the model that is fully fine-tuned on this task


SMOL = Scale(
    name="smol",
    model="smollm2-135m-instruct-q4_1",
    candidates=(
        "last_letter",
        "second_letter",
        "product",
        "sum3",
        "next_number",
        "sort3",
        "alphabetical",
        "longest_word",
        "count",
        "reverse_words",
    ),
    tasks=3,
    settings=(
        ("rollout.prompts", 8),
        ("rollout.samples", 8),
        ("rollout.max_new_tokens", 24),
        ("train.steps", 32),
        ("train.micro_batch", 8),
        ("train.remat", False),
        ("evaluate.batch_size", 300),  # all at once: one program a task, and on a GPU no slower than a fifth of them
    ),
    held_out=300,
)
TOY = Scale(
    name="toy",
    model="toy",
    candidates=("name_a_colour",),
    tasks=1,
    settings=(
        ("rollout.prompts", 4),
        ("rollout.samples", 4),
        ("train.steps", 2),
        ("train.micro_batch", 4),
        ("train.remat", False),
        ("evaluate.batch_size", 16),
    ),
    held_out=16,
    examples=(8,),
    more_examples=(),
    seeds=(0, 1),
    tuning_examples=8,
)
SCALES = {"smol": SMOL, "toy": TOY}
NAMES = ("smol", "paper", "toy")


def scale(name: str) -> Scale:
    """The scale of that name.

    Raises:
      UserError: `paper`, which has no settings yet; another name.
    """
    if name == "paper":
        raise UserError(
            "--scale paper: its settings (Llama-3-8B on GSM8K, MBPP and ARC-Easy, LoRA on official solutions, machines "
            "and hours) are not made yet; configs/llama3-8b-v5e-16.yaml is one run of it, --scale smol runs here"
        )
    if name not in SCALES:
        raise UserError(f"--scale {name}: there is {', '.join(NAMES)}")
    return SCALES[name]
