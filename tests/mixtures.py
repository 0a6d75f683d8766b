"""A toy mixture of experts with a tokenizer, for tests of whole runs."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from sva.generation.lm import LM
from sva.generation.testing import tokenizer, toy_config
from sva.models.moe_config import Moe
from sva.models.transformer import Transformer
from sva.models.weights import expected


def toy_mixture(modules: int) -> LM:
    """An OLMoE of two layers with so many modules, of which two serve a token."""
    moe = Moe(modules, 2, 48, renormalise=True, layers=(True, True))
    cfg = dataclasses.replace(toy_config(), architecture="olmoe", qk_norm="full", moe=moe)
    model, rng = Transformer(cfg), np.random.default_rng(0)
    named = {}
    for name, spec in expected(cfg).items():
        weight = rng.standard_normal(spec.shape) / np.sqrt(spec.shape[-1])
        named[name] = jnp.asarray(np.ones(spec.shape) if "norm" in name else weight, jnp.float32)
    return LM(model, model.nest(named), tokenizer(), "mixture")
