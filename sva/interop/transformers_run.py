"""What transformers makes of a checkpoint: weights, token ids, logits, greedy answers. The one module that runs torch.

Torch is imported when it is asked for; sva runs without it.
"""

import dataclasses
import gc
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sva.models.fingerprint import digest
from sva.utils.errors import UserError
from sva.utils.padding import length_bucket, pad_tokens

BATCH = 8  # texts that are read together


@dataclasses.dataclass(frozen=True)
class Text:
    """A text to compare: the turns of a chat that ends with the user's, or one piece of text as it stands."""

    kind: str
    turns: tuple[str, ...]

    @property
    def is_chat(self) -> bool:
        """Whether it goes through the chat template."""
        return self.kind == "chat"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns, user and assistant in turn."""
        return [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(self.turns)]


class Run(NamedTuple):
    """Results of one program for N texts."""

    weights: dict[str, str]  # digest of each weight, as float32
    ids: list[list[int]]  # token ids of each text
    logits: list[np.ndarray]  # [T, V] float32 of each text, without padding
    answers: np.ndarray  # [N, M] int32, greedy tokens, whatever ends an answer


def padded(rows: Sequence[Sequence[int]], side: str) -> Iterator[tuple[range, np.ndarray, np.ndarray]]:
    """(numbers, ids, mask) of every `BATCH` rows; ids and mask are [BATCH, T], of one T, and spare rows the first."""
    length = length_bucket(max(map(len, rows)))
    for start in range(0, len(rows), BATCH):
        numbers = range(start, min(start + BATCH, len(rows)))
        batch = [rows[i] for i in numbers]
        yield numbers, *pad_tokens(batch + batch[:1] * (BATCH - len(batch)), length, side=side)


def require_torch() -> None:
    """Raises UserError, with what to install, where there is no torch."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(
            "sva verify runs the model in transformers as well, which needs torch; install it with "
            'pip install torch==2.13.0 (extra "verify")'
        )


def run(path: Path, texts: Sequence[Text], dtype: str, *, new_tokens: int, most_tokens: int) -> tuple[Run, np.ndarray]:
    """(results of transformers for the checkpoint in a directory, margins [N, M] float32 of each step of the answers).

    A margin lies between the two largest logits. The model is freed when the results are there.

    Args:
      dtype: "float32" or "bfloat16", of weights and activations.
      new_tokens: of every answer.
      most_tokens: of a text; what follows is cut off.
    Raises:
      UserError: there is no torch, or transformers cannot load the checkpoint.
    """
    require_torch()
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="eager"
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: transformers cannot load it ({reason}), so there is nothing to compare") from error
    model = model.eval().to(device)
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0)  # not the checkpoint's own
    weights = {name: digest(weight.detach().float().cpu().numpy()) for name, weight in model.state_dict().items()}
    ids = [_ids(tokenizer, text) for text in texts]
    rows = [row[:most_tokens] for row in ids]
    with torch.inference_mode():
        logits = [each for batch in padded(rows, "right") for each in _logits(model, *batch)]
        answers = [_answers(model, *batch, new_tokens) for batch in padded(rows, "left")]
    del model
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()  # for JAX, which comes next
    tokens, margins = (np.concatenate(x) for x in zip(*answers, strict=True))
    return Run(weights, ids, logits, tokens), margins


def _ids(tokenizer: Any, text: Text) -> list[int]:
    if text.is_chat and tokenizer.chat_template:
        asked = tokenizer.apply_chat_template(text.messages, add_generation_prompt=True, return_dict=True)
        return list(asked["input_ids"])
    return list(tokenizer("\n\n".join(text.turns))["input_ids"])


def _logits(model: Any, numbers: range, ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    found = model(**_inputs(model, ids, mask), use_cache=False).logits.float().cpu().numpy()
    return [found[row, : mask[row].sum()].copy() for row in range(len(numbers))]


def _answers(
    model: Any, numbers: range, ids: np.ndarray, mask: np.ndarray, new_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, margins), each [numbers, new_tokens]."""
    import torch

    how = {"max_new_tokens": new_tokens, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**_inputs(model, ids, mask), **how)
    tokens = out.sequences[:, ids.shape[1] :].int().cpu().numpy()
    best = torch.stack([step.float().topk(2, dim=-1).values for step in out.logits], dim=1)
    margins = (best[..., 0] - best[..., 1]).cpu().numpy()
    return tokens[: len(numbers)], margins[: len(numbers)]


def _inputs(model: Any, ids: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """The arrays as transformers takes them, on the model's device."""
    import torch

    named = {"input_ids": ids, "attention_mask": mask}
    return {name: torch.tensor(x, dtype=torch.long, device=model.device) for name, x in named.items()}
