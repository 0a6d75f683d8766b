"""How fast a model reads prompts and decodes on this machine, beside what the machine can do (`sva bench`).

The limits are measured in the same process: the rate at which memory is read (sums of 512 MiB of integers) and the
rate of the model's own matrix products with nothing between them, called in turn with the model's generation. Medians,
after compilation and one warm-up.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sva.generation.decode import PromptBatch, generate
from sva.generation.lm import LM
from sva.generation.load import quantise
from sva.generation.loaded_model import DTYPES, KV_DTYPES
from sva.generation.prompts import check_prompts
from sva.generation.sampling import Greedy
from sva.models.cache import empty
from sva.models.config import ModelConfig
from sva.models.transformer import Transformer
from sva.models.weights import expected
from sva.utils.errors import UserError
from sva.utils.matmul import Int8, dot

_READ = 1 << 27  # int32 numbers,
_TIMES = 16  # read one time after another by one program, to which a call adds nothing worth mentioning


def bench(lm: LM, batches: Sequence[int], *, prompt: int = 32, new_tokens: int = 64, rounds: int = 5) -> dict[str, Any]:
    """Prefill and decode rates for each batch of random prompts, and the share of the machine's limits they reach.

    Args:
      batches: rows decoded together; 1, 2, 4, 8, ... are what `LM.generate` pads to.
      prompt: tokens of each prompt.
      new_tokens: generated for each; a step's time is that of all of them less that of about half, over the rest.
      rounds: repetitions of each measurement.
    Returns:
      {"read_gigabytes_per_second", "batches": {batch: {...}}}; seconds, tokens a second, bytes and floating-point
      operations a decode step must move and do (weights once, keys and values of the slots held), and shares (0 to 1).
    Raises:
      UserError: a batch, prompt or count below 1, new_tokens below 2, more tokens than the context holds, or a
        mixture of experts.
    """
    check(batches, prompt=prompt, new_tokens=new_tokens, rounds=rounds)
    if lm.model.cfg.moe is not None:
        raise UserError(
            f"{lm.name} is a mixture of experts, of which a step reads the modules that its tokens choose; this counts "
            "models that read all their weights. experiments/benchmarks/moe times a mixture beside transformers"
        )
    check_prompts(np.array([prompt]), new_tokens, lm.model.cfg)
    bandwidth = read_rate(rounds)
    return {
        "model": lm.name,
        "quantisation": lm.quantisation,
        "dtype": jnp.dtype(lm.model.dtype).name,
        "kv_dtype": jnp.dtype(lm.model.kept_dtype).name,
        "device": jax.devices()[0].device_kind,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "read_gigabytes_per_second": bandwidth / 1e9,
        "batches": {str(batch): _batch(lm, batch, prompt, new_tokens, rounds, bandwidth) for batch in batches},
    }


def check(batches: Sequence[int], *, prompt: int, new_tokens: int, rounds: int = 5) -> None:
    """Raises UserError for a number of `bench` that makes no sense: before a model is loaded or made."""
    for name, value, least in [
        *(("batch", batch, 1) for batch in batches),
        ("prompt", prompt, 1),
        ("new_tokens", new_tokens, 2),
        ("rounds", rounds, 1),
    ]:
        if value < least:
            raise UserError(f"{name}={value} must be at least {least}")


def random_lm(cfg: ModelConfig, dtype: str, *, kv_dtype: str | None = None, scan_layers: bool = False) -> LM:
    """A model of this shape with random weights, of the size that keeps activations about 1, and no tokenizer.

    Made on the device: nothing needs to be fetched to know how fast a model would be. Dtypes are those of `load`.
    """
    kept = KV_DTYPES[kv_dtype] if kv_dtype else None
    model = Transformer(cfg, DTYPES.get(dtype, jnp.float32), scan_layers=scan_layers, kv_dtype=kept)

    @partial(jax.jit, static_argnames=("shape",))
    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, shape, model.dtype) * shape[-1] ** -0.5

    specs = expected(cfg)
    named = {
        name: jnp.ones(spec.shape, model.dtype) if "norm" in name else draw(jax.random.key(place), spec.shape)
        for place, (name, spec) in enumerate(specs.items())
    }
    lm = LM(model, model.nest(named), None, f"random {cfg.architecture} of {cfg.num_layers} layers")
    return quantise(lm) if dtype == "int8" else lm


def table(result: dict[str, Any]) -> str:
    """The result of `bench` as lines for a terminal."""
    lines = [
        f"{result['model']} ({result['quantisation'] or result['dtype']}) on {result['device']}, "
        f"{result['prompt']} + {result['new_tokens']} tokens; memory is read at "
        f"{result['read_gigabytes_per_second']:.1f} GB/s",
        "batch  prefill tok/s  decode tok/s  ms/step  MB/step  of read rate  GFLOP/step  bare GFLOP/s  of bare",
    ]
    for batch, row in result["batches"].items():
        lines.append(
            f"{batch:>5}  {row['prefill_tokens_per_second']:13.0f}  {row['decode_tokens_per_second']:12.1f}  "
            f"{row['step_seconds'] * 1e3:7.2f}  {row['step_bytes'] / 1e6:7.0f}  {row['share_of_read_rate']:12.0%}  "
            f"{row['step_flops'] / 1e9:10.2f}  {row['bare_flops_per_second'] / 1e9:12.0f}  {row['share_of_bare']:7.0%}"
        )
    return "\n".join(lines)


def _batch(lm: LM, batch: int, prompt: int, new_tokens: int, rounds: int, bandwidth: float) -> dict[str, float]:
    cfg = lm.model.cfg
    ids = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, prompt)), jnp.int32)
    few = new_tokens // 2  # and the same program: it ends earlier
    matrices = step_matrices(lm)
    generations = (partial(_generate, lm, ids, new_tokens, n) for n in (few, new_tokens))
    some, all_, bare = _seconds(*generations, products(matrices, batch, lm.model.dtype), rounds=rounds)
    step = (all_ - some) / (new_tokens - few)
    prefill = all_ - (new_tokens - 1) * step
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(matrices))
    flops = sum(2 * batch * int(np.prod(w.shape)) for w in matrices)
    make = partial(empty, cfg, batch, prompt + new_tokens, lm.model.kept_dtype, scan=lm.model.scan_layers)
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(make).kv))
    return {
        "prefill_seconds": prefill,
        "prefill_tokens_per_second": batch * prompt / prefill,
        "step_seconds": step,
        "decode_tokens_per_second": batch / step,
        "step_bytes": weights + cache,
        "step_flops": flops,
        "share_of_read_rate": (weights + cache) / step / bandwidth,
        "bare_seconds": bare,
        "bare_flops_per_second": flops / bare,
        "share_of_bare": bare / step,
    }


def _generate(lm: LM, ids: jax.Array, room: int, new_tokens: int) -> Any:
    """So many greedy tokens after the prompts ids [B, T], by the program that has room for `room`."""
    keys, never = jnp.broadcast_to(jax.random.key(0), (len(ids),)), jnp.full(4, -1, jnp.int32)
    limit, settings = jnp.asarray(new_tokens, jnp.int32), {"max_new_tokens": room, "sampling": Greedy()}
    prompts = PromptBatch(ids, jnp.ones_like(ids), keys, limit)
    return generate(lm.model, lm.params, prompts, never, **settings)


def step_matrices(lm: LM) -> list[Any]:
    """The matrices that a decode step multiplies by: those of the layers, and the head."""
    leaves = jax.tree_util.tree_leaves_with_path(lm.params, is_leaf=lambda x: isinstance(x, Int8))
    found = []
    for path, w in leaves:
        name = jax.tree_util.keystr(path)
        if "_proj" in name and "weight" in name:
            found += [jax.tree.map(lambda x, i=i: x[i], w) for i in range(len(w.shape) == 3 and w.shape[0])] or [w]
        elif "lm_head" in name or ("embed_tokens" in name and lm.model.cfg.tie_word_embeddings):
            found.append(w)
    return found


def products(matrices: list[Any], batch: int, dtype: Any) -> Callable[[], Any]:
    """A call of the bare products of these matrices, each on so many rows of its own."""
    rows = [jnp.ones((batch, 1, w.shape[1]), dtype) for w in matrices]
    run = jax.jit(lambda rows, matrices: [dot(x, w) for x, w in zip(rows, matrices, strict=True)])
    return lambda: run(rows, matrices)


def read_rate(rounds: int) -> float:
    """Bytes a second of sums over memory that no cache holds."""
    numbers = jnp.ones((512, _READ // 512), jnp.int32)

    @jax.jit
    def total(x: jax.Array) -> jax.Array:
        def again(_: Any, sums: jax.Array) -> jax.Array:
            return sums + jnp.sum(jax.lax.optimization_barrier((x, sums))[0], axis=1)  # which no compiler takes out

        return jax.lax.fori_loop(0, _TIMES, again, jnp.zeros_like(x[:, 0]))

    return _TIMES * numbers.nbytes / _seconds(lambda: total(numbers), rounds=rounds)[0]


def _seconds(*runs: Callable[[], Any], rounds: int) -> list[float]:
    """The median of a call of each, called in turn after a first that compiles."""
    taken: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for run, found in zip(runs, taken, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                found.append(time.perf_counter() - started)
    return [statistics.median(found) for found in taken]
