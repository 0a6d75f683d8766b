"""Searches that need no gradient: pure functions init, ask and tell over any tree of arrays.

    state = search.init(mean)                         # z by weight name, or alphas [E] or [M, E]
    population = search.ask(state, key)               # the same tree, every leaf with P members in front
    state = search.tell(state, population, fitness)   # [P] float32, larger is better
    search.solution(state)

Strategies are frozen dataclasses, so they are static under jit; states are trees of arrays, so they are saved as any
training state is. A member's fitness may be minus infinity or NaN, the least there is.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.flatten_util import ravel_pytree

from sva.training.config.evolution import EvolutionConfig, check_cem, check_es


class Search(Protocol):
    """A population search."""

    @property
    def population(self) -> int:
        """P, members a generation."""
        ...

    def init(self, mean: Any) -> Any:
        """The state that searches around `mean`."""
        ...

    def ask(self, state: Any, key: jax.Array) -> Any:
        """P members, a leading axis on every leaf."""
        ...

    def tell(self, state: Any, population: Any, fitness: jax.Array, ties: jax.Array | None = None) -> Any:
        """The state updated by the fitness [P] of the members of `ask`; `ties` [P] decides between equals."""
        ...

    def solution(self, state: Any) -> Any:
        """What has been found so far, a tree like `mean`."""
        ...


@struct.dataclass
class ESState:
    """Where the search is, and its optimiser."""

    mean: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class OpenAIES:
    """Evolution strategies (Salimans et al., arXiv 1703.03864): Adam on an estimate of the smoothed fitness' gradient.

        g = 1 / (P sigma) sum_i rank(f_i) epsilon_i,   member i = mean + sigma epsilon_i

    Noise comes in mirrored pairs and fitness is replaced by its rank, from -1/2 to 1/2 (sections 2.1 and 3).
    Deviations: equal fitness shares its mean rank, so that a generation of equals adds nothing to the gradient (with a
    handful of prompts most are equal; what moves the mean then is Adam's momentum alone); no weight decay.
    """

    population: int = 32
    sigma: float = 0.1  # standard deviation of the noise
    lr: float = 1e-2

    def __post_init__(self) -> None:
        check_es(self.population, self.sigma)

    def init(self, mean: Any) -> ESState:
        """See `Search`."""
        return ESState(mean, optax.adam(self.lr).init(mean))

    def ask(self, state: ESState, key: jax.Array) -> Any:
        """See `Search`."""
        flat, members = _members(state.mean)
        noise = jax.random.normal(key, (self.population // 2, flat.size))
        return members(flat[None, :] + self.sigma * jnp.concatenate([noise, -noise]))

    def tell(self, state: ESState, population: Any, fitness: jax.Array, ties: jax.Array | None = None) -> ESState:
        """See `Search`; `ties` are not used."""
        del ties
        steps = self.gradient(state, population, fitness)
        updates, opt_state = optax.adam(self.lr).update(jax.tree.map(jnp.negative, steps), state.opt_state)
        return ESState(optax.apply_updates(state.mean, updates), opt_state)

    def gradient(self, state: ESState, population: Any, fitness: jax.Array) -> Any:
        """The estimate g, a tree like the mean; it points to where fitness rises."""
        weights = ranks(fitness) / (self.population * self.sigma**2)

        def one(mean: jax.Array, members: jax.Array) -> jax.Array:
            return jnp.tensordot(weights, members - mean[None], axes=1, precision=jax.lax.Precision.HIGHEST)

        return jax.tree.map(one, state.mean, population)

    def solution(self, state: ESState) -> Any:
        """The mean."""
        return state.mean


def ranks(fitness: jax.Array) -> jax.Array:
    """[P] float32 ranks from -1/2 (worst) to 1/2 (best), equals sharing theirs; NaN is worst."""
    fitness = _ordered(fitness)
    below = (fitness[None, :] < fitness[:, None]).sum(axis=1)
    equal = (fitness[None, :] == fitness[:, None]).sum(axis=1) - 1
    return (below + equal / 2) / (fitness.size - 1) - 0.5


@struct.dataclass
class CEMState:
    """The normal distribution that members are drawn from, and the best of the last generation."""

    mean: Any
    std: Any
    best: Any


@dataclasses.dataclass(frozen=True)
class CEM:
    """Cross-entropy method (Rubinstein 1999): each generation is drawn around the best members of the one before.

    By default elites are chosen by fitness and then by `ties`, and the solution is the distribution's mean. With
    `reference` the rules are those of Transformer-Squared's public code (SakanaAI/self-adaptive-llms, commit 03a41ae,
    few-shot adaptation: population 32, elite ratio 0.2, low 0, high 1, sigma 1/2, 50 generations): elites ignore ties,
    which decide on the best member alone; the best member, not the mean, is the solution, and the next generation's
    first; int(elite_ratio * P) elites may be none, which there means everyone, or one, whose standard deviation is
    NaN for ever. Deviation: which of equally fit members are elites is left open there (numpy's argpartition), and is
    the earlier ones here.
    """

    population: int = 32
    elite_ratio: float = 0.2
    sigma: float = 0.5  # standard deviation of the first generation
    low: float | None = None  # members are clamped to low..high
    high: float | None = None
    smoothing: float = 0.0  # weight of the old distribution in the new one
    reference: bool = False

    def __post_init__(self) -> None:
        check_cem(self.population, self.elite_ratio, self.sigma, self.smoothing, fewest=0 if self.reference else 2)

    @property
    def elites(self) -> int:
        """How many members the next generation is drawn around."""
        return int(self.elite_ratio * self.population)

    def init(self, mean: Any) -> CEMState:
        """See `Search`."""
        return CEMState(mean, jax.tree.map(lambda x: jnp.full_like(x, self.sigma), mean), mean)

    def ask(self, state: CEMState, key: jax.Array) -> Any:
        """See `Search`."""
        flat, members = _members(state.mean)
        noise = jax.random.normal(key, (self.population, flat.size))
        drawn = jnp.clip(flat[None, :] + noise * ravel_pytree(state.std)[0][None, :], self.low, self.high)
        if self.reference:
            drawn = drawn.at[0].set(ravel_pytree(state.best)[0])
        return members(drawn)

    def tell(self, state: CEMState, population: Any, fitness: jax.Array, ties: jax.Array | None = None) -> CEMState:
        """See `Search`."""
        fitness = _ordered(fitness)
        ties = jnp.zeros_like(fitness) if ties is None else _ordered(ties)
        order = jnp.lexsort((-ties, -fitness))  # stable: of equals the earlier member first
        best = jax.tree.map(lambda x: x[order[0]], population)
        chosen = jnp.argsort(-fitness, stable=True) if self.reference else order
        chosen = chosen[: self.elites or self.population]

        def blend(old: jax.Array, new: jax.Array) -> jax.Array:
            return self.smoothing * old + (1 - self.smoothing) * new

        elite = jax.tree.map(lambda x: x[chosen], population)
        mean = jax.tree.map(lambda old, x: blend(old, x.mean(axis=0)), state.mean, elite)
        # As torch.std: one less than there are; 0 / 0 of a single elite is NaN there as well.
        freedom = 1 if self.reference else 0
        std = jax.tree.map(lambda old, x: blend(old, x.std(axis=0, ddof=freedom)), state.std, elite)
        return CEMState(mean, std, best)

    def solution(self, state: CEMState) -> Any:
        """The mean; with `reference`, the best member of the last generation."""
        return state.best if self.reference else state.mean


def _members(tree: Any) -> tuple[jax.Array, Any]:
    """(the tree as one vector [D], the function from [P, D] to the tree with P in front of every leaf)."""
    flat, unravel = ravel_pytree(tree)
    return flat, jax.vmap(unravel)


def _ordered(x: jax.Array) -> jax.Array:
    """float32, NaN as minus infinity."""
    return jnp.nan_to_num(x.astype(jnp.float32), nan=-jnp.inf, posinf=jnp.inf, neginf=-jnp.inf)


def search_of(cfg: EvolutionConfig, *, lr: float, centre: float, bound: float | None) -> OpenAIES | CEM:
    """The search that `cfg` describes, around raw values whose base is at `centre`."""
    if cfg.strategy == "es":
        return OpenAIES(cfg.population, cfg.sigma, lr)
    low, high = (None, None) if bound is None else (centre - bound, centre + bound)
    return CEM(cfg.population, cfg.elite_ratio, cfg.sigma, low, high, cfg.smoothing)
