"""What the commands share: options that several of them take, the start of JAX, and how a result is printed."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from sva.cli.command_line import option
from sva.parallel import mesh_config
from sva.parallel.mesh_config import MeshConfig
from sva.utils.errors import UserError
from sva.utils.remote import is_remote, local_file, to_path

MODEL = "smollm2-135m-instruct"
MODEL_HELP = "path, hub id or known name (default: %(default)s)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOption:
    """Which model."""

    model: str = option(MODEL_HELP, MODEL)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """How a model is held, as `sva.load` takes it."""

    dtype: Literal["float32", "bfloat16", "int8"] = option("of the weights (default: %(default)s)", "float32")
    kv_dtype: Literal["float32", "bfloat16", "int8"] | None = option(
        "of keys and values (default: the activations')", None
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadingOptions(PrecisionOptions):
    """Which model, how it is held, and on which devices."""

    model: str = option(f"path, hub id or known name (default: the base of the first --expert, or {MODEL})", "")
    mesh: MeshConfig = option(
        "devices along the axes data, fsdp, tensor and moe (modules of a mixture of experts), e.g. data=4,tensor=2; "
        "-1: what the others leave (default: one device)",
        MeshConfig(),
        read=mesh_config.parse,
        metavar="AXIS=N,...",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """Which experts."""

    expert: tuple[Path, ...] = option(
        "an expert file, or OWNER/NAME of one on the Hugging Face Hub; may be repeated", (), read=to_path
    )
    skip_foreign: bool = option("leave out experts of another base model", False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstPassOptions(ExpertOptions):
    """The experts, and who chooses between them."""

    classifier: Path | None = option("a classification expert for the first pass (task: routing)", None, read=to_path)
    alphas: Path | None = option("one mixture of the experts for all questions, from sva adapt", None, read=to_path)
    choice: str = option(
        "hard: the likeliest expert; soft: all by probability; a number: as hard, but the base where less sure "
        "(default: %(default)s)",
        "hard",
    )


def precision(options: PrecisionOptions) -> dict[str, Any]:
    """--dtype and --kv-dtype where they are not the defaults, for the settings that a file of answers is known by."""
    chosen = {"dtype": options.dtype} if options.dtype != "float32" else {}
    return chosen | ({"kv_dtype": options.kv_dtype} if options.kv_dtype else {})


def completed(options: Any) -> Any:
    """The options of a command with experts that are files of this machine, and with a model.

    Raises:
      UserError: as `with_experts_here`.
    """
    options = with_experts_here(options)
    if isinstance(options, LoadingOptions) and not options.model:
        return dataclasses.replace(options, model=base_of(getattr(options, "expert", ())) or MODEL)
    return options


def base_of(experts: tuple[Path, ...]) -> str | None:
    """The model that the first of these files was trained on; None where it does not say, or one that is not here.

    A path of another machine, or a repository that nobody has asked for, is no default.
    """
    import safetensors

    from sva.models.hub import KNOWN, here

    with contextlib.suppress(OSError, ValueError, safetensors.SafetensorError, UserError):  # its reader says what it is
        for path in experts[:1]:
            with local_file(path) as local, safetensors.safe_open(local, framework="numpy") as file:
                base = json.loads((file.metadata() or {}).get("sva", "{}")).get("base")
                return base if base in KNOWN or (base and here(base)) else None
    return None


def with_experts_here(options: Any) -> Any:
    """The options of a command with files of this machine in place of experts on the Hub, which are fetched.

    Raises:
      UserError: there is no such file and no such repository, or it holds no expert.
    """
    if not isinstance(options, ExpertOptions):
        return options
    here: dict[str, Any] = {"expert": tuple(_here(path) for path in options.expert)}
    if isinstance(options, FirstPassOptions) and options.classifier:
        here["classifier"] = _here(options.classifier)
    return dataclasses.replace(options, **here)


def _here(path: Path) -> Path:
    if is_remote(path) or path.exists() or path.is_absolute() or len(path.parts) != 2:
        return path
    from sva.sharing.hub import expert_file, repo_of

    repo = repo_of(str(path))
    return expert_file(repo) if repo else path


def check_experts(options: ExpertOptions) -> None:
    """Raises UserError for a file of --expert, --classifier or --alphas that cannot be read: before a model is."""
    classifier, alphas = (options.classifier, options.alphas) if isinstance(options, FirstPassOptions) else (None, None)
    if options.expert:
        from sva.spectral.expert import Expert

        for path in [*options.expert, *([classifier] if classifier else [])]:
            Expert.load(path)
    if alphas:
        from sva.adaptation.mixture_file import Alphas

        Alphas.load(alphas)


@contextlib.contextmanager
def loading(options: LoadingOptions, name: str, rows: int) -> Iterator[dict[str, Any]]:
    """The arguments of `sva.load` that the options stand for; their mesh is set for the block.

    Args:
      name, rows: an option that says how many rows are at work at a time, which the mesh must divide.
    Raises:
      UserError: a mesh that does not make the devices or does not divide the rows, or int8 weights on one.
    """
    from sva.parallel import sharding

    with sharding.on_mesh(options.mesh) as mesh:
        sharding.check_rows(name, rows, mesh)
        if mesh is not None and options.dtype == "int8":
            raise UserError("--dtype int8 is for one device; leave out --mesh, or use --dtype bfloat16")
        yield {"dtype": options.dtype, "kv_dtype": options.kv_dtype, "mesh": mesh, "progress": is_writer()}


def start_jax() -> None:
    """Imports JAX, which keeps compiled programs on disk, says when compiling is long, and joins a run's processes.

    Each command calls it when nothing is left to check without JAX, and before JAX's first device.
    """
    from sva.parallel import compile_cache, compile_notice, processes

    compile_cache.start()
    compile_notice.start()
    processes.start()


def is_writer() -> bool:
    """Whether this process, of several perhaps, shows and writes what a command makes; after `start_jax`."""
    from sva.parallel import processes

    return processes.is_writer()


def print_result(result: Mapping[str, Any], as_json: bool, text: str) -> None:
    """Prints the result as JSON, or the text."""
    print(json.dumps(result, indent=2) if as_json else text)
