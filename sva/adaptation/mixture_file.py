"""The file of a few-shot adaptation: a mixture, the experts it mixes, and the settings of the search that found it.

    {"format": "sva-alphas-1", "base": {"name", "fingerprint"}, "experts": [{"label", "digest"}, ...],
     "alphas": [E numbers] or {weight name: [E numbers]}, "reference": false, "settings": {...}, "history": [...],
     "state": [...], "command": ..., "versions": {...}}

Experts are identified by the hash of their values, so that files may move. The search's state is in the file too: it is
written after every generation, and a search that was stopped resumes from it.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sva.adaptation.few_shot import draw, mixed, pool
from sva.generation.lm import LM
from sva.spectral.expert import Expert
from sva.tasks import task as make_task
from sva.utils.errors import UserError
from sva.utils.files import read_text, write_json
from sva.utils.remote import reaching, to_path

FORMAT = "sva-alphas-1"


@dataclasses.dataclass(frozen=True)
class Alphas:
    """One mixture of E experts and its record."""

    values: Any  # [E], or {weight name: [E]}
    experts: tuple[Mapping[str, str], ...]  # label and digest of each
    base: Mapping[str, str]  # name and fingerprint
    reference: bool = False  # mixed as the public code does
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # settings, history and the rest, JSON values

    def save(self, path: Path) -> None:
        """Writes the file, atomically."""
        per_matrix = isinstance(self.values, Mapping)
        values = {name: np.asarray(row).tolist() for name, row in self.values.items()} if per_matrix else None
        fixed = {
            "format": FORMAT,
            "base": dict(self.base),
            "experts": [dict(expert) for expert in self.experts],
            "alphas": values or np.asarray(self.values).tolist(),
            "reference": self.reference,
        }
        write_json(to_path(path), fixed | dict(self.record))

    @classmethod
    def load(cls, path: Path) -> "Alphas":
        """Reads a file that `save` wrote.

        Raises:
          UserError: no such file, no alphas file, a damaged one, or not one number for each expert.
        """
        path = to_path(path)
        with reaching(path):
            text = read_text(path) if path.is_file() else None
        if text is None:
            raise UserError(f"no alphas file at {path}; sva adapt writes one")
        try:
            known = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} is damaged or not an alphas file ({error}); run sva adapt again") from error
        if not isinstance(known, dict) or known.get("format") != FORMAT:
            raise UserError(f"{path} is not an alphas file of sva; sva adapt writes one")
        known.pop("format")
        if missing := [name for name in ("alphas", "experts", "base", "reference") if name not in known]:
            raise UserError(f"{path} is damaged: it lacks {missing[0]!r}; fetch it or run sva adapt again")
        if not all(isinstance(expert, dict) and {"label", "digest"} <= set(expert) for expert in known["experts"]):
            raise UserError(f"{path} is damaged: an expert lacks its label or digest; fetch it or run sva adapt again")
        values, experts = known.pop("alphas"), tuple(known.pop("experts"))
        for where, row in values.items() if isinstance(values, dict) else [("alphas", values)]:
            if np.shape(row) != (len(experts),):
                raise UserError(
                    f"{path}: {where} has {np.size(row)} numbers for {len(experts)} experts; run sva adapt again"
                )
        return cls(values, experts, known.pop("base"), known.pop("reference"), known)

    def array(self, names: Sequence[str]) -> np.ndarray:
        """[E], or [M, E] float32 for the matrices of these names.

        Raises:
          UserError: alphas of other matrices.
        """
        if not isinstance(self.values, Mapping):
            return np.asarray(self.values, np.float32)
        if set(self.values) != set(names):
            other = sorted(set(self.values) ^ set(names))[0]
            raise UserError(f"the alphas are of {len(self.values)} matrices, the experts of {len(names)}: see {other}")
        return np.asarray([self.values[name] for name in names], np.float32)

    def ordered(self, experts: Sequence[Expert]) -> list[Expert]:
        """The experts in the order of the alphas.

        Raises:
          UserError: they are not those that the alphas were found for; the first that is missing or too many is named.
        """
        given = {expert.digest: expert for expert in experts}
        for known in self.experts:
            if known["digest"] not in given:
                raise UserError(
                    f"the alphas are for an expert {known['label']!r} ({known['digest'][:12]}) that is not among those "
                    "given; name the same experts with --expert"
                )
        wanted = {known["digest"] for known in self.experts}
        for digest, expert in given.items():
            if digest not in wanted:
                label = expert.metadata.get("label", "")
                raise UserError(
                    f"the alphas know nothing of expert {label!r} ({digest[:12]}); leave it out, or run sva adapt "
                    "with it"
                )
        return [given[known["digest"]] for known in self.experts]


def identities(experts: Sequence[Expert]) -> tuple[dict[str, str], ...]:
    """Label and digest of each expert, as an alphas file has them.

    Raises:
      UserError: one is given twice.
    """
    digests = [expert.digest for expert in experts]
    for place, digest in enumerate(digests):
        if digest in digests[:place]:
            raise UserError(f"expert {place + 1} is the same as expert {digests.index(digest) + 1}; leave one out")
    return tuple({"label": expert.metadata.get("label", ""), "digest": expert.digest} for expert in experts)


def shots(alphas: Alphas) -> list[str]:
    """The texts (`Task.text`) of the examples that the alphas were found on, drawn again as `sva adapt` drew them."""
    settings = alphas.record.get("settings") or {}
    if not {"task", "split", "shots", "seed"} <= set(settings):
        return []
    how = {name: settings[name] for name in ("splits", "prompt") if name in settings}
    task = make_task(settings["task"], settings.get("grader", "strict"), **how)
    return [task.text(x) for x in draw(task, settings["split"], settings["shots"], settings["seed"]).examples]


def load_mixture(lm: LM, path: Path, experts: Sequence[Expert], *, progress: bool = True) -> LM:
    """The model with the mixture of an alphas file merged into its weights.

    Raises:
      UserError: as `Alphas.load`; another base model, or other experts.
    """
    alphas = Alphas.load(path)
    if alphas.base["fingerprint"] != lm.fingerprint:
        raise UserError(
            f"{path} was made for {alphas.base['name']} ({alphas.base['fingerprint'][:12]}), not for {lm.name} "
            f"({lm.fingerprint[:12]}); load that model"
        )
    members = pool(lm, alphas.ordered(experts), reference=alphas.reference, progress=progress)
    return mixed(lm, members, alphas.array(members.names))
