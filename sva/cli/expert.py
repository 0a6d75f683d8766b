"""`sva expert show | relabel | import | export | transfer | push | pull`: what an expert holds, its ways in and out."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from sva.adapters.spelling import UNDECOMPOSED
from sva.cli import expert_hub
from sva.cli.command_line import Command, Group, argument, option
from sva.cli.options import MODEL, MODEL_HELP, base_of, print_result, start_jax
from sva.utils.errors import UserError
from sva.utils.remote import to_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Print what an expert file holds; with a model, where and how much it moved the spectrum."""

    expert: Path = argument("an expert file", read=to_path)
    model: str | None = option("its base model: path, hub id or known name", None)
    plot: Path | None = option("draw it: by layer and kind, and along the spectrum", None, metavar="PNG")
    json: bool = option("print it as JSON", False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relabel:
    """Give an expert another label: two that have the same cannot be told apart by the first pass."""

    expert: Path = argument("an expert file", read=to_path)
    label: str = option("what the first pass calls it, one word, such as math")
    description: str | None = option("what its questions are, for the first pass (default: as it was)", None)
    out: Path = option("the new expert file", short="-o")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Read an expert that Transformer-Squared's public code trained, or an adapter of PEFT.

    policy_params*.pt and learnable_params*.pt are read, those of few-shot mixtures too, and the directories that PEFT
    saves of LoRA, rsLoRA, DoRA and IA3. Nothing in the file is run, and torch is not needed.
    """

    file: Path = argument("a .pt file, or a directory with adapter_config.json")
    model: str = option(f"the model it was trained on: {MODEL_HELP}", MODEL)
    out: Path | None = option("the expert file (default: FILE with the ending .safetensors)", None, short="-o")
    label: str | None = option("what the first pass calls it, one word, such as math", None)
    description: str = option("what its questions are, for the first pass", "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write an expert for other programs.

    hf: a Hugging Face checkpoint with adapted weights. gguf: the same as a GGUF file, with the tokenizer where the
    model came from one. peft: a LoRA adapter of the largest changes, its error stated; an expert of LoRA,
    DoRA or IA3 as it is.
    """

    expert: Path = argument("an expert file", read=to_path)
    model: str = option(f"path, hub id or known name (default: the expert's base, or {MODEL})", "")
    format: Literal["hf", "gguf", "peft"] = option("of the files, as above")
    out: Path = option("a new directory (gguf: a new file)", short="-o")
    dtype: Literal["float32", "bfloat16"] = option("stored (default: float32)", "float32")
    rank: int | None = option("peft: components of each matrix at most", None, excludes="limit")
    tolerance: float | None = option(
        "peft: leave out changes below this part of s_max; 0 is exact", None, excludes="limit"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer:
    """Move an expert to another model by index.

    The i-th singular value of a matrix there takes the i-th z of the matrix of that name here; what a shorter spectrum
    has no room for is left out, the rest of a longer one stays at 1.
    """

    expert: Path = argument("an expert file", read=to_path)
    model: str = option("the other model: path, hub id or known name")
    out: Path = option("the new expert file", short="-o")
    base: str | None = option("the model that it was trained on (default: the one the file names)", None)
    shuffle: int | None = option("the control: shuffle each vector first", None, metavar="SEED")


def show(arguments: Show) -> None:
    """Runs `sva expert show`."""
    if arguments.plot and not arguments.model:
        raise UserError("--plot needs the spectra of the base model: name it with --model")
    if arguments.plot:
        _fresh(arguments.plot)
    start_jax()
    import numpy as np

    from sva.spectral.expert import Expert

    expert = Expert.load(arguments.expert)
    if not expert.raw:
        raise UserError(f"{arguments.expert} holds no weights; train it again")
    values = np.concatenate([np.ravel(raw) for raw in expert.arrays.values()])
    raw = {"min": float(values.min()), "max": float(values.max()), "std": float(values.std())}
    result: dict[str, Any] = {"weights": len(expert.names), "values": values.size}
    result |= {"parametrisation": expert.parametrisation, "raw": raw, "metadata": dict(expert.metadata)}
    text = (
        f"{arguments.expert}: {len(expert.names)} weights, {values.size} values, {expert.parametrisation}\n"
        f"raw values {raw['min']:.4f} to {raw['max']:.4f}, standard deviation {raw['std']:.4f}\n"
        f"{json.dumps(dict(expert.metadata), indent=2)}"
    )
    if arguments.model:
        from sva.interop import expert_report
        from sva.spectral.parametrisations import singular_values

        _, expert, spectra = _adapted(arguments.expert, arguments.model)
        z = expert.z(spectra)
        moved = expert_report.movements(z, singular_values(spectra))
        result |= expert_report.as_json(moved)
        text += f"\n\n{expert_report.as_text(moved)}"
        if arguments.plot:
            expert_report.draw(moved, z, f"{arguments.expert.name} on {arguments.model}", arguments.plot)
            text += f"\n\npicture: {arguments.plot}"
    print_result(result, arguments.json, text)


def relabel(arguments: Relabel) -> None:
    """Runs `sva expert relabel`."""
    from sva.spectral.expert import Expert
    from sva.tasks.labels import OTHER

    _fresh(arguments.out)
    if not arguments.label.isalnum() or arguments.label == OTHER:
        raise UserError(f"--label {arguments.label!r} must be one word of letters and digits, and not {OTHER!r}")
    expert = Expert.load(arguments.expert)
    about = {**expert.metadata, "label": arguments.label}
    if arguments.description is not None:
        about["description"] = arguments.description
    dataclasses.replace(expert, metadata=about).save(arguments.out)
    was = expert.metadata.get("label", "no label")
    print(f"{arguments.out}: {arguments.label}, which was {was}; {about.get('description') or 'no description'}")


def import_(arguments: Import) -> None:
    """Runs `sva expert import`."""
    if arguments.file.suffix == ".safetensors":
        raise UserError(
            f"{arguments.file} is no .pt file of the public code, nor a directory of PEFT's; an expert of sva needs no "
            "import, and PEFT's adapter_model.safetensors is given by its directory"
        )
    out = arguments.out or arguments.file.with_suffix(".safetensors")
    _fresh(out)
    start_jax()
    import dataclasses

    from sva.generation.load import load
    from sva.interop.sakana import read_expert
    from sva.interop.torch_files import read_tensors

    if arguments.file.is_dir():
        from sva.interop.peft_adapters import read_adapter

        expert = read_adapter(arguments.file, load(arguments.model))
    else:
        read_tensors(arguments.file)  # what is wrong with it is said before a model is loaded
        expert = read_expert(arguments.file, load(arguments.model))
    if arguments.label:
        label = {"label": arguments.label, "description": arguments.description}
        expert = dataclasses.replace(expert, metadata={**expert.metadata, **label})
    expert.save(out)
    print(f"{out}: {expert.metadata['imported_from']['layout']}, {len(expert.raw)} weights, {expert.parametrisation}")


def export(arguments: Export) -> None:
    """Runs `sva expert export`."""
    _fresh(arguments.out)
    _check_limit(arguments)
    start_jax()
    arguments = dataclasses.replace(arguments, model=arguments.model or base_of((arguments.expert,)) or MODEL)
    lm, expert, spectra = _adapted(arguments.expert, arguments.model)
    title = str(expert.metadata.get("task") or arguments.expert.stem)
    if arguments.format == "peft" and not expert.member.has_spectra:
        import jax.numpy as jnp

        from sva.interop.peft_adapters import save_adapter

        said = save_adapter(arguments.out, lm, expert, title=title, dtype=jnp.dtype(arguments.dtype))
        print(f"{arguments.out}: {said}")
        return
    write = {"hf": _export_hf, "gguf": _export_gguf, "peft": _export_peft}[arguments.format]
    print(f"{arguments.out}: {write(arguments, lm, spectra, expert.z(spectra), title)}")


def _check_limit(arguments: Export) -> None:
    """Raises UserError for a --rank or --tolerance that is out of range or of no use to the format."""
    limited = arguments.rank is not None or arguments.tolerance is not None
    spelt = _parametrisation(arguments.expert) if arguments.format == "peft" else None
    if limited != (spelt is not None and spelt not in UNDECOMPOSED):
        raise UserError(
            f"--rank and --tolerance are for singular values, this expert is of {spelt}; leave them out"
            if spelt in UNDECOMPOSED
            else "--format peft needs --rank or --tolerance (--tolerance 0 is exact)"
            if spelt
            else f"--rank and --tolerance are for --format peft, {arguments.format} holds the whole change"
        )
    if arguments.rank is not None and arguments.rank < 1:
        raise UserError(f"--rank {arguments.rank} must be at least 1")
    if arguments.tolerance is not None and not 0 <= arguments.tolerance < 1:
        raise UserError(f"--tolerance {arguments.tolerance} must be at least 0 and below 1, a part of s_max")


def _parametrisation(path: Path) -> str:
    """The name of an expert file's parametrisation."""
    from sva.spectral.expert import Expert

    return Expert.load(path).member.name


def _export_peft(arguments: Export, lm: Any, spectra: Any, z: Any, title: str) -> str:
    """A few words about the LoRA adapter that it wrote."""
    import jax.numpy as jnp

    from sva.interop import peft

    limit = {"rank": arguments.rank, "tolerance": arguments.tolerance or 0.0}
    dtype = jnp.dtype(arguments.dtype)
    return peft.summary(peft.save_peft(arguments.out, lm, spectra, z, title=title, dtype=dtype, **limit))


def _export_hf(arguments: Export, lm: Any, spectra: Any, z: Any, title: str) -> str:
    """A few words about the checkpoint that it wrote."""
    import jax.numpy as jnp
    import numpy as np

    from sva.generation.merge import merge
    from sva.models.export import save_checkpoint

    del title
    dtype, named = jnp.dtype(arguments.dtype), merge(lm, spectra, z).named_params()
    tensors = ((name, np.asarray(weight).astype(dtype, copy=False)) for name, weight in named.items())
    save_checkpoint(arguments.out, lm.model.cfg, tensors, lm.tokenizer)
    return f"a Hugging Face checkpoint, {len(named)} weights, {arguments.dtype}"


def _export_gguf(arguments: Export, lm: Any, spectra: Any, z: Any, title: str) -> str:
    """A few words about the GGUF file that it wrote."""
    import jax.numpy as jnp
    import numpy as np

    from sva.generation.merge import merge
    from sva.interop.gguf_export import save_gguf, tokenizer_metadata
    from sva.models.hub import resolve

    named = merge(lm, spectra, z).named_params()
    tokenizer = tokenizer_metadata(resolve(arguments.model))
    save_gguf(
        arguments.out,
        lm.model.cfg,
        lambda name: np.asarray(named[name]),
        name=f"{lm.name} + {title}",
        tokenizer=tokenizer,
        dtype=jnp.dtype(arguments.dtype),
    )
    tokens = "with its tokenizer" if tokenizer else "without a tokenizer, for the model did not come from a GGUF file"
    return f"a GGUF file, {len(named)} weights, {arguments.dtype}, {tokens}"


def transfer(arguments: Transfer) -> None:
    """Runs `sva expert transfer`."""
    from sva.utils import seeds

    _fresh(arguments.out)
    if arguments.shuffle is not None:
        seeds.check("--shuffle", arguments.shuffle)
    start_jax()
    from sva.generation.decompose import spectra_of
    from sva.generation.load import load
    from sva.models.weights import expected
    from sva.spectral import transfer as by_index
    from sva.spectral.expert import Expert, require_mixable
    from sva.utils.trees import select

    expert = Expert.load(arguments.expert)
    require_mixable([expert])
    name = arguments.base or expert.metadata.get("base")
    if not name:
        raise UserError(f"{arguments.expert} does not name its base model; give it with --base")
    base = load(name)
    expert = Expert.load(arguments.expert, fingerprint=base.fingerprint, base=base.name)
    z = expert.z(spectra_of(base, expert.names))
    other = load(arguments.model)
    specs = expected(other.model.cfg)
    ranks = {weight: min(specs[weight].shape) for weight in select(specs, "all")}
    moved = by_index.transfer(z, ranks, arguments.shuffle)
    kept = {
        key: expert.metadata[key]
        for key in ("targets", "layers", "task", "label", "description")
        if key in expert.metadata
    }
    source = {"base": base.name, "fingerprint": base.fingerprint, "digest": expert.digest}
    source |= {"parametrisation": expert.parametrisation, "shuffle": arguments.shuffle}
    about = {"base": other.name, "fingerprint": other.fingerprint} | kept | {"transferred_from": source}
    Expert(moved, "linear", about).save(arguments.out)
    resized = [weight for weight, vector in z.items() if len(vector) != ranks[weight]]
    note = f", {len(resized)} of another length" if resized else ""
    shuffled = "" if arguments.shuffle is None else f", shuffled with seed {arguments.shuffle}"
    print(f"{arguments.out}: {len(moved)} weights from {base.name} to {other.name}{note}{shuffled}")


def _adapted(path: Path, model: str) -> tuple[Any, Any, Any]:
    """(base model, expert, its spectra) of a model and an expert file, which must belong together.

    For an expert without spectra the last is what `sva.frozen` gives.
    """
    from sva.generation.frozen import frozen
    from sva.generation.load import load
    from sva.spectral.expert import Expert

    Expert.load(path)  # what is wrong with it is said before a model is loaded
    lm = load(model)
    expert = Expert.load(path, fingerprint=lm.fingerprint, base=lm.name)
    return lm, expert, frozen(lm, expert)


def _fresh(path: Path) -> None:
    """Raises UserError where there is something already, before anything is computed."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise UserError(f"{path} exists; give another path, or remove it first")


COMMAND = Group(
    "expert",
    "Look into an expert, share it, or take it from or to other programs and models.",
    (
        Command("show", Show, show),
        Command("relabel", Relabel, relabel),
        Command("import", Import, import_),
        Command("export", Export, export),
        Command("transfer", Transfer, transfer),
        expert_hub.PUSH,
        expert_hub.PULL,
    ),
)
