"""sva, singular-value adaptation: train, mix and serve singular-value experts for language models in JAX."""

from sva.adaptation.two_pass import two_pass
from sva.generation.decode import Generation
from sva.generation.lm import LM, decompose, factored, load, merge, quantise
from sva.generation.sampling import Greedy, MinP, Temperature, TopK, TopP
from sva.models.transformer import logits
from sva.parallel.sharding import MeshConfig, make_mesh
from sva.spectral.expert import Expert
from sva.spectral.forms import Spectrum
from sva.spectral.mixing import bank, mix
from sva.spectral.parametrisations import family
from sva.tasks import task
from sva.training.reinforce import Batch, ReinforceConfig, reinforce_loss
from sva.utils.errors import UserError

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
