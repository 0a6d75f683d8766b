"""TRL's parts of trl_step.py: GRPOTrainer with PEFT's LoRA, in an interpreter that has them.

Of sva it takes the grader alone. What is not TRL's default: float32; no gradient checkpointing, which sva has off as
well and which costs a pass; a constant learning rate; GRPO's own loss (the default is DAPO's).
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from experiments.benchmarks.trl.meter import Meter
from sva.tasks import task

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
LARGEST = task("largest")


def reward(completions: list[str], example: list[str], **columns: Any) -> list[float]:
    """+1 for a right answer, -1 for a wrong one, as in sva."""
    del columns
    grades = LARGEST.grade_many(completions, [json.loads(text) for text in example])
    return [1.0 if grade.correct else -1.0 for grade in grades]


class Steps(TrainerCallback):
    """Ends a step of the meter when its reward is logged, which is the last thing of a step."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        del args, state, control, more
        if "reward" in logs:
            self.meter.step(logs["reward"])


def settings(directory: Path, micro_batches: int, rows: int, steps: int) -> GRPOConfig:
    """So many updates and one more rollout; 64 completions of 8 prompts each."""
    return GRPOConfig(
        output_dir=str(directory / "trl"),
        max_steps=steps + 1,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=micro_batches,
        num_generations=8,
        max_completion_length=8,
        temperature=1.0,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        loss_type="grpo",
        beta=0.0,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def main(directory: Path) -> None:
    job = json.loads((directory / "job.json").read_text())
    prompts = json.loads((directory / "prompts.json").read_text())
    checkpoint = str(directory / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for row in prompts:
        assert tokenizer(row["text"])["input_ids"] == row["ids"], f"TRL would read other tokens: {row['text']!r}"
    cfg = settings(directory, *job["batch"], job["steps"])
    meter = Meter()
    trainer = GRPOTrainer(
        checkpoint,
        reward,
        args=cfg,
        train_dataset=Dataset.from_list(
            [{"prompt": row["text"], "example": json.dumps(row["example"])} for row in prompts]
        ),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Steps(meter)],
    )
    dtypes = {str(parameter.dtype) for parameter in trainer.model.parameters()}
    assert dtypes == {"torch.float32"}, dtypes
    trainer.train()
    assert len(meter.seconds) == job["steps"] + 1
    found = meter.result() | {
        "parameters": sum(x.numel() for x in trainer.model.parameters() if x.requires_grad),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "config": {name: value for name, value in cfg.to_dict().items() if name != "output_dir"},
    }
    (directory / "out.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
