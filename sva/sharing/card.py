"""The card of what is shared: README.md with the Hub's YAML in front, made from records and nothing else.

What a record does not say is left out. The text is made public as a whole (`sva.sharing.redact`), and of the settings
those of the machine are dropped.
"""

import dataclasses
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import yaml

from sva.models.hub import KNOWN, is_hub_id
from sva.sharing import redact
from sva.sharing.bundle import Bundle, dtypes
from sva.spectral.expert import Expert
from sva.spectral.parametrisations import Diagonal
from sva.tasks import names as known_tasks
from sva.tasks import task as make_task
from sva.training.config import Config
from sva.utils.remote import is_remote, to_path

_OF_THE_MACHINE = ("run_dir", "wandb", "mesh", "checkpoint", "scan_layers")  # settings, or their sections
_HEAD = "expert of singular values ([Transformer-Squared](https://arxiv.org/abs/2501.06252))"
_CHECKPOINTS = {"library_name": "transformers", "pipeline_tag": "text-generation"}


class About(NamedTuple):
    """What a card says that no record does."""

    repo: str  # owner/name
    licence: str | None = None  # as the Hub spells it, such as apache-2.0
    base: str | None = None  # hub id of the base model; None for the one that the record names


def text(bundle: Bundle, about: About) -> str:
    """README.md of a bundle."""
    named = _base_name(bundle)
    found = hub_base(named)
    base, model = about.base or found, named if found else about.base
    body = {"expert": _of_expert, "mixture": _of_mixture, "checkpoint": _of_checkpoint}[bundle.kind]
    parts = ["---", _front(bundle, about, base), "---", "", f"# {about.repo.partition('/')[2]}", ""]
    return redact.public("\n".join([*parts, *body(bundle, about, model)])).rstrip() + "\n"


def hub_base(name: str | None) -> str | None:
    """The hub id of a base model, as a record names it; None where it has none, or lies on this machine."""
    if not name or is_remote(name) or to_path(name).exists():
        return None
    if known := KNOWN.get(name.lower()):
        return next(
            (other.hub_id for other in KNOWN.values() if other.packaged is known.packaged and other.hub_id), None
        )
    return name if is_hub_id(name) else None


def _base_name(bundle: Bundle) -> str | None:
    if bundle.alphas is not None:
        return bundle.alphas.base.get("name")
    return bundle.experts[0].metadata.get("base") if bundle.experts else None


def _front(bundle: Bundle, about: About, base: str | None) -> str:
    """The YAML that the Hub reads."""
    members = sorted({expert.member.name for expert in bundle.experts})
    tags = ["sva", "singular-value-adaptation", bundle.kind, *members]
    settings: dict[str, Any] = {"tags": tags, "license": about.licence}
    settings |= _CHECKPOINTS if bundle.kind == "checkpoint" else {"library_name": "sva"}
    if base:
        relation = "finetune" if bundle.kind == "checkpoint" else "adapter"
        settings |= {"base_model": base, "base_model_relation": relation}
    return huggingface_hub.ModelCardData(**settings).to_yaml()


# The three kinds.


def _of_expert(bundle: Bundle, about: About, model: str | None) -> list[str]:
    (expert,), name = bundle.experts, about.repo.partition("/")[2]
    file = f"{name}.safetensors"
    use = [f"sva expert pull {about.repo} -o {file}", f'sva generate "..."{_on(model)} --expert {file}']
    if not isinstance(expert.member, Diagonal):
        use[1] = f"sva expert export {file}{_on(model)} --format hf -o {name}"
    elif expert.metadata.get("labels"):
        use[1] = f'sva generate "..."{_on(model)} --classifier {file} --expert A.safetensors --expert B.safetensors'
    rows = [*_facts_of(expert), *_file_rows(bundle), *_licence_row(about)]
    parts = [f"An sva {_what(expert)}{_purpose(expert)}.", "", *_use(use), *_table(rows), *_results(expert)]
    return [*parts, *_made(expert.metadata, bundle.record)]


def _of_mixture(bundle: Bundle, about: About, model: str | None) -> list[str]:
    assert bundle.alphas is not None
    alphas, count = bundle.alphas, len(bundle.experts)
    name = about.repo.partition("/")[2]
    per_matrix = isinstance(alphas.values, Mapping)
    values = [list(row) for row in alphas.values.values()] if per_matrix else [list(alphas.values)]
    means = np.mean(np.asarray(values, np.float64), axis=0)
    rows = [["expert", "alpha, mean over matrices" if per_matrix else "alpha", "task", "gain"], ["---"] * 4]
    for number, (expert, mean) in enumerate(zip(bundle.experts, means, strict=True), 1):
        about_it = expert.metadata
        told = f"{number}: {about_it.get('label') or ''} (`{expert.digest[:12]}`)"
        rows.append([told, f"{mean:.4g}", str(about_it.get("task") or ""), _gain(about_it) or ""])
    names = [f"--expert {name}/expert-{number}.safetensors" for number in range(1, count + 1)]
    use = [f"sva expert pull {about.repo} -o {name}"]
    use += [f'sva generate "..."{_on(model)} {" ".join(names)} --alphas {name}/alphas.json']
    how = " mixed as Transformer-Squared's public code does" if alphas.reference else ""
    parts = [f"A mixture of {count} sva experts{how}: one z for all prompts.", "", *_use(use), "## Experts", ""]
    facts = [*_base_rows(alphas.base.get("name"), alphas.base.get("fingerprint")), *_file_rows(bundle)]
    parts += [*_lines(rows), "", *_table([*facts, *_licence_row(about)])]
    settings = {k: v for k, v in (alphas.record.get("settings") or {}).items() if k not in ("experts", "fingerprint")}
    return [*parts, *_how("adapt", alphas.record, settings)]


def _of_checkpoint(bundle: Bundle, about: About, model: str | None) -> list[str]:
    merged = bundle.experts[0] if bundle.experts else None
    what = (
        f"an sva {_what(merged)} merged into its weights{_purpose(merged)}" if merged else "a Hugging Face checkpoint"
    )
    code = [
        "import transformers",
        "",
        f'model = transformers.AutoModelForCausalLM.from_pretrained("{about.repo}", dtype="auto")',
    ]
    use = ["## Use it", "", *_fenced("python", code), *_fenced("sh", [f'sva generate "..." --model {about.repo}'])]
    weights = [path for name, path in bundle.files.items() if name.endswith(".safetensors")]
    stored = ", ".join(
        [f"{sum(path.stat().st_size for path in weights):,} bytes", f"files: {len(weights)}", *dtypes(bundle)]
    )
    parts = [f"{model or 'A base model'} with {what}." if merged else f"This is {what}.", ""]
    rows = [["stored weights", stored], *(_facts_of(merged) if merged else []), *_licence_row(about)]
    parts += [*use, *_table(rows)]
    return [*parts, *_results(merged), *_made(merged.metadata, bundle.record)] if merged else parts


def _on(model: str | None) -> str:
    return f" --model {model}" if model else ""


# What a record says, in parts of a card: lines of Markdown.


def _what(expert: Expert) -> str:
    return _HEAD if isinstance(expert.member, Diagonal) else f"adapter ({expert.member.name})"


def _purpose(expert: Expert) -> str:
    label, description = (_one_line(expert.metadata.get(name)) for name in ("label", "description"))
    if not description:
        return f", label `{label}`" if label else ""
    return f" for *{description}*" + (f" (label `{label}`)" if label else "")


def _facts_of(expert: Expert) -> list[list[str]]:
    about = expert.metadata
    numbers = sum(int(np.size(array)) for array in expert.arrays.values())
    where = "".join(f", {name} {_one_line(about[name])}" for name in ("targets", "layers") if about.get(name))
    rows = _base_rows(about.get("base"), about.get("fingerprint"))
    rows += [["adapts", f"{len(expert.names)} matrices{where}; {numbers:,} numbers"]]
    rows += [["parametrisation", f"`{expert.parametrisation}`"], ["digest", f"`{expert.digest}`"]]
    if about.get("task"):
        rows += [["task", f"`{_one_line(about['task'])}`{_data_of(str(about['task']))}"]]
    if (seed := _dig(about, "config", "seed")) is not None:
        rows += [["seed", str(seed)]]
    if labels := about.get("labels"):
        rows += [["tells apart", ", ".join(map(_one_line, labels))]]
    return rows


def _base_rows(name: Any, fingerprint: Any) -> list[list[str]]:
    rows = [["base model", f"`{_one_line(name)}`"]] if name else []
    return rows + ([["its fingerprint", f"`{fingerprint}`, sha256 over its weights"]] if fingerprint else [])


def _data_of(task: str) -> str:
    """Licence and origin of a task's data, where it is one of sva's own."""
    if task not in known_tasks() or task == "routing":
        return ""
    known = make_task(task)
    return f"; its data: {known.licence}, {known.origin}"


def _file_rows(bundle: Bundle) -> list[list[str]]:
    rows = []
    for name, path in bundle.files.items():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        rows.append([name, f"{path.stat().st_size:,} bytes, sha256 `{digest}`"])
    return rows


def _licence_row(about: About) -> list[list[str]]:
    return [["licence", about.licence]] if about.licence else []


def _results(expert: Expert) -> list[str]:
    """Accuracy before and after with intervals, as the run measured it; nothing where it did not."""
    about = expert.metadata
    pairs = {"base": "before", "with the expert": "after"}
    rows = [[name, said] for name, key in pairs.items() if (said := _share(_dig(about, "metrics", key)))]
    gain, n = _gain(about), _dig(about, "metrics", "n")
    if not rows or n is None:
        return []
    rows += [["gain", gain]] if gain else []
    split, seed = _dig(about, "config", "evaluate", "split"), _dig(about, "config", "seed")
    of = f" ({split} split)" if split else ""
    run = f", one run (seed {seed})" if seed is not None else ""
    task = f" of `{_one_line(about['task'])}`" if about.get("task") else ""
    return ["## Results", "", *_lines([["", "right answers [95 % interval]"], ["---", "---"], *rows]), ""] + [
        f"n = {n} questions{task}{of}{run}; the gain is paired.",
        "",
    ]


def _share(interval: Any) -> str:
    numbers = _interval(interval)
    return "{:.1f} % [{:.1f}, {:.1f}]".format(*numbers) if numbers else ""


def _gain(about: Mapping[str, Any]) -> str:
    numbers = _interval(_dig(about, "metrics", "gain"))
    return "{:+.1f} points [{:+.1f}, {:+.1f}]".format(*numbers) if numbers else ""


def _interval(found: Any) -> list[float] | None:
    """(mean, low, high) in percent; None where the record has no three numbers."""
    values = [found.get(name) for name in ("mean", "low", "high")] if isinstance(found, Mapping) else []
    is_whole = values and all(isinstance(value, int | float) for value in values)
    return [100 * float(value) for value in values if value is not None] if is_whole else None


def _made(about: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
    """How an expert came to be: the command and its settings, or the file or model that it came from."""
    for name, words in (("imported_from", "Imported from"), ("transferred_from", "Transferred from")):
        if name in about:
            return ["## How it was made", "", f"{words}:", "", *_fenced("yaml", [_yaml(about[name])])]
    config, run_dir = about.get("config"), _dig(about, "config", "run_dir")
    settings = _settings(config) if isinstance(config, Mapping) else {}
    if about.get("task") not in (settings.get("task"), Path(str(settings.get("task"))).stem):
        settings.pop("task", None)  # trained from Python, on a task that the settings do not name
    return _how("train", record, settings, run_dir)


def _how(name: str, record: Mapping[str, Any], settings: Mapping[str, Any], run_dir: Any = None) -> list[str]:
    """The command with its settings and versions: of `sva train` or `sva adapt`."""
    command, versions = record.get("command"), record.get("versions")
    is_ours = str(command).startswith("sva ")  # not the program of somebody who trained from Python
    parts = _fenced("sh", [_command(str(command), run_dir)]) if is_ours else []
    if settings:
        which = ", where they are not the defaults" if name == "train" else ""
        parts += [f"Settings of `sva {name}`{which}:", "", *_fenced("yaml", [_yaml(settings)])]
    if isinstance(versions, Mapping):
        parts += ["Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".", ""]
    return ["## How it was made", "", *parts] if parts else []


def _command(command: str, run_dir: Any) -> str:
    """The command without the directory of the run, which says nothing about the expert."""
    if run_dir:
        command = command.replace(f"run_dir={run_dir}", "")
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    kept = [word for word in words if not word.startswith(("run_dir=", "wandb="))]
    return shlex.join([redact.public(word) for word in kept])


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that are not today's defaults, and always the model, the task and the seed; none of the machine's."""
    usual = dataclasses.asdict(Config())
    always = {name: config[name] for name in ("model", "task", "seed") if name in config}
    return always | {
        name: value
        for name, value in _other(config, usual).items()
        if name not in _OF_THE_MACHINE and name not in always
    }


def _other(config: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        default = usual.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            if inner := _other(value, default):
                found[name] = inner
        elif value != (list(default) if isinstance(default, tuple) else default):
            found[name] = value
    return found


def _yaml(values: Mapping[str, Any]) -> str:
    """A line for each value, sections in braces."""
    lines = []
    for name, value in values.items():
        flow = None if isinstance(value, Mapping | list | tuple) else False
        lines.append(yaml.safe_dump({name: value}, sort_keys=False, allow_unicode=True, default_flow_style=flow))
    return "".join(lines).rstrip()


def _use(commands: Sequence[str]) -> list[str]:
    return ["## Use it", "", *_fenced("sh", commands)]


def _fenced(language: str, lines: Sequence[str]) -> list[str]:
    return [f"```{language}", *lines, "```", ""]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["## What it is", "", *_lines([["", ""], ["---", "---"], *rows]), ""]


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]


def _one_line(value: Any) -> str:
    return " ".join(str("" if value is None else value).split())


def _dig(tree: Any, *keys: str) -> Any:
    """tree[key][key]..., None where there is no such thing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
