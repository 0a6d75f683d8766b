"""The jitted functions of a run with the shapes they would get: the update, the rollout's two and the two passes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sva.adaptation.adaptive_lm import SLOTS
from sva.adaptation.dispatchers import DispatchBatch, Scored, ServingState
from sva.adaptation.label_scoring import ScoringState, TokenBatch
from sva.adaptation.two_pass import Request, two_pass
from sva.cli.aot.flops import read_flops, round_flops, two_pass_flops, update_flops
from sva.cli.aot.shapes import (
    Shapes,
    bank_of,
    cache_of,
    keys_of,
    params_of,
    rows_of,
    run_holds,
    spectra_of,
    targets_of,
    whole,
    z_of,
)
from sva.generation import engine
from sva.generation.decode import DecodeState
from sva.generation.engine import EngineConfig
from sva.generation.sampling import Greedy
from sva.generation.weights import Weights
from sva.spectral.forms import Spectrum, adapters
from sva.spectral.mixing import FactoredSlots
from sva.spectral.parametrisations import family
from sva.training.optimizers import update_config
from sva.training.reinforce import Batch
from sva.training.rollout import PromptShape, engine_config, sampling_of
from sva.training.update import train_step
from sva.utils.padding import prompt_bucket, round_up

PREFIX, LABELS = 128, 4  # tokens of the classification question, labels of two tokens each


class Program(NamedTuple):
    """One jitted function with the shapes it would get."""

    lower: Callable[[], Any]  # -> jax.stages.Lowered
    kinds: Mapping[str, Any]  # trees of jax.ShapeDtypeStruct by what they hold, beside what a run always holds
    cache: Any  # the key/value cache among its temporaries, likewise; None for none
    flops: int  # of its products, counted from the model's sizes
    open_turns: int  # of its decoding loop


def update(shapes: Shapes) -> Program:
    """One training step."""
    config = shapes.config
    prompts, rows = config.rollout.prompts, config.rollout.prompts * config.rollout.samples
    batch = Batch(
        prompt_ids=rows_of(shapes, prompts, shapes.prompt),
        prompt_mask=rows_of(shapes, prompts, shapes.prompt),
        completion_ids=rows_of(shapes, rows, shapes.new),
        completion_mask=rows_of(shapes, rows, shapes.new),
        advantages=rows_of(shapes, rows, dtype=jnp.float32),
        sampled=rows_of(shapes, rows, shapes.new, dtype=jnp.float32),
        temperature=rows_of(shapes, rows, dtype=jnp.float32) if config.rollout.is_tempered else None,
    )
    held = run_holds(shapes)

    def lower() -> Any:
        settings = {
            "family": family(config.parametrisation),
            "loss": config.reinforce,
            "cfg": update_config(config.train),
        }
        arguments = held["state"], held["spectra"], held["weights"], batch
        return train_step.lower(*arguments, model=shapes.model, **settings)

    return Program(lower, {"batch": batch}, None, update_flops(shapes), 1)


def read(shapes: Shapes) -> Program:
    """The prompts that a rollout reads at a time."""
    cfg, slots = _engine(shapes), prompt_bucket(shapes.prompt)
    weights, merged = _rollout_weights(shapes)
    ids = whole(shapes, (cfg.prompts, slots), jnp.int32)
    alphas = whole(shapes, (cfg.prompts, 0), jnp.float32)
    kinds = {"merged weights": merged, "prompts": cache_of(shapes, cfg.prompts, slots)}
    kinds["rows"] = _rows(shapes, cfg).slots
    flops = read_flops(shapes, cfg.prompts, slots, factored=shapes.is_factored)
    return Program(lambda: engine.read_prompts.lower(weights, ids, ids, alphas, slots=slots), kinds, None, flops, 1)


def rollout(shapes: Shapes) -> Program:
    """One round of a rollout, from the merged weights or from the spectra, as rollout.form says."""
    cfg = _engine(shapes)
    weights, merged = _rollout_weights(shapes)
    state = _rows(shapes, cfg)

    def lower() -> Any:
        return engine.advance.lower(weights, state, sampling=sampling_of(shapes.config.rollout), steps=cfg.steps)

    slots = state.slots.valid.shape[1]
    flops = round_flops(shapes, cfg.rows, slots, cfg.steps, factored=shapes.is_factored)
    return Program(lower, {"merged weights": merged, "rows": state.slots}, None, flops, cfg.steps)


def _engine(shapes: Shapes) -> EngineConfig:
    """The shapes of the engine's programs."""
    prompt = PromptShape(shapes.prompt, shapes.prompt, 0)
    return engine_config(shapes.config.rollout, prompt, shapes.new, shapes.platform)


def _rollout_weights(shapes: Shapes) -> tuple[Weights, Any]:
    """(what the engine reads, the merged weights among it: None where there are none)."""
    params = run_holds(shapes)["weights"]
    spectra = spectra_of(shapes) if shapes.is_factored else None
    adapter = adapters(spectra, z_of(shapes)) if spectra is not None else None
    weights = Weights(shapes.model, params, whole(shapes, (4,), jnp.int32), adapter)
    return weights, None if shapes.is_factored else targets_of(shapes)


def _rows(shapes: Shapes, cfg: EngineConfig) -> engine.State:
    """The rows at work, with all the slots that they may ever have."""
    most = prompt_bucket(shapes.prompt) + round_up(shapes.new, cfg.steps)
    numbers = [whole(shapes, (cfg.rows,), jnp.int32) for _ in range(5)]
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), cfg.rows))
    keys: Any = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=numbers[0].sharding)
    token, position, count, limit, used = numbers
    decoding = DecodeState(token, position, count, whole(shapes, (cfg.rows,), jnp.bool_), limit, keys)
    slots = cache_of(shapes, cfg.rows, round_up(most, cfg.tier))
    return engine.State(decoding, slots, used, whole(shapes, (cfg.rows, 0), jnp.float32))


def both_passes(shapes: Shapes) -> Program:
    """Dispatch and answer, every row with a mixture of its own, in the factored form."""
    config = shapes.config
    rows = config.rollout.prompts * config.rollout.samples
    params, spectra = params_of(shapes, without_targets=True), spectra_of(shapes)
    table = bank_of(shapes)
    bank = jax.tree.map(FactoredSlots, spectra, table, is_leaf=lambda x: isinstance(x, Spectrum))
    states, scored = 2 * LABELS - 1, 3 * LABELS - 1
    numbers = {"label_ids": states, "label_depth": states}
    numbers |= {"target_from": scored, "target_ids": scored, "target_label": scored}
    scoring = ScoringState(
        prefix=cache_of(shapes, 1, PREFIX),
        label_mask=whole(shapes, (states, states), jnp.bool_),
        bias=whole(shapes, (LABELS,), jnp.float32),
        **{name: whole(shapes, (size,), jnp.int32) for name, size in numbers.items()},
    )
    prompts = TokenBatch(rows_of(shapes, rows, shapes.prompt), rows_of(shapes, rows, shapes.prompt))
    request = Request(
        prompts,
        limit=whole(shapes, (), jnp.int32),
        eos_ids=whole(shapes, (4,), jnp.int32),
        keys=keys_of(shapes, rows),
        max_new_tokens=shapes.new,
        sampling=Greedy(),
    )
    # The first pass runs on the base model, whose weights are the factored ones at z = 1: as an expert of ones.
    serving = ServingState(shapes.model, params, bank, SLOTS, slots=whole(shapes, (LABELS,), jnp.int32))
    dispatcher = Scored(scoring, expert=whole(shapes, (SLOTS,), jnp.float32))
    batch = DispatchBatch(prompts, prompts, right=rows_of(shapes, rows))

    def lower() -> Any:
        return two_pass.lower(serving, dispatcher, batch, request)

    kinds = {"experts": table, "batch": (dispatcher, batch)}
    cache = cache_of(shapes, rows, shapes.prompt), cache_of(shapes, rows, shapes.new - 1)
    return Program(lower, kinds, cache, two_pass_flops(shapes, states, PREFIX), shapes.new - 1)


PROGRAMS = {"update": update, "read": read, "rollout": rollout, "two_pass": both_passes}
