"""Ahead-of-time compilation: what a training run would hold and do on a TPU pod, on a machine with no TPU.

The update, the rollout and the two-pass function are compiled by the TPU's own compiler (libtpu, extra `aot`) for the
pod's topology, from shapes alone: no weights are read, nothing runs. The report says, for one chip, which bytes lie
there, by kind, how many operations each program makes and which messages it sends, with loops multiplied out
(`sva.cli.hlo`), whether everything fits, and what to change where it does not.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sva.adaptation.adaptive_lm import SLOTS
from sva.adaptation.dispatchers import Rows, Scored
from sva.adaptation.label_scoring import Asked, FirstPass
from sva.adaptation.two_pass import Prompts, Request, Served, two_pass
from sva.cli import hlo
from sva.generation.decode import generate
from sva.generation.lm import DTYPES
from sva.generation.sampling import Greedy
from sva.models import layout
from sva.models.cache import blocks_of
from sva.models.config import ModelConfig, from_hf
from sva.models.flops import head_flops, linear_flops, pair_flops
from sva.models.hub import HUB_SECONDS
from sva.models.transformer import Transformer
from sva.models.weights import expected
from sva.parallel.sharding import Leaf, check_rows, make_mesh, notes, replicated, shardings
from sva.spectral.forms import Spectrum, adapters
from sva.spectral.mixing import FactoredSlots
from sva.spectral.parametrisations import family
from sva.training.config import Config
from sva.training.loop import init_state, train_step
from sva.training.reinforce import Batch
from sva.utils.errors import UserError
from sva.utils.files import read_json
from sva.utils.padding import budget_bucket
from sva.utils.remote import to_path
from sva.utils.trees import select

PROGRAMS = ("update", "rollout", "two_pass")
HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB a chip: cloud.google.com/tpu/docs/system-architecture-tpu-vm
GIB = 2**30
PREFIX, LABELS = 128, 4  # tokens of the classification question, labels of two tokens each
_ENVIRON = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}  # no chip is used, no host is asked


class Program(NamedTuple):
    """One jitted function with the shapes it would get."""

    lower: Callable[[], Any]  # -> jax.stages.Lowered
    kinds: Mapping[str, Any]  # trees of jax.ShapeDtypeStruct by what they hold
    cache: Any  # the key/value cache that it makes inside, likewise; None for none
    flops: int  # of its products, counted from the model's sizes
    open_turns: int  # of its decoding loop


@dataclasses.dataclass(frozen=True)
class Shapes:
    """A run's model and sizes."""

    config: Config
    model: Transformer
    mesh: Mesh
    prompt: int  # tokens of a prompt
    new: int  # tokens of a completion

    @property
    def targets(self) -> list[str]:
        """Names of the weights that an expert moves."""
        return select(expected(self.model.cfg), self.config.targets)


def topology(name: str) -> list[Any]:
    """The devices of a pod that need not be there, e.g. `v5e:4x4`.

    Raises:
      UserError: libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs its compiler, libtpu; install sva with the extra `aot`")
    os.environ.update(_ENVIRON)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"--topology {name} is unknown to libtpu ({str(error).splitlines()[0]}); write e.g. v5e:4x4 or v5p:2x2x4"
        ) from error


def model_config(model: str) -> ModelConfig:
    """The network of a directory with a config.json, or of a hub id, of which nothing else is fetched.

    Raises:
      UserError: there is none.
    """
    path = to_path(model) / "config.json"
    if not path.is_file():
        from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(model, "config.json")
            if not isinstance(cached, str):
                HfApi().model_info(model, timeout=HUB_SECONDS)  # asks once, where a download would ask six times
            path = Path(cached if isinstance(cached, str) else hf_hub_download(model, "config.json"))
        except Exception as error:  # the hub's own, network errors, a name that is none
            raise UserError(f"model={model}: no config.json there, nor on the hub ({type(error).__name__})") from error
    return from_hf(read_json(path), str(path))


def report(
    config: Config,
    devices: list[Any],
    *,
    hbm_gib: float,
    prompt_tokens: int,
    programs: tuple[str, ...] = PROGRAMS,
    scan_layers: bool = True,
    on_program: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """What one device of a pod would hold and do in a run of this configuration.

    Args:
      devices: of a topology, or real ones.
      hbm_gib: memory of one of them, GiB.
      prompt_tokens: length of the prompts.
      programs: some of `PROGRAMS`.
      scan_layers: one compiled layer for all; unrolled, compiling takes layers times as long.
      on_program: called with a program's name before it is compiled.
    Raises:
      UserError: a mesh that does not make the devices, or a batch that does not divide over it.
    """
    mesh = make_mesh(config.mesh, devices)
    check_rows("rollout.prompts", config.rollout.prompts, mesh)
    check_rows("train.micro_batch", config.train.micro_batch, mesh)
    if config.rollout.max_new_tokens is None:
        raise UserError("rollout.max_new_tokens must be set: no task is read here")
    model = Transformer(model_config(config.model), DTYPES[config.dtype], scan_layers=scan_layers)
    shapes = Shapes(config, model, mesh, prompt_tokens, budget_bucket(config.rollout.max_new_tokens))
    makers = {"update": update, "rollout": rollout, "two_pass": both_passes}
    found = {}
    for name in programs:
        on_program(name)
        with jax.set_mesh(mesh):
            found[name] = _compiled(makers[name](shapes), shapes)
    resident = {kind: held_bytes(tree) for kind, tree in run_holds(shapes).items()}
    total = sum(resident.values()) + max((program["memory"]["temporaries"] for program in found.values()), default=0)
    fits = total <= hbm_gib * GIB and not any("refused" in program for program in found.values())
    return {
        "mesh": dict(mesh.shape),
        "devices": len(devices),
        "hbm_gib": hbm_gib,
        "prompt_tokens": shapes.prompt,
        "new_tokens": shapes.new,
        "rollout_rows": config.rollout.prompts * config.rollout.samples,
        "notes": notes(layout.params(model), mesh),
        "programs": found,
        "run": {"resident": resident, "with_largest_temporaries": total, "fits": fits},
        "advice": [] if fits else advice(shapes, resident, found, total - int(hbm_gib * GIB)),
    }


def run_holds(shapes: Shapes) -> dict[str, Any]:
    """What lies on the devices all through a training run, by kind, as trees of jax.ShapeDtypeStruct.

    In the factored form the spectra stand in for the target weights; in the dense one there are these, the spectra and
    the merged weights.
    """
    kinds = {"weights": _params(shapes, without_targets=True), "spectra": _spectra(shapes), "state": _state(shapes)}
    if shapes.config.rollout.form == "dense":
        kinds["target weights"] = kinds["merged weights"] = _targets(shapes)
    return kinds


def held_bytes(tree: Any) -> int:
    """Bytes of a tree of sharded jax.ShapeDtypeStruct on one device, without the padding of layouts."""

    def one(x: Any) -> int:
        return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

    return sum(one(x) for x in jax.tree.leaves(tree) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key))


def update(shapes: Shapes) -> Program:
    """One training step."""
    config, cfg = shapes.config, shapes.model.cfg
    prompts, rows = config.rollout.prompts, config.rollout.prompts * config.rollout.samples
    batch = Batch(
        prompt_ids=_rows(shapes, prompts, shapes.prompt),
        prompt_mask=_rows(shapes, prompts, shapes.prompt),
        completion_ids=_rows(shapes, rows, shapes.new),
        completion_mask=_rows(shapes, rows, shapes.new),
        advantages=_rows(shapes, rows, dtype=jnp.float32),
        sampled=_rows(shapes, rows, shapes.new, dtype=jnp.float32),
        temperature=_rows(shapes, rows, dtype=jnp.float32) if config.rollout.is_tempered else None,
    )
    state, spectra, params = _state(shapes), _spectra(shapes), _params(shapes, without_targets=True)

    def lower() -> Any:
        settings = {"family": family(config.parametrisation), "loss": config.reinforce, "cfg": config.train}
        return train_step.lower(state, spectra, params, batch, model=shapes.model, **settings)

    tokens = prompts * shapes.prompt + rows * shapes.new
    pairs = prompts * shapes.prompt**2 + rows * shapes.new * (shapes.prompt + shapes.new)
    # Forwards, and back to the activations alone: weights are frozen. Backwards, each product of a pair gives two.
    flops = 2 * tokens * linear_flops(cfg, shapes.targets) + 3 * pairs * pair_flops(cfg)
    flops -= (
        0 if shapes.model.scan_layers else tokens * _first_flops(shapes) + 2 * pairs * pair_flops(cfg) // cfg.num_layers
    )
    unread = prompts * (shapes.prompt - 1)  # tokens whose last states nothing asks for
    flops -= 2 * unread * _unread_flops(shapes) + 3 * unread * shapes.prompt * _unread_pair_flops(shapes)
    if config.train.remat:  # all but each layer's last product, whose result is the next one's kept input
        flops += tokens * (linear_flops(cfg, shapes.targets) - _last_flops(shapes)) + pairs * pair_flops(cfg)
        flops -= unread * (_unread_flops(shapes) + shapes.prompt * _unread_pair_flops(shapes))
    flops += 3 * rows * shapes.new * head_flops(cfg)  # recomputed always: see `sva.generation.logprobs.score`
    if config.reinforce.has_kl:  # the base model scores as well, forwards
        flops += tokens * linear_flops(cfg) + pairs * pair_flops(cfg)
        flops += 2 * rows * shapes.new * head_flops(cfg)
        params = _params(shapes, without_targets=False)
    kinds = {"weights": params, "spectra": spectra, "state": state, "batch": batch}
    return Program(lower, kinds, None, flops, 1)


def rollout(shapes: Shapes) -> Program:
    """One step's sampling, from the merged weights or from the spectra, as rollout.form says."""
    config, cfg = shapes.config, shapes.model.cfg
    prompts, rows = config.rollout.prompts, config.rollout.prompts * config.rollout.samples
    is_factored = config.rollout.form == "factored"
    params = _params(shapes, without_targets=is_factored)
    spectra = _spectra(shapes) if is_factored else None
    adapter = adapters(spectra, _z(shapes)) if spectra is not None else None
    ids, mask = _rows(shapes, prompts, shapes.prompt), _rows(shapes, prompts, shapes.prompt)

    def lower() -> Any:
        return generate.lower(
            shapes.model,
            params,
            ids,
            mask,
            _whole(shapes, (), jnp.int32),
            _whole(shapes, (4,), jnp.int32),
            _keys(shapes, rows),
            adapter,
            max_new_tokens=shapes.new,
            sampling=config.rollout.sampling,
            samples=config.rollout.samples,
        )

    kinds = {"weights": params, "spectra": spectra, "batch": (ids, mask)}
    flops = _generation_flops(shapes, prompts, rows, cfg, is_factored)
    cache = _cache(shapes, prompts, shapes.prompt), _cache(shapes, rows, shapes.new - 1)
    return Program(lower, kinds, cache, flops, shapes.new - 1)


def both_passes(shapes: Shapes) -> Program:
    """Dispatch and answer, every row with a mixture of its own, in the factored form."""
    config, cfg = shapes.config, shapes.model.cfg
    rows = config.rollout.prompts * config.rollout.samples
    params, spectra = _params(shapes, without_targets=True), _spectra(shapes)
    table = _table(shapes)
    bank = jax.tree.map(FactoredSlots, spectra, table, is_leaf=lambda x: isinstance(x, Spectrum))
    states, scored = 2 * LABELS - 1, 3 * LABELS - 1
    numbers = {"label_ids": states, "label_depth": states}
    numbers |= {"target_from": scored, "target_ids": scored, "target_label": scored}
    first = FirstPass(
        prefix=_cache(shapes, 1, PREFIX),
        label_mask=_whole(shapes, (states, states), jnp.bool_),
        bias=_whole(shapes, (LABELS,), jnp.float32),
        **{name: _whole(shapes, (size,), jnp.int32) for name, size in numbers.items()},
    )
    prompts = Prompts(_rows(shapes, rows, shapes.prompt), _rows(shapes, rows, shapes.prompt))
    request = Request(
        prompts,
        limit=_whole(shapes, (), jnp.int32),
        eos_ids=_whole(shapes, (4,), jnp.int32),
        keys=_keys(shapes, rows),
        max_new_tokens=shapes.new,
        sampling=Greedy(),
    )
    # The first pass runs on the base model, whose weights are the factored ones at z = 1: as an expert of ones.
    served = Served(shapes.model, params, bank, SLOTS, slots=_whole(shapes, (LABELS,), jnp.int32))
    dispatcher = Scored(first, expert=_whole(shapes, (SLOTS,), jnp.float32))
    asked = Rows(Asked(*prompts), prompts, right=_rows(shapes, rows))

    def lower() -> Any:
        return two_pass.lower(served, dispatcher, asked, request)

    tokens = shapes.prompt + states
    flops = rows * tokens * linear_flops(cfg, shapes.targets)
    flops += rows * tokens * (PREFIX + tokens) * pair_flops(cfg) + rows * (states + 1) * head_flops(cfg)
    unread = rows * (shapes.prompt - 1)
    flops -= unread * (_unread_flops(shapes) + (PREFIX + tokens) * _unread_pair_flops(shapes))
    flops += _generation_flops(shapes, rows, rows, cfg, factored=True)
    kinds = {"weights": params, "spectra": spectra, "experts": table, "batch": (dispatcher, asked)}
    cache = _cache(shapes, rows, shapes.prompt), _cache(shapes, rows, shapes.new - 1)
    return Program(lower, kinds, cache, flops, shapes.new - 1)


def advice(shapes: Shapes, resident: Mapping[str, int], programs: Mapping[str, Any], missing: int) -> list[str]:
    """What would make a run fit that lacks `missing` bytes a device, the largest saving first."""
    config = shapes.config
    options: list[tuple[int, str]] = []
    if config.rollout.form == "dense":
        spared = resident["target weights"] + resident["merged weights"]
        options.append((spared, "rollout.form=factored: the spectra stand in for base and merged target weights"))
    parts = shapes.mesh.shape["data"]
    if parts > 1:
        whole = sum(resident.values())
        options.append((whole - whole // parts, f"mesh.fsdp x {parts}, mesh.data=1: every weight lies there once"))
    if "update" in programs:
        temporaries = programs["update"]["memory"]["temporaries"]
        if not config.train.remat:
            options.append((temporaries // 2, "train.remat=true: layers are computed again on the way back"))
        smaller = config.train.micro_batch // 2
        if smaller and smaller % (shapes.mesh.shape["data"] * shapes.mesh.shape["fsdp"]) == 0:
            options.append((temporaries // 2, f"train.micro_batch={smaller}: half the activations"))
    cache = max((program["memory"]["cache"] for program in programs.values()), default=0)
    if cache > missing // 4:
        options.append((cache // 2, f"half of rollout.prompts={config.rollout.prompts}: half the cache"))
    if shapes.mesh.size:
        options.append((sum(resident.values()) // 2, "twice the devices on mesh.fsdp: half of everything resident"))
    options.sort(key=lambda option: -option[0])
    head = f"{max(0, missing) / GIB:.2f} GiB a device too much, by the resident bytes and the largest temporaries"
    return [head, *(f"{text} (about {spared / GIB:.2f} GiB)" for spared, text in options if spared > 0)]


def summary(result: Mapping[str, Any]) -> str:
    """The report as text, GiB a device."""
    mesh = " x ".join(f"{name} {size}" for name, size in result["mesh"].items())
    lines = [f"mesh {mesh}; {result['hbm_gib']} GiB a device; prompts of {result['prompt_tokens']} tokens, "]
    lines[0] += f"completions of {result['new_tokens']}, {result['rollout_rows']} rows"
    lines += [f"note: {note}" for note in result["notes"]]
    for name, program in result["programs"].items():
        memory = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in program["memory"].items())
        lines.append(f"{name}: {memory} GiB")
        if "refused" in program:
            lines.append(f"  the compiler refuses it: {program['refused']}")
            continue
        ratio = program["flops_all"] / program["flops_closed_form"]
        lines.append(
            f"  {program['flops'] / 1e12:.1f} TFLOP a device ({ratio:.3f} of the closed form), "
            f"{program['bytes'] / 1e9:.0f} GB read and written, compiled in {program['compile_seconds']:.0f} s"
        )
        for kind, (times, size) in program["collectives"].items():
            lines.append(f"  {kind}: {times} times, {size / 1e9:.2f} GB")
        if program["weight_shaped_products"]:
            lines.append(f"  products of a target weight's shape: {', '.join(program['weight_shaped_products'])}")
    resident = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in result["run"]["resident"].items())
    verdict = "fits" if result["run"]["fits"] else "does not fit"
    total = result["run"]["with_largest_temporaries"] / GIB
    lines.append(f"a run holds {resident}; with the largest temporaries {total:.2f} GiB: {verdict}")
    return "\n".join([*lines, *(f"  {line}" for line in result["advice"])])


def weight_shaped(text: str, shapes: Mapping[str, tuple[int, ...]], layers: int) -> list[str]:
    """Results of a traced program's products that have a target weight's shape, either way round, stacked or not.

    Args:
      text: the program before it is divided over devices (`lowered.as_text()`), so that shapes are whole.
      shapes: of the target weights.
      layers: of the model: a stack has them as first axis.
    """
    wanted = {tuple(sorted(shape)) for shape in shapes.values()}
    found: dict[str, None] = {}
    for dims in re.findall(r"stablehlo\.dot_general.*->\s*tensor<((?:\d+x)+)\w+>", text):
        sizes = [int(n) for n in dims.rstrip("x").split("x")]
        for candidate in (sizes, sizes[1:] if sizes[0] == layers else sizes):
            if tuple(sorted(n for n in candidate if n > 1)) in wanted:
                found[dims.rstrip("x")] = None
    return list(found)


def _compiled(program: Program, shapes: Shapes) -> dict[str, Any]:
    """One program's part of the report."""
    started = time.perf_counter()
    lowered = program.lower()
    traced = lowered.as_text()
    cache = held_bytes(program.cache)
    kinds = {kind: held_bytes(tree) for kind, tree in program.kinds.items() if tree is not None}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = needed_bytes(str(error))
        if used is None:
            raise
        temporaries = max(0, used - sum(kinds.values()))
        return {"memory": kinds | {"temporaries": temporaries, "cache": cache}, "refused": _first_line(error)}
    seconds = time.perf_counter() - started
    stats = compiled.memory_analysis()
    found = hlo.analyse(compiled.as_text(), open_turns=program.open_turns)
    targets = {name: expected(shapes.model.cfg)[name].shape for name in shapes.targets}
    return {
        "memory": kinds | {"temporaries": stats.temp_size_in_bytes, "cache": cache},  # the cache is one of those
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "flops": found.flops,
        "flops_all": found.flops * shapes.mesh.size,
        "flops_closed_form": program.flops,
        "bytes": found.bytes,
        "collectives": found.sent(),
        "loops": found.loops,
        "open_loops": found.unknown,
        "weight_shaped_products": weight_shaped(traced, targets, shapes.model.cfg.num_layers),
        "compile_seconds": round(seconds, 1),
    }


def needed_bytes(message: str) -> int | None:
    """Bytes that a program needs where the TPU's compiler says that they are too many; None where it says other things.

    Its words are "Ran out of memory in memory space hbm. Used 19.33G of 15.75G hbm".
    """
    match = re.search(r"Used (\d+(?:\.\d+)?)([MG]) of \d+(?:\.\d+)?[MG] hbm", message)
    return int(float(match[1]) * {"M": 2**20, "G": GIB}[match[2]]) if match else None


def _first_line(error: Exception) -> str:
    return next(line.strip() for line in str(error).splitlines() if line.strip())[:300]


def _params(shapes: Shapes, *, without_targets: bool) -> Any:
    without = frozenset(shapes.targets) if without_targets else frozenset()
    return layout.abstract(layout.params(shapes.model, without), shapes.model.dtype, shapes.mesh)


def _targets(shapes: Shapes) -> Any:
    weights = expected(shapes.model.cfg)
    return layout.abstract({name: weights[name] for name in shapes.targets}, shapes.model.dtype, shapes.mesh)


def _spectra(shapes: Shapes) -> Any:
    named = layout.spectra(shapes.model.cfg, shapes.targets)
    return layout.abstract(layout.nested(shapes.model, named), shapes.model.dtype, shapes.mesh)


def _z(shapes: Shapes) -> Any:
    """Effective z of one expert, nested."""
    return jax.tree.map(lambda x: x.s, _spectra(shapes), is_leaf=lambda x: isinstance(x, Spectrum))


def _table(shapes: Shapes) -> Any:
    """Effective z of a bank of experts, nested: [L, E_max, R]."""
    return jax.tree.map(
        lambda x: _whole(shapes, (*x.shape[:-1], SLOTS, x.shape[-1]), jnp.float32),
        _z(shapes),
    )


def _state(shapes: Shapes) -> Any:
    named = layout.spectra(shapes.model.cfg, shapes.targets)
    spectra = layout.abstract(named, shapes.model.dtype, shapes.mesh)
    member = family(shapes.config.parametrisation)
    state = jax.eval_shape(lambda: init_state(_zeros(spectra), member, shapes.config.train))
    return jax.tree.map(lambda x: _whole(shapes, x.shape, x.dtype), state)


def _zeros(spectra: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), spectra)


def _cache(shapes: Shapes, rows: int, slots: int) -> Any:
    """As `sva.models.cache.empty` makes it."""
    leaves = layout.part(shapes.model, rows, slots)

    def of(tree: Any, dtype: Any) -> Any:
        return layout.abstract(tree, dtype, shapes.mesh)

    return dataclasses.replace(
        leaves,
        kv=of(leaves.kv, shapes.model.kept_dtype),
        positions=of(leaves.positions, jnp.int32),
        valid=of(leaves.valid, jnp.bool_),
    )


def _rows(shapes: Shapes, *shape: int, dtype: Any = jnp.int32) -> Any:
    leaf = Leaf(shape, ("batch", *(None,) * (len(shape) - 1)))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=shardings(leaf, shapes.mesh))


def _whole(shapes: Shapes, shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(shapes.mesh))


def _keys(shapes: Shapes, rows: int) -> Any:
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    return jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=_rows(shapes, rows).sharding)


def _last_flops(shapes: Shapes) -> int:
    """Of one token through the last product of every layer: U of down_proj, or the whole of it."""
    cfg, targets = shapes.model.cfg, frozenset(shapes.targets)
    total = 0
    for layer in range(cfg.num_layers):
        is_target = f"model.layers.{layer}.mlp.down_proj.weight" in targets
        inner = min(cfg.hidden_size, cfg.intermediate_size) if is_target else cfg.intermediate_size
        total += 2 * inner * cfg.hidden_size
    return total


def _first_flops(shapes: Shapes) -> int:
    """Of one token back to the first layer's input, which nothing that is trained lies before; scanned, it is made."""
    total = 0
    for name, leaf in expected(shapes.model.cfg).items():
        if name.startswith("model.layers.0.") and len(leaf.shape) == 2:
            out, into = leaf.shape
            if name not in shapes.targets and "self_attn" in name:
                total += 2 * out * into
            elif name in shapes.targets and "down_proj" not in name:
                total += 2 * min(out, into) * into
    return total


def _generation_flops(shapes: Shapes, prompts: int, rows: int, cfg: ModelConfig, factored: bool) -> int:
    blocks, size = blocks_of(shapes.prompt + shapes.new, scan=shapes.model.scan_layers)
    slots = blocks * size
    tokens = prompts * shapes.prompt + rows * (shapes.new - 1)
    pairs = (prompts * shapes.prompt + rows * (shapes.new - 1)) * slots  # a row reads the whole cache, masked
    flops = tokens * linear_flops(cfg, shapes.targets if factored else ()) + pairs * pair_flops(cfg)
    unread = prompts * (shapes.prompt - 1)
    flops -= unread * (_unread_flops(shapes, factored=factored) + slots * _unread_pair_flops(shapes))
    return flops + rows * shapes.new * head_flops(cfg)


def _unread_flops(shapes: Shapes, *, factored: bool = True) -> int:
    """Of one token through the last layer's weights beyond keys and values: what is left out where none asks for it."""
    if shapes.model.scan_layers:
        return 0
    last, targets = f"model.layers.{shapes.model.cfg.num_layers - 1}.", shapes.targets if factored else ()
    total = 0
    for name, leaf in expected(shapes.model.cfg).items():
        if name.startswith(last) and len(leaf.shape) == 2 and ".k_proj" not in name and ".v_proj" not in name:
            out, into = leaf.shape
            total += 2 * min(out, into) * (out + into) if name in targets else 2 * out * into
    return total


def _unread_pair_flops(shapes: Shapes) -> int:
    """Of one such token beside one key in the last layer."""
    cfg = shapes.model.cfg
    return 0 if shapes.model.scan_layers else pair_flops(cfg) // cfg.num_layers
