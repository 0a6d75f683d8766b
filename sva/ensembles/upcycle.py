"""The micro view from specialists: one mixture-of-experts model whose modules are several models' mlps.

Every layer's mlp becomes a sparse one: module i is the mlp of specialist i, and a router, random at first, picks some
for each token. What is not in an mlp is shared: the base's own, or the mean of the specialists'. The router is then
trained (targets `router`), as in Branch-Train-MiX (arXiv 2403.07816).
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from sva.generation.lm import LM
from sva.models.architectures import TABLE
from sva.models.config import ModelConfig, from_hf, to_hf
from sva.models.export import save_checkpoint
from sva.models.weights import expected
from sva.utils.errors import UserError
from sva.utils.files import new_directory

Shared = Literal["base", "average"]
_MODULE = re.compile(r"(.*\.mlp\.)experts\.(\d+)\.((?:gate|up|down)_proj\.weight)")
_FAR = 0.5  # of a matrix' norm: between two trainings from different starts it is about 1.4
_FREE = ("max_position_embeddings", "bos_token_id", "eos_token_ids", "pad_token_id")  # of no weight and no product
_ROUTER = 0.02  # standard deviation of its first weights


def upcycle(
    base: LM,
    specialists: Sequence[LM],
    directory: Path | str,
    *,
    top_k: int | None = None,
    shared: Shared = "base",
    seed: int = 0,
) -> ModelConfig:
    """Writes a Hugging Face checkpoint of the mixture, and gives its configuration.

    With modules that are all equal it computes what the base does, whatever its router: shares add to 1. Its tokenizer,
    context and token ids are the base's; an answer ends with the end tokens of every model.

    Args:
      base: a dense model of the Llama, Mistral or Qwen3 family.
      specialists: fine-tuned from it, two or more, one a module; the base may be one of them.
      directory: new or empty.
      top_k: modules that each token runs through; by default 2.
      shared: whose attention, norms and embeddings: the base's, or the mean of the specialists'.
      seed: of the router's first weights.
    Raises:
      UserError: fewer than two specialists, an architecture without a mixture of its kind, specialists of another base,
        `top_k` out of range, or a directory that cannot be written.
    """
    check(len(specialists), top_k, directory)
    for specialist in specialists:
        _require_same_base(base, specialist)
    ends = dict.fromkeys(token for lm in (base, *specialists) for token in lm.model.cfg.eos_token_ids)
    dense = dataclasses.replace(base.model.cfg, eos_token_ids=tuple(ends))
    cfg = mixture_config(dense, len(specialists), 2 if top_k is None else top_k)
    save_checkpoint(directory, cfg, _tensors(cfg, base, specialists, shared, seed), base.tokenizer)
    return cfg


def check(specialists: int, top_k: int | None, directory: Path | str) -> None:
    """Raises UserError for what is wrong of `upcycle` whatever the models: their number, `top_k`, `directory`."""
    if specialists < 2:
        raise UserError("a mixture needs two specialists or more, each a checkpoint fine-tuned from the base")
    if top_k is not None and not 1 <= top_k <= specialists:
        raise UserError(f"top_k (--top-k) {top_k} must be between 1 and the {specialists} specialists")
    new_directory(directory)


def mixture_config(cfg: ModelConfig, modules: int, top_k: int) -> ModelConfig:
    """The dense model's configuration with so many modules in every layer.

    Raises:
      UserError: no architecture with such modules is otherwise this model.
    """
    dense = to_hf(cfg)
    sizes = {"num_local_experts": modules, "num_experts": modules, "num_experts_per_tok": top_k}
    sizes |= {"moe_intermediate_size": cfg.intermediate_size, "norm_topk_prob": True}
    for name, architecture in TABLE.items():
        if "num_experts_per_tok" not in architecture.fields:
            continue
        raw = {key: value for key, value in (dense | sizes).items() if key in architecture.fields}
        try:
            found = from_hf(raw | {"model_type": name, "architectures": [architecture.classes[0]]})
        except UserError:
            continue  # a value of the dense model that this architecture does not have
        if dataclasses.replace(found, architecture=cfg.architecture, moe=None) == cfg:
            return found
    raise UserError(
        f"no mixture-of-experts architecture is a {cfg.architecture} model with these settings but for its modules; "
        "Llama, Mistral and Qwen3 models without biases have one"
    )


def _tensors(
    cfg: ModelConfig, base: LM, specialists: Sequence[LM], shared: Shared, seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of every weight, one at a time."""
    own = base.named_params()
    theirs = [specialist.named_params() for specialist in specialists]
    dtype = np.asarray(next(iter(own.values()))).dtype
    rng = np.random.default_rng(seed)
    for name, leaf in expected(cfg).items():
        if match := _MODULE.fullmatch(name):
            yield name, np.asarray(theirs[int(match[2])][match[1] + match[3]])
        elif name.endswith(".mlp.gate.weight"):
            yield name, (_ROUTER * rng.standard_normal(leaf.shape)).astype(dtype)
        elif shared == "base":
            yield name, np.asarray(own[name])
        else:
            yield name, np.mean([np.asarray(each[name], np.float32) for each in theirs], axis=0).astype(dtype)


def _require_same_base(base: LM, specialist: LM) -> None:
    """Raises UserError unless the specialist may be fine-tuned from the base, as far as its files can tell."""
    fields = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in _FREE]
    if odd := [name for name in fields if getattr(specialist.model.cfg, name) != getattr(base.model.cfg, name)]:
        raise UserError(f"{specialist.name} is not fine-tuned from {base.name}: its {odd[0]} is another")
    ours, its = base.tokenizer, specialist.tokenizer
    if ours is not None and its is not None and ours.get_vocab() != its.get_vocab():
        raise UserError(f"{specialist.name} is not fine-tuned from {base.name}: its vocabulary is another")
    theirs = specialist.named_params()
    for name, weight in base.named_params().items():
        if weight.ndim == 2:
            given = np.asarray(weight, np.float32)
            far = float(np.linalg.norm(np.asarray(theirs[name], np.float32) - given) / np.linalg.norm(given))
            if far > _FAR:
                raise UserError(
                    f"{specialist.name} is not fine-tuned from {base.name}: {name} is {far:.2f} of its size away, "
                    f"and fine-tuning moves it less than {_FAR}"
                )
