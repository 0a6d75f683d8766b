"""Ahead-of-time compilation: what a training run would hold and do on a TPU pod, on a machine with no TPU.

The update, the rollout's programs and the two-pass function are compiled by the TPU's own compiler (libtpu, extra
`aot`) for the pod's topology, from shapes alone: no weights are read, nothing runs. The report says, for one chip,
which bytes lie there, by kind, how many operations each program makes and which messages it sends, with loops
multiplied out (`sva.cli.aot.hlo`), whether everything fits, and what to change where it does not.
"""

import importlib.util
import os
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from sva.cli.aot import hlo
from sva.cli.aot.programs import PROGRAMS, Program
from sva.cli.aot.shapes import Shapes, held_bytes, run_holds, targets_of
from sva.generation.loaded_model import DTYPES
from sva.models import layout
from sva.models.config import ModelConfig
from sva.models.moe_config import sparse_cuts
from sva.models.shape import model_config
from sva.models.stacks import cut, stacks
from sva.models.transformer import Transformer
from sva.models.weights import expected
from sva.parallel.sharding import abstract_mesh, batch_shards, check_rows, make_mesh, notes
from sva.training.config import Config
from sva.utils.errors import UserError
from sva.utils.padding import budget_bucket

HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB a chip: cloud.google.com/tpu/docs/system-architecture-tpu-vm
GIB = 2**30
_ENVIRON = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}  # no chip is used, no host is asked


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


def report(
    config: Config,
    devices: Sequence[Any] | int,
    *,
    hbm_gib: float,
    prompt_tokens: int,
    programs: tuple[str, ...] = tuple(PROGRAMS),
    cfg: ModelConfig | None = None,
    on_program: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """What one device of a pod would hold and do in a run of this configuration.

    Args:
      devices: of a topology, or real ones; or how many there would be: then nothing is compiled, and of a program
        only what it is given is counted, not its temporaries.
      hbm_gib: memory of one of them, GiB.
      prompt_tokens: length of the prompts.
      programs: some of `PROGRAMS`.
      cfg: the model's; by default read from config.model.
      on_program: called with a program's name before it is compiled.
    Raises:
      UserError: a mesh that does not make the devices, or a batch that does not divide over it.
    """
    mesh = abstract_mesh(config.mesh, devices) if isinstance(devices, int) else make_mesh(config.mesh, devices)
    _check_rows(config, mesh)
    if config.rollout.max_new_tokens is None:
        raise UserError("rollout.max_new_tokens must be set: no task is read here")
    cfg = cfg or model_config(config.model)
    scan = cut(config.layers, cfg.num_layers, sparse_cuts(cfg.moe))
    model = Transformer(cfg, DTYPES[config.dtype], scan_layers=config.scan is not False and scan)
    shapes = Shapes(config, model, mesh, prompt_tokens, budget_bucket(config.rollout.max_new_tokens))
    found = {}
    if not shapes.member.has_spectra:  # such experts have no z, which two passes mix
        programs = tuple(name for name in programs if name != "two_pass")
    for name in programs:
        if isinstance(mesh, AbstractMesh):
            found[name] = _counted(name, shapes, mesh)
            continue
        on_program(name)
        with jax.set_mesh(mesh):
            found[name] = _compiled(PROGRAMS[name](shapes), shapes)
    resident = {kind: held_bytes(tree) for kind, tree in run_holds(shapes).items()}
    total = sum(resident.values()) + max((beside(program) for program in found.values()), default=0)
    fits = total <= hbm_gib * GIB and not any("refused" in program for program in found.values())
    return {
        "mesh": dict(mesh.shape),
        "devices": mesh.size,
        "hbm_gib": hbm_gib,
        "prompt_tokens": shapes.prompt,
        "new_tokens": shapes.new,
        "rollout_rows": config.rollout.prompts * config.rollout.samples,
        "rows_at_work": config.rollout.rows_at_work(batch_shards(mesh)),
        "notes": notes(layout.params(model), mesh),
        "programs": found,
        "run": {"resident": resident, "at_most": total, "fits": fits},
        "advice": [] if fits else advice(shapes, resident, found, total - int(hbm_gib * GIB)),
    }


def _check_rows(config: Config, mesh: Mesh | AbstractMesh) -> None:
    check_rows("rollout.prompts", config.rollout.prompts, mesh)
    check_rows("train.micro_batch", config.train.micro_batch, mesh)
    if config.rollout.rows is not None:
        check_rows("rollout.rows", config.rollout.rows, mesh)


def beside(program: Mapping[str, Any]) -> int:
    """Bytes on a device while the program runs, beside what a run always holds."""
    return sum(size for kind, size in program["memory"].items() if kind != "cache")


def advice(shapes: Shapes, resident: Mapping[str, int], programs: Mapping[str, Any], missing: int) -> list[str]:
    """What would make a run fit that lacks `missing` bytes a device, the largest saving first."""
    config = shapes.config
    options: list[tuple[int, str]] = []
    if config.rollout.form == "dense":
        spared = 2 * held_bytes(targets_of(shapes))
        options.append((spared, "rollout.form=factored: the spectra stand in for base and merged target weights"))
    parts = shapes.mesh.shape["data"]
    if parts > 1:
        whole = sum(resident.values())
        options.append((whole - whole // parts, f"mesh.fsdp x {parts}, mesh.data=1: every weight lies there once"))
    if "update" in programs:
        temporaries = programs["update"]["memory"].get("temporaries", 0)
        if not config.train.remat:
            options.append((temporaries // 2, "train.remat=true: layers are computed again on the way back"))
        smaller = config.train.micro_batch // 2
        if smaller and smaller % batch_shards(shapes.mesh) == 0:
            options.append((temporaries // 2, f"train.micro_batch={smaller}: half the activations"))
    cache = max((program["memory"].get("rows", 0) for program in programs.values()), default=0)
    if cache > missing // 4:
        rows = config.rollout.rows_at_work(batch_shards(shapes.mesh))
        options.append((cache // 2, f"rollout.rows={rows // 2}: half the keys and values"))
    if shapes.mesh.size:
        options.append((sum(resident.values()) // 2, "twice the devices on mesh.fsdp: half of everything resident"))
    options.sort(key=lambda option: -option[0])
    head = f"{max(0, missing) / GIB:.2f} GiB a device too much, by what lies there and what the largest program adds"
    return [head, *(f"{text} (about {spared / GIB:.2f} GiB)" for spared, text in options if spared > 0)]


def summary(result: Mapping[str, Any]) -> str:
    """The report as text, GiB a device."""
    mesh = " x ".join(f"{name} {size}" for name, size in result["mesh"].items())
    lines = [f"mesh {mesh}; {result['hbm_gib']:.4g} GiB a device; prompts of {result['prompt_tokens']} tokens, "]
    lines[0] += (
        f"completions of {result['new_tokens']}, {result['rollout_rows']} rows, {result['rows_at_work']} at a time"
    )
    lines += [f"note: {note}" for note in result["notes"]]
    for name, program in result["programs"].items():
        memory = ", ".join(f"{kind} {size / GIB:.2f}" for kind, size in program["memory"].items())
        lines.append(f"{name}: {memory} GiB")
        if "refused" in program:
            lines.append(f"  the compiler refuses it: {program['refused']}")
        if "flops" not in program:
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
    total = result["run"]["at_most"] / GIB
    lines.append(f"a run holds {resident}; with what its largest program adds {total:.2f} GiB: {verdict}")
    return "\n".join([*lines, *(f"  {line}" for line in result["advice"])])


def weight_shaped(text: str, shapes: Mapping[str, tuple[int, ...]], leads: Collection[int]) -> list[str]:
    """Results of a traced program's products that have a target weight's shape, either way round, stacked or not.

    Args:
      text: the program before it is divided over devices (`lowered.as_text()`), so that shapes are whole.
      shapes: of the target weights.
      leads: the sizes of the first axes of what the model stacks: layers, modules.
    """
    wanted = {tuple(sorted(shape)) for shape in shapes.values()}
    found: dict[str, None] = {}
    for kind, dims in re.findall(r"(stablehlo\.dot_general|chlo\.ragged_dot).*->\s*tensor<((?:\d+x)+)\w+>", text):
        sizes = [int(n) for n in dims.rstrip("x").split("x")]
        if kind == "chlo.ragged_dot" and len(sizes) == 2:
            continue  # rows, each of which met its own matrix
        first = next((at for at, size in enumerate(sizes) if size not in leads), len(sizes))
        for start in range(first + 1):
            if tuple(sorted(n for n in sizes[start:] if n > 1)) in wanted:
                found[dims.rstrip("x")] = None
    return list(found)


def _counted(name: str, shapes: Shapes, mesh: AbstractMesh) -> dict[str, Any]:
    """One program's part of the report, without compiling it."""
    with jax.sharding.use_abstract_mesh(mesh):
        return {"memory": _given(PROGRAMS[name](shapes))}


def _given(program: Program) -> dict[str, int]:
    """Bytes on a device of what the program is given beside what a run always holds, by kind, and of its cache."""
    kinds = {kind: held_bytes(tree) for kind, tree in program.kinds.items() if tree is not None}
    return kinds | {"cache": held_bytes(program.cache)}


def _compiled(program: Program, shapes: Shapes) -> dict[str, Any]:
    """One program's part of the report."""
    started = time.perf_counter()
    lowered = program.lower()
    traced = lowered.as_text()
    memory = _given(program)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        temporaries = refused_temporaries(str(error), given=beside({"memory": memory}))
        if temporaries is None:
            raise
        return {"memory": memory | {"temporaries": temporaries}, "refused": _first_line(error)}
    seconds = time.perf_counter() - started
    stats = compiled.memory_analysis()
    cfg, parts = shapes.model.cfg, shapes.mesh.shape.get("moe", 1)
    met = 1 / parts if cfg.moe and cfg.moe.modules % parts == 0 else 1  # what does not divide lies on every device
    found = hlo.analyse(compiled.as_text(), open_turns=program.open_turns, met=met)
    leaves = expected(cfg)
    targets = {name: leaves[name].shape for name in shapes.targets}
    sizes = {stack.size for stack in stacks(cfg.num_layers, shapes.model.scan_layers)}
    sizes |= {cfg.moe.modules} if cfg.moe else set()
    return {
        "memory": memory | {"temporaries": stats.temp_size_in_bytes},  # the cache is one of those
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
        "weight_shaped_products": weight_shaped(traced, targets, sizes),
        "compile_seconds": round(seconds, 1),
    }


def refused_temporaries(message: str, *, given: int) -> int | None:
    """Bytes of temporaries of a program that the TPU's compiler finds too large; None where it says other things.

    Its words are "Ran out of memory in memory space hbm. Used 19.33G of 15.75G hbm", where `given` bytes are not
    temporaries, or "the total memory required for HLO temporaries (31.67G) exceeds available HBM (15.75G)".
    """
    number = r"(\d+(?:\.\d+)?)([MG])"
    used = re.search(rf"Used {number} of \d+(?:\.\d+)?[MG] hbm", message)
    alone = re.search(rf"required for HLO temporaries \({number}\)", message)
    if not (match := used or alone):
        return None
    size = int(float(match[1]) * {"M": 2**20, "G": GIB}[match[2]])
    return max(0, size - given) if used else size


def _first_line(error: Exception) -> str:
    return next(line.strip() for line in str(error).splitlines() if line.strip())[:300]
