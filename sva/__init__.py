"""sva, singular-value adaptation: train, mix and serve singular-value experts for language models in JAX.

A name below is imported when it is first used, so that `import sva`, and a command that only prints its help, do not
wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sva.adaptation.adaptive_lm import AdaptiveLM, adaptive
    from sva.adaptation.two_pass import two_pass
    from sva.ensembles.ensemble import Ensemble, ensemble
    from sva.evaluation.evaluate import evaluate
    from sva.generation.complete import CompleteOptions, complete
    from sva.generation.decode import Generation
    from sva.generation.decompose import decompose
    from sva.generation.frozen import frozen
    from sva.generation.lm import LM
    from sva.generation.load import load, quantise
    from sva.generation.merge import factored, merge
    from sva.generation.sampling import Greedy, MinP, Temperature, TopK, TopP
    from sva.models.transformer import logits
    from sva.parallel.mesh_config import MeshConfig
    from sva.parallel.sharding import make_mesh
    from sva.spectral.expert import Expert
    from sva.spectral.forms import Spectrum
    from sva.spectral.mixing import bank, mix
    from sva.spectral.parametrisations import family
    from sva.tasks import task
    from sva.training.config import Config
    from sva.training.config.reinforce import ReinforceConfig
    from sva.training.reinforce import Batch, reinforce_loss
    from sva.training.run import train
    from sva.utils.errors import UserError

_MODULES = {
    "sva.adaptation.adaptive_lm": ("AdaptiveLM", "adaptive"),
    "sva.adaptation.two_pass": ("two_pass",),
    "sva.ensembles.ensemble": ("Ensemble", "ensemble"),
    "sva.evaluation.evaluate": ("evaluate",),
    "sva.generation.complete": ("CompleteOptions", "complete"),
    "sva.generation.decode": ("Generation",),
    "sva.generation.decompose": ("decompose",),
    "sva.generation.frozen": ("frozen",),
    "sva.generation.lm": ("LM",),
    "sva.generation.load": ("load", "quantise"),
    "sva.generation.merge": ("factored", "merge"),
    "sva.generation.sampling": ("Greedy", "MinP", "Temperature", "TopK", "TopP"),
    "sva.models.transformer": ("logits",),
    "sva.parallel.mesh_config": ("MeshConfig",),
    "sva.parallel.sharding": ("make_mesh",),
    "sva.spectral.expert": ("Expert",),
    "sva.spectral.forms": ("Spectrum",),
    "sva.spectral.mixing": ("bank", "mix"),
    "sva.spectral.parametrisations": ("family",),
    "sva.tasks": ("task",),
    "sva.training.config": ("Config",),
    "sva.training.config.reinforce": ("ReinforceConfig",),
    "sva.training.reinforce": ("Batch", "reinforce_loss"),
    "sva.training.run": ("train",),
    "sva.utils.errors": ("UserError",),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "LM",
    "AdaptiveLM",
    "Batch",
    "CompleteOptions",
    "Config",
    "Ensemble",
    "Expert",
    "Generation",
    "Greedy",
    "MeshConfig",
    "MinP",
    "ReinforceConfig",
    "Spectrum",
    "Temperature",
    "TopK",
    "TopP",
    "UserError",
    "adaptive",
    "bank",
    "complete",
    "decompose",
    "ensemble",
    "evaluate",
    "factored",
    "family",
    "frozen",
    "load",
    "logits",
    "make_mesh",
    "merge",
    "mix",
    "quantise",
    "reinforce_loss",
    "task",
    "train",
    "two_pass",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'sva' has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_WHERE[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
