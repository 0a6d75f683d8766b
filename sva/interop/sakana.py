"""Experts of Transformer-Squared's public code (SakanaAI/self-adaptive-llms, commit 03a41ae), read as sva's.

What that code saves, all on the mlp weights gate, up and down of every layer (its `policy/` and `svd_reinforce_hydra`):

- `policy_params*.pt`: `learnable_params_module_list.<i>`, p of the i-th mlp weight, bfloat16;
- `learnable_params*.pt`: p under the weight's checkpoint name, Parameters in bfloat16;
- `policy_params*.pt` of a few-shot mixture: `adaptive_weights` [E, 1 or M], and the p of each expert e as
  `weights_<e>_k_<name>`, dots as underscores;
- `learnable_params*.pt` of a mixture: sum of alpha p under the weight's name, no Parameters.

It composes W' = c U diag(s m) V^T with c = sum(s) / sum(s m), where m = max_mult sigmoid(p), and for a mixture
m = sum of alpha p (no sigmoid). max_mult and any normalisation of alpha cancel in c, so nothing of its settings is
needed: the first two are `sigmoid_nuclear` experts, mixtures become `linear` ones. Deviation: m is not rounded to
bfloat16 on the way, which there changes z by up to 0.4 %.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sva.generation.decompose import spectra_of
from sva.generation.lm import LM
from sva.interop.torch_files import SavedTensor, read_tensors
from sva.models.weights import expected
from sva.spectral.expert import Expert
from sva.utils.errors import UserError
from sva.utils.remote import local_path
from sva.utils.trees import select

_MODULE_LIST = "learnable_params_module_list."
_MIXTURE = "adaptive_weights"


def read_expert(path: str | Path, lm: LM) -> Expert:
    """The expert in a `.pt` file of the public code, for the base model that it was trained on.

    The file does not say which model that was; names and lengths are all that can be compared.

    Args:
      path: any of the four kinds of file above, told apart by what they hold.
      lm: the base model. For a mixture its mlp weights are decomposed, if they were not before.
    Raises:
      UserError: as `read_tensors`; neither layout, a weight missing or too many, a wrong length, NaN.
    """
    tensors = read_tensors(path)
    names = select(expected(lm.model.cfg), "mlp")
    shapes = {name: spec.shape for name, spec in expected(lm.model.cfg).items()}
    is_mixture = _MIXTURE in tensors
    if is_mixture:
        layout, vectors = "policy_params of a mixture", _mixture(path, tensors, names)
    elif any(key.startswith(_MODULE_LIST) for key in tensors):
        layout = "policy_params"
        vectors = _by_name(path, tensors, {f"{_MODULE_LIST}{i}": name for i, name in enumerate(names)})
    elif any(key in names for key in tensors):
        # a trained p is a Parameter; alpha p is computed from one, so that torch keeps its gradient's trace
        is_mixture = any(tensor.requires_grad and not tensor.is_parameter for tensor in tensors.values())
        layout = "learnable_params of a mixture" if is_mixture else "learnable_params"
        vectors = _by_name(path, tensors, {name: name for name in names})
    else:
        raise UserError(
            f"{path}: keys such as {next(iter(tensors))[:80]!r} are those of no file of the public code: expected "
            f"{_MODULE_LIST}0, {_MIXTURE}, or weight names such as {names[0]}"
        )
    raw = {}
    for name, vector in vectors.items():
        if vector.shape != (min(shapes[name]),):
            raise UserError(
                f"{path}: {name} has shape {list(vector.shape)}, {lm.name} needs [{min(shapes[name])}]; "
                "give --model the base model of this file"
            )
        raw[name] = vector.astype(np.float32)
        if not np.isfinite(raw[name]).all():
            raise UserError(f"{path}: {name} holds NaN or infinite values; take an earlier file of that run")
    if is_mixture:
        raw = _rescaled(path, raw, lm)
    metadata = {
        "base": lm.name,
        "fingerprint": lm.fingerprint,
        "targets": "mlp",
        "imported_from": {
            "file": Path(path).name,
            "sha256": hashlib.sha256(local_path(path, "a .pt file").read_bytes()).hexdigest(),
            "layout": layout,
        },
    }
    return Expert(raw, "linear" if is_mixture else "sigmoid_nuclear", metadata)


def _by_name(path: str | Path, tensors: Mapping[str, SavedTensor], names: Mapping[str, str]) -> dict[str, np.ndarray]:
    """{weight name: vector} of the keys {key: weight name}, which must be all there are."""
    missing = [name for key, name in names.items() if key not in tensors]
    extra = [key for key in tensors if key not in names]
    if missing or extra:
        count = f"{len(tensors)} tensors, the model has {len(names)} mlp weights"
        which = f"none for {missing[0]}" if missing else f"{extra[0][:80]!r} is none of them"
        raise UserError(f"{path}: {count}; {which}; give --model the base model of this file")
    return {name: tensors[key].array for key, name in names.items()}


def _mixture(path: str | Path, tensors: Mapping[str, SavedTensor], names: list[str]) -> dict[str, np.ndarray]:
    """m = sum over experts of alpha p, float32, for each weight."""
    alphas = tensors[_MIXTURE].array.astype(np.float32)
    if alphas.ndim != 2 or alphas.shape[1] not in (1, len(names)):
        raise UserError(f"{path}: {_MIXTURE} has shape {list(alphas.shape)}, expected [experts, 1 or {len(names)}]")
    experts = []
    for number in range(len(alphas)):
        prefix = f"weights_{number}_k_"
        own = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        experts.append(_by_name(path, own, {prefix + name.replace(".", "_"): name for name in names}))
    known = re.compile(r"weights_(\d+)_k_")
    for key in tensors:
        match = known.match(key)
        if key != _MIXTURE and (match is None or int(match[1]) >= len(alphas)):
            raise UserError(f"{path}: {key[:80]!r} belongs to none of the {len(alphas)} experts of the mixture")
    columns = np.broadcast_to(alphas, (len(alphas), len(names)))
    mixed = {}
    for column, name in enumerate(names):
        vectors = [expert[name] for expert in experts]
        if len({vector.shape for vector in vectors}) > 1:
            raise UserError(f"{path}: the experts' vectors for {name} differ in length")
        mixed[name] = sum(a * v.astype(np.float32) for a, v in zip(columns[:, column], vectors, strict=True))
    return mixed


def _rescaled(path: str | Path, mixed: Mapping[str, np.ndarray], lm: LM) -> dict[str, np.ndarray]:
    """Effective z = m sum(s) / sum(s m), which keeps the nuclear norm as the public code does."""
    spectra = spectra_of(lm, list(mixed))
    z = {}
    for name, m in mixed.items():
        s = np.asarray(spectra[name].s, np.float64)
        weighted = float((s * m).sum())
        if not abs(weighted) > 1e-6 * s.sum():
            raise UserError(f"{path}: the mixture for {name} adds up to nothing and cannot be rescaled")
        z[name] = (m * (s.sum() / weighted)).astype(np.float32)
    return z
