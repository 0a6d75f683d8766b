"""LoRA, rsLoRA, DoRA and IA3 experts as PEFT's adapters, both ways; torch is not needed.

PEFT's key                                                        raw value
base_model.model.model.layers.0.mlp.up_proj.lora_A.weight          a [r, D_in]
base_model.model.model.layers.0.mlp.up_proj.lora_B.weight          b [D_out, r]
base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector  magnitude [D_out]
base_model.model.model.layers.0.mlp.down_proj.ia3_l                factors [1, D_in], or [D_out, 1] of outputs
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from sva.adapters.family import Matrix
from sva.adapters.ia3 import FEED_FORWARD, IA3
from sva.adapters.lora import DoRA, LoRA, RsLoRA
from sva.generation.lm import LM
from sva.interop.peft import base_of, require_linear, target_modules
from sva.models.weights import expected
from sva.spectral.expert import Expert
from sva.spectral.parametrisations import check_raw
from sva.utils.errors import UserError
from sva.utils.files import read_json, save_tensors, write_directory

_PREFIX = "base_model.model."
_PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude", "ia3_l": "factors"}

# Starts that take B A out of the base weights, or quantise them, each time PEFT loads (`update_layer` of its LoRA).
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_OTHER_MEANING = ("alora_invocation_tokens", "arrow_config", "layer_replication")


def save_adapter(directory: str | Path, lm: LM, expert: Expert, *, title: str, dtype: Any = np.float32) -> str:
    """Writes an expert of LoRA, rsLoRA, DoRA or IA3 as the adapter that PEFT itself would have saved, and says what.

    Args:
      directory: a new or an empty directory.
      lm: the base model.
      title: of README.md, the expert's name.
      dtype: of the stored arrays, float32 or bfloat16.
    Raises:
      UserError: an expert of another parametrisation or of weights that PEFT has no layer for, the directory holds
        something, the disk is full.
    """
    member = expert.member
    require_linear(expert.names)
    modules = [name.removesuffix(".weight") for name in expert.names]
    config: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_of(lm),
        "inference_mode": True,
        "target_modules": target_modules(lm, modules),
        "modules_to_save": None,
    }
    if isinstance(member, LoRA):
        config |= {
            "peft_type": "LORA",
            "r": member.r,
            "lora_alpha": member.alpha,
            "lora_dropout": member.dropout,
            "use_rslora": isinstance(member, RsLoRA),
            "use_dora": isinstance(member, DoRA),
            "bias": "none",
        }
    elif isinstance(member, IA3):
        inputs = [module for module in config["target_modules"] if module.rpartition(".")[2] in FEED_FORWARD]
        config |= {"peft_type": "IA3", "feedforward_modules": inputs}  # PEFT wants them spelt as among the targets
    else:
        raise UserError(f"PEFT has no adapter like {member}; export with --format hf, whose weights are merged")
    names = {part: key for key, part in _PARTS.items()}
    tensors = {}
    for name, value in expert.raw.items():
        key = f"{_PREFIX}{name.removesuffix('.weight')}"
        if isinstance(value, Mapping):
            tensors |= {f"{key}.{names[part]}": np.asarray(x, np.float32).astype(dtype) for part, x in value.items()}
        else:
            axis = 0 if name.split(".")[-2] in FEED_FORWARD else 1
            tensors[f"{key}.ia3_l"] = np.expand_dims(np.asarray(value, np.float32), axis).astype(dtype)
    about = {"base": lm.name, "fingerprint": lm.fingerprint, "parametrisation": str(member)}
    readme = f"---\nbase_model: {base_of(lm)}\nlibrary_name: peft\n---\n# {title}\n\n{member} of sva, for {lm.name}.\n"

    def write(place: Path) -> None:
        weights, settings = place / "adapter_model.safetensors", place / "adapter_config.json"
        settings.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (place / "README.md").write_text(readme, encoding="utf-8")
        save_tensors(weights, tensors, {"format": "pt", "sva": json.dumps(about)})
        shutil.copymode(settings, weights)  # the library writes files that only their owner may read

    write_directory(directory, write)
    return f"{config['peft_type']}, {len(modules)} matrices, {member}"


def read_adapter(directory: str | Path, lm: LM) -> Expert:
    """The expert that an adapter directory of PEFT holds, for the base model `lm`.

    Where ranks or scales differ between modules, thinner matrices are filled up with zeros and B takes the scale in.

    Raises:
      UserError: files are missing or of another base model, a kind of adapter that sva does not have, or arrays of
        modules that the model lacks or of another shape (named).
    """
    directory = Path(directory)
    config, tensors, about = _files(directory)
    if about.get("fingerprint") not in (None, lm.fingerprint):
        raise UserError(
            f"{directory} is an adapter of {about.get('base')} ({about['fingerprint'][:12]}), not of {lm.name} "
            f"({lm.fingerprint[:12]}); load that base model"
        )
    _check_config(directory, config)
    modules = _by_module(directory, lm, tensors)
    raw, spelling = _ia3(directory, lm, modules) if config["peft_type"] == "IA3" else _lora(directory, config, modules)
    known = {"base": lm.name, "fingerprint": lm.fingerprint, "imported_from": {"layout": f"PEFT {config['peft_type']}"}}
    expert = Expert(raw, spelling, known)
    _check_shapes(directory, lm, expert)
    return expert


def _files(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Any]]:
    """(adapter_config.json, the arrays in float32, what sva said of them)."""
    settings, weights = directory / "adapter_config.json", directory / "adapter_model.safetensors"
    for path in (settings, weights):
        if not path.is_file():
            raise UserError(f"{directory} holds no {path.name}; give the directory that PEFT's save_pretrained wrote")
    try:
        with safetensors.safe_open(weights, framework="numpy") as file:
            tensors = {key: file.get_tensor(key).astype(np.float32) for key in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{weights} is damaged or no safetensors file ({error}); fetch it again") from error
    return read_json(settings), tensors, json.loads(header.get("sva", "{}"))


def _check_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError for what sva has no counterpart of."""
    where = directory / "adapter_config.json"
    kind = config.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise UserError(f"{where}: peft_type is {kind}; sva reads LORA (rsLoRA and DoRA too) and IA3")
    for setting, plain in (
        ("bias", "none"),
        ("modules_to_save", None),
        ("fan_in_fan_out", False),
        ("lora_bias", False),
    ):
        if config.get(setting) and config[setting] != plain:
            raise UserError(f"{where}: {setting}={config[setting]!r} trains what sva does not; it must be {plain!r}")
    for setting in _OTHER_MEANING:
        if config.get(setting):
            raise UserError(f"{where}: {setting} makes PEFT apply the adapter as sva cannot; it must be null")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        raise UserError(
            f"{where}: init_lora_weights={start!r} makes PEFT change the base weights too when it loads; save it with "
            "path_initial_model_for_weight_conversion, or merge it in PEFT"
        )


def _by_module(directory: Path, lm: LM, tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """{weight name: {part: array}} of the arrays of a file."""
    weights = expected(lm.model.cfg)
    found: dict[str, dict[str, np.ndarray]] = {}
    foreign = []
    for key, x in tensors.items():
        ending = next((ending for ending in _PARTS if key.endswith(f".{ending}")), None)
        module = key.removeprefix(_PREFIX).removesuffix(f".{ending}")
        if ending is None or len(getattr(weights.get(f"{module}.weight"), "shape", ())) != 2 or "_proj" not in module:
            foreign.append(key.removeprefix(_PREFIX))
        else:
            found.setdefault(f"{module}.weight", {})[_PARTS[ending]] = x
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise UserError(
            f"{directory} holds {', '.join(foreign[:3])}{more}, which {lm.name} has no linear layer for; is it for "
            "another model?"
        )
    order = {name: place for place, name in enumerate(weights)}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _ia3(directory: Path, lm: LM, modules: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[dict[str, np.ndarray], str]:
    """(raw, spelling) of an IA3 adapter."""
    raw = {}
    for name, parts in modules.items():
        is_input = name.split(".")[-2] in FEED_FORWARD
        factors, shape = parts.get("factors"), expected(lm.model.cfg)[name].shape
        wanted = (1, shape[1]) if is_input else (shape[0], 1)
        if factors is None or factors.shape != wanted:
            found = "nothing" if factors is None else f"ia3_l of shape {list(factors.shape)}"
            side = "inputs" if is_input else "outputs"
            raise UserError(f"{directory}: {name} has {found}; sva scales its {side}, by {list(wanted)}")
        raw[name] = factors.ravel()
    return raw, str(IA3())


def _lora(
    directory: Path, config: Mapping[str, Any], modules: Mapping[str, Mapping[str, np.ndarray]]
) -> tuple[dict[str, dict[str, np.ndarray]], str]:
    """(raw, spelling) of a LoRA, rsLoRA or DoRA adapter."""
    wanted = {"a", "b", "magnitude"} if config.get("use_dora") else {"a", "b"}
    scales = {}
    for name, parts in modules.items():
        if parts.keys() != wanted:
            told = sorted(parts.keys() ^ wanted)
            raise UserError(f"{directory}: {name} lacks, or has beyond what the settings say, {', '.join(told)}")
        rank = len(parts["a"])
        alpha = _pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
        scales[name] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    ranks = {len(parts["a"]) for parts in modules.values()}
    r, is_even = max(ranks), len(ranks) == len(set(scales.values())) == 1
    raw = {name: dict(parts) for name, parts in modules.items()}
    if not is_even:
        for name, parts in raw.items():
            more = r - len(parts["a"])
            parts["a"] = np.pad(parts["a"], ((0, more), (0, 0)))
            parts["b"] = np.pad(parts["b"] * np.float32(scales[name]), ((0, 0), (0, more)))
    scale, dropout = next(iter(scales.values())) if is_even else 1.0, float(config.get("lora_dropout") or 0)
    if config.get("use_dora"):
        return raw, str(DoRA(r, scale * r, dropout))
    if config.get("use_rslora") and is_even:
        return raw, str(RsLoRA(r, scale * r**0.5, dropout))
    return raw, str(LoRA(r, scale * r, dropout))


def _pattern(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    """What a pattern of PEFT says of a module: the first key that is its name, or the end of it."""
    module = name.removesuffix(".weight")
    found = (x for key, x in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def _check_shapes(directory: Path, lm: LM, expert: Expert) -> None:
    """Raises UserError unless every array has the shape that the model's weights ask for."""
    weights = expected(lm.model.cfg)
    infos = {}
    for name in expert.names:
        out, into = weights[name].shape
        infos[name] = Matrix(np.uint32(0), (out, into), name.split(".")[-2], norms=np.zeros(out, np.float32))
    try:
        check_raw(expert.member, expert.raw, infos)
    except UserError as error:
        raise UserError(f"{directory}: {error}; is it for another model than {lm.name}?") from error
