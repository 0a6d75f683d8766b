"""The rollout and the update of paper_step.py, by the functions that training runs."""

import collections
import contextlib
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from shape import PEAKS, Lengths, config_of, lengths_of, targets_of

from sva.generation import engine
from sva.generation.engine import EngineConfig, Request
from sva.generation.sampling import OnPolicy
from sva.generation.weights import Weights
from sva.models import layout
from sva.models.cache import BLOCK
from sva.models.flops import head_flops, linear_flops, pair_flops
from sva.models.transformer import Transformer
from sva.models.weights import by_name, expected, unnest
from sva.parallel.sharding import Leaf
from sva.spectral.forms import Spectrum, adapters, merge
from sva.spectral.parametrisations import family
from sva.training.config.reinforce import ReinforceConfig
from sva.training.config.train import TrainConfig
from sva.training.optimizers import update_config
from sva.training.reinforce import Batch
from sva.training.update import init_state, train_step
from sva.utils.padding import round_up

FAMILY = family("sigmoid_nuclear")


def rollout(arguments: Any) -> dict[str, Any]:
    """Rows refilled through the engine: tokens a second, memory, seconds of compiling."""
    with compiling() as compiled:
        model, lengths = _model(arguments), lengths_of(arguments)
        base, spectra = _base(model, arguments.form)
        params, adapter = base, None
        if arguments.form == "dense":
            params = _put(base, _merged(spectra))  # the step's merged weights, beside the base's
        else:
            z = jax.tree.map(lambda x: jnp.ones_like(x.s), spectra, is_leaf=lambda x: isinstance(x, Spectrum))
            adapter = adapters(spectra, z)
        weights = Weights(model, params, jnp.full(4, -1, jnp.int32), adapter)
        rows = min(arguments.rows, arguments.prompts)
        cfg = EngineConfig(
            rows,
            steps=arguments.steps,
            prompts=min(8, rows),
            width=lengths.width,
            one_bucket=True,
            tier=round_up(lengths.width + round_up(lengths.new, arguments.steps), BLOCK),
        )
        held = _memory()
        warm = _requests(model, lengths, new=2 * arguments.steps)[:rows]
        collections.deque(engine.run(weights, warm, cfg, OnPolicy(1.0)), maxlen=0)
    requests = _requests(model, lengths)
    deadline, started, tokens, finished = 60 * arguments.minutes, time.perf_counter(), 0, 0
    for row in engine.run(weights, requests, cfg, OnPolicy(1.0)):
        tokens, finished = tokens + len(row.tokens), finished + 1
        assert np.isfinite(row.logprobs).all(), f"request {row.request}: log-probs that are not finite"
        if time.perf_counter() - started > deadline:
            break
    seconds = time.perf_counter() - started
    return _about() | {
        "rows_finished": finished,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "seconds_a_step": seconds * int(lengths.answers.sum()) / tokens,
        "compile_seconds": compiled,
        "gigabytes_held_before": held,
        "gigabytes_at_most": _memory("peak_bytes_in_use"),
    }


def update(arguments: Any) -> dict[str, Any]:
    """One update of `train_step`: tokens a second, share of the device's peak, memory, seconds of compiling."""
    with compiling() as compiled:
        model, lengths = _model(arguments), lengths_of(arguments)
        params, spectra = _base(model, arguments.form)
        cfg = TrainConfig(lr=2e-3, micro_batch=arguments.micro, remat=True)
        state = init_state(_by_name(model, spectra), FAMILY, update_config(cfg))
        batch = _batch(model, lengths)
        held = _memory()
        loss = ReinforceConfig(baseline="none", kl_coef=0.1)
        program = train_step.lower(
            state, spectra, params, batch, model=model, family=FAMILY, loss=loss, cfg=update_config(cfg)
        ).compile()
        analysis = program.memory_analysis()
    times = []
    while len(times) < 2 and (not times or sum(times) + times[-1] < 30 * arguments.minutes):
        started = time.perf_counter()
        _, metrics = jax.block_until_ready(program(state, spectra, params, batch, cfg=update_config(cfg)))
        times.append(time.perf_counter() - started)
    rows, computed = len(lengths.prompts), len(lengths.prompts) * (lengths.width + lengths.new)
    flops = _update_flops(model, rows, lengths, is_dense=arguments.form == "dense")
    seconds, peak = min(times), _peak()
    return _about() | {
        "seconds": times,
        "tokens": int(lengths.prompts.sum() + lengths.answers.sum()),
        "tokens_with_padding": computed,
        "tokens_per_second": int(lengths.prompts.sum() + lengths.answers.sum()) / seconds,
        "tokens_with_padding_per_second": computed / seconds,
        "teraflops": {name: x / 1e12 for name, x in flops.items()},
        "share_of_peak": {name: x / seconds / peak for name, x in flops.items()} if peak else None,
        "metrics": {name: float(x) for name, x in metrics.items()},
        "compile_seconds": compiled,
        "gigabytes_held_before": held,
        "gigabytes_of_temporaries": analysis.temp_size_in_bytes / 1e9 if analysis else None,
        "gigabytes_at_most": _memory("peak_bytes_in_use"),
    }


def _base(model: Transformer, form: str) -> tuple[Any, Any]:
    """(params, spectra): with the targets' own weights for dense rollouts, without them for factored ones."""
    targets = targets_of(expected(model.cfg))
    params, spectra = _params(model, targets), _spectra(model, targets)
    return _put(params, _merged(spectra)) if form == "dense" else params, spectra


def _model(arguments: Any) -> Transformer:
    dtype = jnp.float32 if arguments.toy else jnp.bfloat16
    return Transformer(config_of(arguments), dtype, scan_layers=arguments.scan)


@partial(jax.jit, static_argnames=("shape", "dtype", "width"))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, width: int) -> jax.Array:
    """Random numbers of about 1 / sqrt(width), made in pieces along the first axis where there are three."""
    if len(shape) == 3:
        return jax.lax.map(
            lambda key: jax.random.normal(key, shape[1:], dtype) * width**-0.5, jax.random.split(key, shape[0])
        )
    return jax.random.normal(key, shape, dtype) * width**-0.5


def _params(model: Transformer, without: Any) -> Any:
    """Random weights, nested; `without` those named."""
    leaves, tree = jax.tree.flatten(layout.params(model, frozenset(without)), is_leaf=lambda x: isinstance(x, Leaf))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    sizes = [1 if leaf.axes[-1] is None else 0 for leaf in leaves]  # vectors are norms
    made = [
        jnp.ones(leaf.shape, model.dtype) if norm else _normal(key, leaf.shape, model.dtype, leaf.shape[-1])
        for key, leaf, norm in zip(keys, leaves, sizes, strict=True)
    ]
    return jax.tree.unflatten(tree, made)


def _spectra(model: Transformer, targets: Any) -> Any:
    """Random spectra of the targets, nested; W = U diag(s) V^T has entries of about 1 / sqrt(its longer side)."""
    leaves = layout.nested(model, layout.spectra(model.cfg, targets))
    flat, tree = jax.tree.flatten(leaves, is_leaf=lambda x: isinstance(x, Spectrum))
    made = []
    for number, (u, s, vt) in enumerate(flat):
        first, second = jax.random.split(jax.random.key(number + 1))
        values = jnp.broadcast_to(jnp.linspace(1.5, 0.1, s.shape[-1]), s.shape)
        made.append(
            Spectrum(
                _normal(first, u.shape, model.dtype, u.shape[-2]),
                jnp.array(values),
                _normal(second, vt.shape, model.dtype, vt.shape[-1]),
            )
        )
    return jax.tree.unflatten(tree, made)


def _merged(spectra: Any) -> Any:
    """The targets' weights, nested, one after another."""

    @jax.jit
    def one(spectrum: Spectrum) -> jax.Array:
        is_stack = spectrum.s.ndim == 2
        ones = jnp.ones_like(spectrum.s)
        return jax.lax.map(lambda x: merge(*x), (spectrum, ones)) if is_stack else merge(spectrum, ones)

    return jax.tree.map(lambda x: jax.block_until_ready(one(x)), spectra, is_leaf=lambda x: isinstance(x, Spectrum))


def _put(tree: Any, others: Any) -> Any:
    """The nested tree with the leaves of another in the place of its own."""
    return {
        name: (_put(x, others[name]) if isinstance(x, dict) else others[name]) if name in others else x
        for name, x in tree.items()
    } | {name: x for name, x in others.items() if name not in tree}


def _by_name(model: Transformer, spectra: Any) -> Any:
    targets = targets_of(expected(model.cfg))
    if model.scan_layers:
        return by_name(spectra, targets, scan=model.scan_layers)
    return unnest(spectra, dict.fromkeys(targets), scan=False)


def _requests(model: Transformer, lengths: Lengths, new: int | None = None) -> list[Request]:
    """One of every prompt, of random tokens, that stops at its length."""
    rng = np.random.default_rng(0)
    return [
        Request(rng.integers(0, model.cfg.vocab_size, size).tolist(), int(new or limit), jax.random.key(number)[None])
        for number, (size, limit) in enumerate(zip(lengths.prompts, lengths.answers, strict=True))
    ]


def _batch(model: Transformer, lengths: Lengths) -> Batch:
    """The step's batch as a rollout makes it."""
    rng, rows = np.random.default_rng(0), len(lengths.prompts)
    ids, new = (
        rng.integers(0, model.cfg.vocab_size, (rows, size)).astype(np.int32) for size in (lengths.width, lengths.new)
    )
    prompt_mask = np.arange(lengths.width)[None, :] >= lengths.width - lengths.prompts[:, None]
    mask = np.arange(lengths.new)[None, :] < lengths.answers[:, None]
    rewards = rng.choice(np.float32([-1, 1]), rows)
    arrays = ids * prompt_mask, prompt_mask.astype(np.int32), new * mask, mask.astype(np.int32), rewards
    return Batch(*map(jnp.asarray, arrays))


def _update_flops(model: Transformer, rows: int, lengths: Lengths, *, is_dense: bool) -> dict[str, float]:
    """Of the products of one update, padding among them: those it cannot do without, and those done again."""
    cfg, prompt, new = model.cfg, lengths.width, lengths.new
    targets = targets_of(expected(cfg))
    tokens, pairs = rows * (prompt + new), rows * (prompt**2 + new * (prompt + new))
    factored = linear_flops(cfg, targets)
    base = linear_flops(cfg) if is_dense else factored
    # Forwards, and back to the activations alone; backwards each product of a pair gives two. The base's own pass.
    needed = 2 * tokens * factored + 3 * pairs * pair_flops(cfg) + tokens * base + pairs * pair_flops(cfg)
    needed += 3 * rows * new * head_flops(cfg)  # forwards and backwards, and the base's
    again = tokens * factored + pairs * pair_flops(cfg) + 2 * rows * new * head_flops(cfg)
    return {"needed": needed, "with_recomputation": needed + again}


@contextlib.contextmanager
def compiling() -> Iterator[dict[str, float]]:
    """{function: seconds of its compilation} of what XLA is asked for meanwhile, those of over a second, and all."""
    found: dict[str, float] = {}

    def listen(event: str, seconds: float, **about: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            name = str(about.get("fun_name"))
            found["all"] = found.get("all", 0.0) + seconds
            if seconds > 1:
                found[name] = found.get(name, 0.0) + seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


def _memory(kind: str = "bytes_in_use") -> float | None:
    """Gigabytes, as the device counts them; None where it does not."""
    stats = jax.devices()[0].memory_stats()
    return stats[kind] / 1e9 if stats else None


def _peak() -> float | None:
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAKS.items() if name in kind), None)


def _about() -> dict[str, Any]:
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
