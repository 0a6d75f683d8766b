"""`sva adapt`: which mixture of experts suits a task, found on a few of its solved examples."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sva.cli.command_line import Command, argument, option
from sva.cli.options import (
    ExpertOptions,
    LoadingOptions,
    check_experts,
    is_writer,
    loading,
    precision,
    print_result,
    start_jax,
)
from sva.utils.errors import UserError, at_least, differing

# Transformer-Squared (arXiv 2501.06252), table 10: shots and generations of 32 members. The last asks 3 % of the
# questions that the first does.
BUDGETS = {"full": (10, 50), "3-shot": (3, 50), "light": (3, 5)}

_LEAST = 10  # members of a population of which a fifth are two

# Arguments that make a search what it is.
_SEARCH = (
    "task",
    "split",
    "method",
    "objective",
    "population",
    "per_matrix",
    "reference",
    "temperature",
    "race",
    "rows",
    "seed",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapt(ExpertOptions, LoadingOptions):
    """Find the mixture of experts that suits a task, on a few of its solved examples.

    Stopped at any moment, the same command resumes; sva generate and sva evaluate take the file that it writes.
    """

    grader: str = option("strict, or reference: the public code's verdicts", "strict")
    splits: str = option("clean, or reference: the public code's splits and its choice of shots", "clean")
    prompt: str = option("own, or reference: the public code's prompts and budgets", "own")
    task: str = argument("a task's name, or the path of a .jsonl or .py file")
    split: str = option("where the shots are drawn from (default: %(default)s)", "train")
    budget: Literal["full", "3-shot", "light"] = option("the paper's table 10: shots, iterations", "full")
    shots: int | None = option("solved examples to search on (default: the budget's)", None)
    iterations: int | None = option("generations of the search (default: the budget's)", None)
    method: Literal["cem", "gradient", "vote"] = option(
        "cem: search by accuracy; gradient: climb --objective; vote: search without labels (default: %(default)s)",
        "cem",
    )
    objective: Literal["likelihood", "accuracy"] | None = option(
        "of gradient: the likelihood of the answers, or by policy gradient (default: likelihood)", None
    )
    population: int = option("mixtures a generation (default: %(default)s)", 32)
    per_matrix: bool = option("a mixture of its own for every matrix", False)
    reference: bool = option("the public code's mixture, elites and clamp", False)
    temperature: float = option("of the answers; 0 is greedy (the default)", 0.0)
    max_new_tokens: int | None = option("of each answer (default: the task's)", None)
    race: int | None = option("every N shots, drop members that cannot be elite any more", None, metavar="N")
    rows: int = option("rows decoded at once (default: %(default)s)", 320)
    seed: int = option("of the shots and the search (default: %(default)s)", 0)
    out: Path | None = option("the alphas file (default: in runs/adapt, named by the settings)", None)
    json: bool = option("print the file as JSON", False)


def run(arguments: Adapt) -> None:
    """Runs the command."""
    shots, generations = _budget(arguments)
    arguments = dataclasses.replace(arguments, objective=arguments.objective or "likelihood")
    start_jax()
    from sva.parallel.exchange import from_process_0
    from sva.utils.files import locked_file, read_json

    with loading(arguments, "--rows", arguments.rows) as how, contextlib.ExitStack() as stack:
        search = _search(arguments, shots, how)
        from_process_0(lambda: stack.enter_context(locked_file(search.out)))
        _climb(search, arguments, generations)
    if is_writer():
        result = read_json(search.out)
        print_result(result, arguments.json, as_text(search.out, result))


def _budget(arguments: Adapt) -> tuple[int, int]:
    """(shots, generations), once the arguments make sense together.

    Raises:
      UserError: settings that no model is needed to find fault with.
    """
    from sva.utils import seeds

    shots, generations = BUDGETS[arguments.budget]
    shots = shots if arguments.shots is None else arguments.shots
    generations = generations if arguments.iterations is None else arguments.iterations
    at_least("--shots", shots, 1)
    at_least("--iterations", generations, 1)
    if arguments.race is not None:
        at_least("--race", arguments.race, 1)
    if not arguments.expert:
        raise UserError("there is nothing to mix: name experts with --expert")
    if arguments.method != "gradient" and arguments.objective is not None:
        raise UserError(f"--objective is for --method gradient; leave it out of --method {arguments.method}")
    if arguments.method == "gradient" and arguments.reference:
        raise UserError("--reference is the public code's search; leave it out, or --method gradient")
    if arguments.method == "gradient" and arguments.kv_dtype == "int8":
        raise UserError("--method gradient finds none through int8 keys and values; use --kv-dtype bfloat16")
    if arguments.method != "gradient" and not arguments.reference and arguments.population < _LEAST:
        raise UserError(
            f"--population {arguments.population} has no two elites, a fifth of it, which a search needs; "
            f"use {_LEAST} or more"
        )
    seeds.check("--seed", arguments.seed)
    return shots, generations


class _Search(NamedTuple):
    """A search: the model with its experts, the shots, the method's settings, and its file."""

    lm: Any
    members: Any  # few_shot.Pool
    experts: Any  # label and digest of each
    chosen: Any  # few_shot.Shots
    method: Any  # CEM or GradientConfig
    cfg: Any  # FewShotConfig
    settings: Mapping[str, Any]  # what makes the search what it is
    out: Path


def _search(arguments: Adapt, shots: int, how: Mapping[str, Any]) -> _Search:
    """The search that the arguments describe, its model loaded."""
    from sva.adaptation import few_shot, few_shot_gradient, mixture_file
    from sva.adaptation.experts import load_experts
    from sva.generation.load import load
    from sva.parallel.exchange import require_same
    from sva.tasks import task as make_task
    from sva.training.search import CEM

    method = (
        few_shot_gradient.GradientConfig(arguments.objective or "likelihood")
        if arguments.method == "gradient"
        else CEM(population=arguments.population, low=0.0, high=1.0, reference=arguments.reference)
    )
    cfg = few_shot.FewShotConfig(arguments.max_new_tokens, arguments.temperature, arguments.rows, block=arguments.race)
    task = make_task(arguments.task, arguments.grader, splits=arguments.splits, prompt=arguments.prompt)
    chosen = few_shot.draw(task, arguments.split, shots, arguments.seed)
    check_experts(arguments)
    lm = load(arguments.model, **how)
    experts, _ = load_experts(lm, arguments.expert, skip_foreign=arguments.skip_foreign)
    told = mixture_file.identities(experts)
    settings = {
        **{name: getattr(arguments, name) for name in _SEARCH},
        **{name: value for name, value in _way(arguments).items() if value not in ("strict", "clean", "own")},
        "shots": shots,
        "questions": _digest([task.question(example) for example in chosen.examples], 16),
        "max_new_tokens": cfg.max_new_tokens or task.max_new_tokens,
        "fingerprint": lm.fingerprint,
        "experts": [expert["digest"] for expert in told],
    }
    settings |= precision(arguments)
    require_same(settings)
    out = arguments.out or Path("runs/adapt") / f"{task.name.replace('/', '_')}-{_digest(settings, 8)}.json"
    members = few_shot.pool(lm, experts, reference=arguments.reference, progress=is_writer())
    return _Search(lm, members, told, chosen, method, cfg, settings, out)


def _way(arguments: Adapt) -> dict[str, str]:
    """How the task is asked and graded."""
    return {name: getattr(arguments, name) for name in ("grader", "splits", "prompt")}


def _climb(search: _Search, arguments: Adapt, generations: int) -> None:
    """Takes the search to so many generations, from where its file stopped, and writes the file after each."""
    import jax
    import numpy as np

    from sva.adaptation import few_shot
    from sva.adaptation.mixture_file import Alphas
    from sva.parallel.processes import to_host
    from sva.utils.progress import progress_bar
    from sva.utils.provenance import command, versions

    lm, members = search.lm, search.members
    identity = search.experts, {"name": lm.name, "fingerprint": lm.fingerprint}, arguments.reference
    made_with = {"command": command(), "versions": versions()}
    history, steps = _steps(search, arguments, generations)
    title = f"adapt {search.chosen.task.name}"
    with progress_bar(title, generations, "generation", initial=len(history), hidden=not is_writer()) as bar:
        for step in steps:
            history.append(dict(step.row))
            bar.set_postfix_str(_told(step.row), refresh=False)
            bar.update()
            values = step.alphas if arguments.reference or few_shot.is_found(history) else np.zeros_like(step.alphas)
            named = dict(zip(members.names, values, strict=True)) if values.ndim == 2 else values
            saved = [leaf.tolist() for leaf in jax.tree.leaves(to_host(step.state))]
            record = {"settings": search.settings, "history": history, "state": saved, **made_with}
            if is_writer():
                Alphas(named, *identity, record).save(search.out)


def _steps(search: _Search, arguments: Adapt, generations: int) -> tuple[list[dict[str, Any]], Iterator[Any]]:
    """(rows of the generations that are done, the steps that are left)."""
    import jax

    from sva.adaptation import few_shot, few_shot_gradient
    from sva.utils import seeds

    lm, members, chosen, method, cfg = search.lm, search.members, search.chosen, search.method, search.cfg
    is_ascent = arguments.method == "gradient"
    begin, key = members.start(per_matrix=arguments.per_matrix), seeds.key(arguments.seed)
    start = few_shot_gradient.init(begin, method) if is_ascent else method.init(begin)
    history, state = _earlier(search.out, search.settings, start)
    if arguments.method == "vote":
        chosen = few_shot.vote(lm, members, chosen, cfg, jax.random.fold_in(key, 0))
    adapt = few_shot_gradient.adapt if is_ascent else few_shot.adapt
    parts: dict[str, Any] = {"state": state, "generations": range(len(history) + 1, generations + 1)}
    return history, iter(adapt(lm, members, chosen, method, cfg, key, **parts))


def _digest(value: Any, length: int) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def _earlier(out: Path, settings: Mapping[str, Any], start: Any) -> tuple[list[dict[str, Any]], Any]:
    """(history, state) of the search that an earlier run left at `out`; without one an empty history and the start.

    Raises:
      UserError: `out` is another kind of file, or was written with other settings (named).
    """
    import jax
    import jax.numpy as jnp

    from sva.adaptation.mixture_file import Alphas
    from sva.parallel.exchange import from_process_0

    theirs = from_process_0(lambda: dict(Alphas.load(out).record) if out.exists() else None)
    if theirs is None:
        return [], start
    if others := differing(theirs.get("settings", {}), settings):
        raise UserError(f"{out} holds another search ({others}); choose another --out or delete it")
    leaves, form = jax.tree.flatten(start)
    saved = [jnp.asarray(value, leaf.dtype) for value, leaf in zip(theirs["state"], leaves, strict=True)]
    return theirs["history"], jax.tree.unflatten(form, saved)


def as_text(path: Path, result: Mapping[str, Any]) -> str:
    """A result in a few lines."""
    from sva.adaptation.few_shot import is_found

    history, settings = result["history"], result["settings"]
    lines = [f"{settings['task']}, {settings['shots']} shots, {len(history)} generations: {_told(history[-1])}"]
    if not is_found(history):
        kept = (
            "the search continued by the public code's rules" if settings["reference"] else "the alphas are 0, the base"
        )
        lines.append(f"no member answered any shot right: {kept}; try other shots, other experts or --method gradient")
    rows = result["alphas"]
    means = [sum(column) / len(rows) for column in zip(*rows.values(), strict=True)] if isinstance(rows, dict) else rows
    labels = [expert["label"] or expert["digest"][:8] for expert in result["experts"]]
    about = "mean alpha of the matrices" if isinstance(rows, dict) else "alpha"
    lines.append(f"{about}: " + ", ".join(f"{label} {alpha:.2f}" for label, alpha in zip(labels, means, strict=True)))
    return "\n".join([*lines, f"alphas: {path}"])


def _told(row: Mapping[str, float]) -> str:
    """A generation in a few words."""
    if "nats" in row:
        return f"{row['nats']:.3f} nats a token of the answers"
    return f"best {row['best']:.0%}, mean {row['mean']:.0%}"


COMMAND = Command("adapt", Adapt, run)
