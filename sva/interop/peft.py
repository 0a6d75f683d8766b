"""An expert as a PEFT LoRA adapter, for PEFT itself and for servers that read its files, vLLM among them."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sva.generation.lm import LM
from sva.models.hub import KNOWN
from sva.models.weights import expected, split_name
from sva.spectral.forms import Spectrum, require_vector
from sva.spectral.lowrank import low_rank
from sva.utils.errors import UserError
from sva.utils.files import save_tensors, write_directory

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's --max-lora-rank (its documentation of 0.14); it does not load larger adapters."""


class Part(NamedTuple):
    """One matrix of an adapter."""

    rank: int
    full_rank: int
    error: float  # spectral norm of what was left out, relative to that of W


def save_peft(
    directory: str | Path,
    lm: LM,
    spectra: Mapping[str, Spectrum],
    z: Mapping[str, Any],
    *,
    title: str,
    rank: int | None = None,
    tolerance: float = 0.0,
    dtype: Any = np.float32,
) -> dict[str, Part]:
    """Writes the change W' - W of every matrix as a LoRA adapter with scaling 1, and gives back its ranks and errors.

    lora_B lora_A = U_k diag(s (z - 1)) V_k^T, see `low_rank`. `r` is the largest rank, which is what a server must
    make room for; where ranks differ, `rank_pattern` has them. The errors stand in README.md and, per matrix, in the
    header of the safetensors file.

    Args:
      directory: a new or an empty directory.
      lm: the base model, whose weights (as read, unpacked if they were quantised) the adapter is for.
      spectra, z: of the weights to be changed, {name: [R]}.
      title: of README.md, the expert's name.
      rank: at most this many components a matrix; None for no limit.
      tolerance: leaves out components that move by no more than this part of s_max.
      dtype: of the stored matrices, float32 or bfloat16.
    Raises:
      UserError: nothing is left to be stored, a weight is none of a linear layer of transformers' model, the directory
        holds something, the disk is full.
    """
    require_linear(z)
    tensors: dict[str, np.ndarray] = {}
    parts: dict[str, Part] = {}
    for name, vector in z.items():
        require_vector(name, vector)
        b, a, error = low_rank(spectra[name], vector, rank=rank, tolerance=tolerance)
        parts[name] = Part(len(a), len(np.asarray(vector)), error)
        if len(a):
            key = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{key}.lora_A.weight"] = a.astype(dtype)
            tensors[f"{key}.lora_B.weight"] = b.astype(dtype)
    if not tensors:
        asked = f"tolerance {tolerance}" if rank is None else f"rank {rank}"
        raise UserError(f"at {asked} nothing of this expert is left; lower the tolerance or give a rank of 1 or more")
    config = _config(lm, parts)
    about = {
        "base": lm.name,
        "fingerprint": lm.fingerprint,
        "relative_error": {name: part.error for name, part in parts.items()},
    }

    def write(place: Path) -> None:
        weights, settings = place / "adapter_model.safetensors", place / "adapter_config.json"
        settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (place / "README.md").write_text(_readme(title, lm, parts, config), encoding="utf-8")
        save_tensors(weights, tensors, {"format": "pt", "sva": json.dumps(about)})
        shutil.copymode(settings, weights)  # the library writes files that only their owner may read

    write_directory(directory, write)
    return parts


def require_linear(names: Iterable[str]) -> None:
    """Raises UserError for a weight of a mixture's modules or router, which PEFT has no layer for."""
    for name in names:
        if ".mlp.experts." in name or name.endswith(".mlp.gate.weight"):
            raise UserError(
                f"{name}: PEFT adapts linear layers, and transformers has none for a mixture's modules and router; "
                "export the merged model instead (sva expert export, or sva.merge and LM.save)"
            )


def summary(parts: Mapping[str, Part]) -> str:
    """Ranks and the stated error in one line."""
    ranks = [part.rank for part in parts.values()]
    worst = max(parts, key=lambda name: parts[name].error)
    return (
        f"{len(parts)} matrices, rank {min(ranks)} to {max(ranks)} of {max(part.full_rank for part in parts.values())};"
        f" largest error of a matrix {parts[worst].error:.2e} of its s_max ({worst})"
    )


def base_of(lm: LM) -> str:
    """The name by which others know the base model."""
    known = KNOWN.get(lm.name)
    return known.hub_id if known and known.hub_id else lm.name


def target_modules(lm: LM, modules: Sequence[str]) -> list[str]:
    """What names these modules to PEFT and no others: their kinds, or each one where a kind is not in every layer."""
    kinds = {module.rpartition(".")[2] for module in modules}
    all_modules = [name.removesuffix(".weight") for name in expected(lm.model.cfg)]
    everywhere = all(module in modules for module in all_modules if module.rpartition(".")[2] in kinds)
    return sorted(kinds) if everywhere else list(modules)


def _config(lm: LM, parts: Mapping[str, Part]) -> dict[str, Any]:
    """adapter_config.json; what it does not say has PEFT's default, which leaves the product alone."""
    ranks = {name.removesuffix(".weight"): part.rank for name, part in parts.items() if part.rank}
    largest = max(ranks.values())
    smaller = {module: rank for module, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_of(lm),
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,  # the same: scaling is alpha / r = 1 everywhere
        "target_modules": target_modules(lm, list(ranks)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _readme(title: str, lm: LM, parts: Mapping[str, Part], config: Mapping[str, Any]) -> str:
    base = config["base_model_name_or_path"]
    room = next((rank for rank in VLLM_RANKS if rank >= config["r"]), None)
    serve = (
        f"    vllm serve {base} --enable-lora --max-lora-rank {room} --lora-modules expert=THIS_DIRECTORY"
        if room
        else f"Its rank {config['r']} is more than vLLM serves ({VLLM_RANKS[-1]}): export with a smaller --rank for it."
    )
    stored = "its weights as stored"
    if lm.quantisation:
        stored = f"the weights of its {lm.quantisation} file, unpacked; on the unquantised ones it is an approximation"
    kinds: dict[str, list[Part]] = {}
    for name, part in parts.items():
        kinds.setdefault(".".join(split_name(name)[1][:-1]), []).append(part)
    rows = "\n".join(
        f"| {kind} | {len(of)} | {min(p.rank for p in of)} to {max(p.rank for p in of)} | "
        f"{max(p.full_rank for p in of)} | {max(p.error for p in of):.2e} |"
        for kind, of in kinds.items()
    )
    return f"""---
base_model: {base}
library_name: peft
---
# {title}

A singular-value expert (sva) as a LoRA adapter: lora_B lora_A = U_k diag(s (z - 1)) V_k^T, scaling 1.
It belongs to {base} (sva fingerprint {lm.fingerprint[:16]}), {stored}.

| matrices | number | rank stored | full rank | largest error |
|---|---|---|---|---|
{rows}

The error is the spectral norm of what was left out of W' - W, relative to the largest singular value of W; 0 means
exact up to rounding. Per matrix it stands in the header of adapter_model.safetensors.

{serve}
"""
