"""sva, singular-value adaptation: train, mix and serve singular-value experts for language models in JAX."""

from sva.adapt import two_pass
from sva.errors import UserError
from sva.generate import Generation
from sva.lm import LM, decompose, factored, load, merge, quantise
from sva.models.transformer import logits
from sva.reinforce import Batch, ReinforceConfig, reinforce_loss
from sva.sampling import Greedy, MinP, Temperature, TopK, TopP
from sva.sharding import MeshConfig, make_mesh
from sva.spectral.expert import Expert, bank, mix
from sva.spectral.family import family
from sva.spectral.forms import Spectrum
from sva.tasks import task

__all__ = [
    "LM",
    "Batch",
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
    "bank",
    "decompose",
    "factored",
    "family",
    "load",
    "logits",
    "make_mesh",
    "merge",
    "mix",
    "quantise",
    "reinforce_loss",
    "task",
    "two_pass",
]
