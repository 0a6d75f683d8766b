"""How large the experiments are: `smol` runs here or in minutes on one GPU, `paper` is the paper's, `toy` for tests.

At the paper's scale cells begin with the settings of configs/paper, a file a model and task. They are listed here, and
trained by `sva train` on a machine that has the room.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sva.training.config import in_file
from sva.utils.errors import UserError

OF_KINDS = {"examples": 64, "seed": 0}  # training prompts and seed of the experts of all kinds (`plan.of_kinds`)
CONFIGS = Path(__file__).parents[2] / "configs" / "paper"


@dataclass(frozen=True)
class Scale:
    """Model, tasks and budgets."""

    name: str
    model: str
    candidates: tuple[str, ...]  # tasks to choose from, see `tasks.chosen`
    tasks: int  # how many are chosen
    settings: tuple[tuple[str, Any], ...]  # of every cell
    held_out: int  # test prompts a cell is measured on
    examples: tuple[int | None, ...] = (8, 32, 128)  # different training prompts of the main cells; None: the split
    more_examples: tuple[int, ...] = (4, 16, 64, 256)  # of the axis, beside those
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100  # of cells that decide something on validation
    tuning_examples: int | None = 32
    other_model: str = "list_last"  # tables 5 and 9 move experts to the model that is fully fine-tuned on this task
    unseen: tuple[str, ...] = ()  # tasks that no expert is trained on, where nothing is scouted
    rates: tuple[tuple[str, tuple[float, ...]], ...] = ()  # learning rates of methods that are not `methods`' own
    files: str = ""  # of configs/paper, e.g. llama3-8b: each cell begins with its task's
    prompt_tokens: int = 48  # of a question in its chat template, for predictions
    answer_tokens: int = 24  # of a held-out answer at most

    def begun(self, task: str) -> dict[str, Any]:
        """The settings that a cell of this task begins with, by dotted name."""
        return {**dict(self.settings), **(_in_config(self.file(task)) if self.files else {})}

    def file(self, task: str) -> Path:
        """The file of configs/paper for this task, or for the first one where there is none."""
        path = CONFIGS / f"{self.files}-{task}.yaml"
        return path if path.exists() else CONFIGS / f"{self.files}-{_TASKS[0]}.yaml"


_in_config = functools.cache(in_file)


_TASKS = ("gsm8k", "mbpp", "arc_easy")


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
_PAPER = {
    "llama3-8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "mistral-7b": "mistralai/Mistral-7B-Instruct-v0.3",
    "llama3-70b": "meta-llama/Meta-Llama-3-70B-Instruct",
}
PAPER = tuple(
    Scale(
        name="paper",
        model=model,
        candidates=_TASKS,
        tasks=len(_TASKS),
        settings=(),
        held_out=0,  # the file's evaluate.size
        examples=(None,),
        more_examples=(),
        tuning_examples=None,
        other_model="gsm8k",
        unseen=("math", "humaneval", "arc_challenge"),
        rates=(("svf", (2e-3,)), ("lora", (2e-6, 5e-6, 2e-5, 5e-5, 2e-4, 5e-4))),  # table 6
        files=files,
        prompt_tokens=150,
        answer_tokens=200,
    )
    for files, model in _PAPER.items()
)
NAMES = ("smol", "paper", "toy")


def scale(name: str) -> Scale:
    """The scale of that name.

    Raises:
      UserError: `paper`, whose cells are listed alone; another name.
    """
    if name == "paper":
        raise UserError(
            "--scale paper lists its cells and their `sva train` commands with --dry-run; run them where there is room "
            "and file them with run_cells --file. --scale smol runs here"
        )
    if name not in SCALES:
        raise UserError(f"--scale {name}: there is {', '.join(NAMES)}")
    return SCALES[name]
