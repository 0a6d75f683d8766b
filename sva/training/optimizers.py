"""The optimiser: clipped Adam or AdamW, in float32 or, as torch's is on bfloat16 parameters, in bfloat16."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from sva.training.config.train import TrainConfig


@struct.dataclass
class UpdateConfig:
    """Settings of one update. All but the first two are static under jit: another rate or decay compiles nothing."""

    lr: jax.Array | float
    weight_decay: jax.Array | float
    optimizer: str = struct.field(pytree_node=False)
    clip_norm: float = struct.field(pytree_node=False)
    micro_batch: int = struct.field(pytree_node=False)
    remat: bool = struct.field(pytree_node=False)
    param_dtype: str = struct.field(pytree_node=False)
    bound: float | None = struct.field(pytree_node=False)


def update_config(cfg: TrainConfig, step: int = 0) -> UpdateConfig:
    """Those settings of `cfg` that a step's update depends on; of its number of steps the learning rate alone."""
    settings: dict[str, Any] = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(UpdateConfig)}
    settings["lr"] = cfg.lr_at(step)
    return UpdateConfig(**settings)


def optimizer(cfg: UpdateConfig) -> optax.GradientTransformation:
    """Adam on clipped gradients, as the public code; or AdamW (arXiv 1711.05101)."""
    lr: Any = cfg.lr  # may be traced
    if cfg.optimizer == "adamw":
        adam = optax.adamw(lr, weight_decay=cfg.weight_decay)  # pyright: ignore[reportArgumentType]
    else:
        adam = bfloat16_adam(lr) if cfg.param_dtype == "bfloat16" else optax.adam(lr)
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adam)


class Bfloat16AdamState(NamedTuple):
    """Updates done, and both moments in bfloat16."""

    step: jax.Array  # [] int32
    mu: Any
    nu: Any


def bfloat16_adam(
    lr: jax.Array | float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Adam (arXiv 1412.6980) in the steps of torch.optim.Adam, every intermediate result rounded to bfloat16.

    The update itself is float32: added to a bfloat16 parameter it is rounded once, as torch's `addcdiv_` does. What
    follows from eight bits of precision, and is the point: the second moment hardly decays (0.999 v rounds back to v),
    and a parameter stands still where the update is under half its spacing. At lr 2e-3 that is from |p| = 1 on, the
    public code's unwritten trust region.

    Rounding is `reduce_precision`, which XLA must keep; a plain cast to bfloat16 and back it may leave out. Deviations
    from torch: bias corrections are float32 instead of float64, so that a rounding may once fall the other way (none
    does in 600 steps of 512 parameters, the test's); gradients are rounded after clipping, not before.
    """

    def rounded(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    def init(params: Any) -> Bfloat16AdamState:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), params)
        return Bfloat16AdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(updates: Any, state: Bfloat16AdamState, params: Any = None) -> tuple[Any, Bfloat16AdamState]:
        del params
        done = state.step + 1
        # 1 - b^count, without the cancellation that float32 would suffer in the first steps.
        first, second = (-jnp.expm1(done * jnp.log1p(jnp.float32(b - 1))) for b in (b1, b2))
        step, root = lr / first, jnp.sqrt(second)
        grads = jax.tree.map(rounded, updates)

        def moment(m: jax.Array, g: jax.Array) -> jax.Array:
            m = m.astype(jnp.float32)
            return rounded(m + (1 - b1) * (g - m))

        def square(v: jax.Array, g: jax.Array) -> jax.Array:
            return rounded(rounded(v.astype(jnp.float32) * b2) + (1 - b2) * g * g)

        def change(m: jax.Array, v: jax.Array) -> jax.Array:
            return -step * m / rounded(rounded(rounded(jnp.sqrt(v)) / root) + eps)

        mu, nu = jax.tree.map(moment, state.mu, grads), jax.tree.map(square, state.nu, grads)
        kept = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (mu, nu))
        return jax.tree.map(change, mu, nu), Bfloat16AdamState(done, *kept)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
