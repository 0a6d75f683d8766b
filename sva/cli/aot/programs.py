"""The jitted functions of a run with the shapes they would get: the update, the rollout and the two passes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sva.adaptation.adaptive_lm import SLOTS
from sva.adaptation.dispatchers import Rows, Scored
from sva.adaptation.label_scoring import Asked, FirstPass
from sva.adaptation.two_pass import Prompts, Request, Served, two_pass
from sva.cli.aot.flops import generation_flops, two_pass_flops, update_flops
from sva.cli.aot.shapes import Shapes, bank_of, cache_of, keys_of, params_of, rows_of, spectra_of, state_of, whole, z_of
from sva.generation.decode import PromptBatch, generate
from sva.generation.sampling import Greedy
from sva.spectral.forms import Spectrum, adapters
from sva.spectral.mixing import FactoredSlots
from sva.spectral.parametrisations import family
from sva.training.loop import train_step
from sva.training.reinforce import Batch
from sva.training.rollout import sampling_of

PREFIX, LABELS = 128, 4  # tokens of the classification question, labels of two tokens each


class Program(NamedTuple):
    """One jitted function with the shapes it would get."""

    lower: Callable[[], Any]  # -> jax.stages.Lowered
    kinds: Mapping[str, Any]  # trees of jax.ShapeDtypeStruct by what they hold
    cache: Any  # the key/value cache that it makes inside, likewise; None for none
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
    state, spectra, params = state_of(shapes), spectra_of(shapes), params_of(shapes, without_targets=True)

    def lower() -> Any:
        settings = {"family": family(config.parametrisation), "loss": config.reinforce, "cfg": config.train}
        return train_step.lower(state, spectra, params, batch, model=shapes.model, **settings)

    if config.reinforce.has_kl:  # the base model scores as well
        params = params_of(shapes, without_targets=False)
    kinds = {"weights": params, "spectra": spectra, "state": state, "batch": batch}
    return Program(lower, kinds, None, update_flops(shapes), 1)


def rollout(shapes: Shapes) -> Program:
    """One step's sampling, from the merged weights or from the spectra, as rollout.form says."""
    config = shapes.config
    prompts, rows = config.rollout.prompts, config.rollout.prompts * config.rollout.samples
    is_factored = config.rollout.form == "factored"
    params = params_of(shapes, without_targets=is_factored)
    spectra = spectra_of(shapes) if is_factored else None
    adapter = adapters(spectra, z_of(shapes)) if spectra is not None else None
    ids, mask = rows_of(shapes, prompts, shapes.prompt), rows_of(shapes, prompts, shapes.prompt)

    def lower() -> Any:
        return generate.lower(
            shapes.model,
            params,
            PromptBatch(ids, mask, keys_of(shapes, rows), whole(shapes, (), jnp.int32)),
            whole(shapes, (4,), jnp.int32),
            adapter,
            max_new_tokens=shapes.new,
            sampling=sampling_of(config.rollout),
            samples=config.rollout.samples,
        )

    kinds = {"weights": params, "spectra": spectra, "batch": (ids, mask)}
    flops = generation_flops(shapes, prompts, rows, factored=is_factored)
    cache = cache_of(shapes, prompts, shapes.prompt), cache_of(shapes, rows, shapes.new - 1)
    return Program(lower, kinds, cache, flops, shapes.new - 1)


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
    first = FirstPass(
        prefix=cache_of(shapes, 1, PREFIX),
        label_mask=whole(shapes, (states, states), jnp.bool_),
        bias=whole(shapes, (LABELS,), jnp.float32),
        **{name: whole(shapes, (size,), jnp.int32) for name, size in numbers.items()},
    )
    prompts = Prompts(rows_of(shapes, rows, shapes.prompt), rows_of(shapes, rows, shapes.prompt))
    request = Request(
        prompts,
        limit=whole(shapes, (), jnp.int32),
        eos_ids=whole(shapes, (4,), jnp.int32),
        keys=keys_of(shapes, rows),
        max_new_tokens=shapes.new,
        sampling=Greedy(),
    )
    # The first pass runs on the base model, whose weights are the factored ones at z = 1: as an expert of ones.
    served = Served(shapes.model, params, bank, SLOTS, slots=whole(shapes, (LABELS,), jnp.int32))
    dispatcher = Scored(first, expert=whole(shapes, (SLOTS,), jnp.float32))
    asked = Rows(Asked(*prompts), prompts, right=rows_of(shapes, rows))

    def lower() -> Any:
        return two_pass.lower(served, dispatcher, asked, request)

    kinds = {"weights": params, "spectra": spectra, "experts": table, "batch": (dispatcher, asked)}
    cache = cache_of(shapes, rows, shapes.prompt), cache_of(shapes, rows, shapes.new - 1)
    return Program(lower, kinds, cache, two_pass_flops(shapes, states, PREFIX), shapes.new - 1)


PROGRAMS = {"update": update, "rollout": rollout, "two_pass": both_passes}
