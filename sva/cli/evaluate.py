"""`sva evaluate`: accuracy of a model, an expert or two passes on a task, with a record of every example."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sva.cli.command_line import Command, argument, option
from sva.cli.options import (
    FirstPassOptions,
    LoadingOptions,
    check_experts,
    is_writer,
    loading,
    precision,
    print_result,
    start_jax,
)
from sva.utils.errors import UserError, at_least
from sva.utils.jsonl import read_records


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(FirstPassOptions, LoadingOptions):
    """Accuracy on a task's held-out rows, with an interval and a record of every example.

    Stopped at any moment, the same command resumes. Several experts answer in two passes.
    """

    task: tuple[str, ...] = argument("a task's name, or the path of a .jsonl or .py file; several are mixed", ())
    dispatch: str | None = option(
        "who chooses: prompt, generated, classifier, embedding, random, oracle, uniform or fixed:LABEL (default: "
        "classifier if there is one, or prompt)",
        None,
    )
    seed: int = option("of random dispatch (default: %(default)s)", 0)
    split: str = option("train, validation or test (default: %(default)s)", "test")
    size: int = option("rows of each task at most (default: %(default)s)", 200)
    grader: str = option("strict, or reference: the public code's verdicts", "strict")
    splits: str = option("clean, or reference: the public code's splits", "clean")
    prompt: str = option("own, or reference: the public code's prompts and budgets", "own")
    shots: int = option("worked examples in the prompt (default: %(default)s)", 0)
    sandbox: str = option("strict, or best-effort: what this machine's kernel offers", "strict")
    by: Literal["generation", "likelihood"] = option("how it chooses", "generation")
    max_new_tokens: int | None = option("of each answer (default: the task's)", None)
    batch_size: int = option("prompts at once (default: %(default)s)", 32)
    out: Path | None = option("file of records (default: in runs/evaluate, named by the settings)", None)
    compare: tuple[Path, Path] | None = option("two files of records, instead", None, metavar=("A", "B"))
    json: bool = option("print the result as JSON", False)


def run(arguments: Evaluate) -> None:
    """Runs the command."""
    if bool(arguments.task) == bool(arguments.compare):
        raise UserError("name a task to evaluate, or two files of records with --compare A B")
    if arguments.compare:
        result = compared(*arguments.compare)
    elif (result := _evaluated(arguments)) is None:
        return
    print_result(result, arguments.json, as_text(result))


def _evaluated(arguments: Evaluate) -> dict[str, Any] | None:
    """The result of one evaluation; its records are written to disk. None on processes that do not write."""
    two_passes = _check(arguments)
    tasks = _tasks(arguments)
    start_jax()
    from sva.adaptation import dispatch_report
    from sva.evaluation import evaluate
    from sva.parallel.records import resumed
    from sva.utils.provenance import command, versions

    _check_first_pass(arguments)
    todo = evaluate.mixed(tasks, arguments.split, arguments.size)
    with loading(arguments, "--batch-size", arguments.batch_size) as how:
        subject = _subject(arguments, tasks, how)
        settings = _settings(arguments, tasks, todo, subject, two_passes)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        stem = "+".join(task.name.replace("/", "_") for task in tasks)
        out = arguments.out or Path("runs/evaluate") / f"{stem}-{digest}.jsonl"
        with resumed(out, settings, {"command": command(), "versions": versions()}) as file:
            answer, size = _answer(subject, arguments.alphas, settings)
            rows = evaluate.recorded(file, todo, answer, size, f"evaluate {stem}", progress=is_writer())
    if not is_writer():
        return None
    result = settings | scores(rows) | {"records": str(out)}
    if two_passes:
        result["first_pass"] = dispatch_report.scores(rows)
    return result


def _check(arguments: Evaluate) -> bool:
    """Whether it will be two passes.

    Raises:
      UserError: settings that neither a model nor JAX is needed to find fault with.
    """
    from sva.utils import seeds

    seeds.check("--seed", arguments.seed)
    at_least("--size", arguments.size, 1)
    at_least("--batch-size", arguments.batch_size, 1)
    if arguments.max_new_tokens is not None:
        at_least("--max-new-tokens", arguments.max_new_tokens, 1)
    if (arguments.classifier or arguments.dispatch) and not arguments.expert:
        name = "--classifier" if arguments.classifier else "--dispatch"
        raise UserError(f"{name} chooses between experts; name them with --expert")
    if arguments.alphas and (arguments.classifier or arguments.dispatch or not arguments.expert):
        raise UserError("--alphas is one mixture for all questions: name its experts with --expert, and no first pass")
    two_passes = bool(arguments.classifier or arguments.dispatch) or (
        len(arguments.expert) > 1 and not arguments.alphas
    )
    if not two_passes and arguments.choice != "hard":
        raise UserError("--choice is between experts; name two or more with --expert, or a --dispatch")
    if two_passes and (arguments.by == "likelihood" or arguments.shots or arguments.prompt != "own"):
        raise UserError("two passes ask the question alone; leave out --by, --shots and --prompt, or the other experts")
    return two_passes


def _check_first_pass(arguments: Evaluate) -> None:
    """Raises UserError for a --choice or --dispatch that is not known."""
    from sva.adaptation.adaptive_lm import check_dispatcher
    from sva.adaptation.label_scoring import choice

    choice(arguments.choice)
    if arguments.dispatch:
        check_dispatcher(arguments.dispatch)


def _tasks(arguments: Evaluate) -> list[Any]:
    """The tasks of the command; their rows are there, and have options where the likelihood of options is asked for."""
    from sva.tasks import task as make_task

    how = {name: getattr(arguments, name) for name in ("splits", "prompt", "shots", "sandbox")}
    tasks = [make_task(name, arguments.grader, **how) for name in arguments.task]
    for task in tasks:
        source = task.source(arguments.split)
        if arguments.by == "likelihood":
            task.options(source[0])
    return tasks


class _Subject(NamedTuple):
    """A model under evaluation, the experts for it and the classification expert."""

    lm: Any
    experts: Sequence[Any]
    classifier: Any


def _subject(arguments: Evaluate, tasks: Sequence[Any], how: Mapping[str, Any]) -> _Subject:
    """The loaded model and its experts, none of which was trained on rows that are to be reported."""
    from sva.adaptation.experts import load_experts
    from sva.generation.load import load

    check_experts(arguments)
    lm = load(arguments.model, **how)
    experts, classifier = load_experts(lm, arguments.expert, arguments.classifier, skip_foreign=arguments.skip_foreign)
    for expert in [*experts, *([classifier] if classifier else [])]:
        for task in tasks:
            _check_apart(expert, task, arguments.split)
    return _Subject(lm, experts, classifier)


def _settings(
    arguments: Evaluate, tasks: Sequence[Any], todo: Sequence[Any], subject: _Subject, two_passes: bool
) -> dict[str, Any]:
    """The settings that the records depend on: the first line of their file, whose name holds their digest."""
    from sva.adaptation.mixture_file import Alphas

    lm, experts, classifier = subject
    asked = hashlib.sha256("\0".join(json.dumps(item.task.turns(item.example)) for item in todo).encode())
    settings = {
        "task": "+".join(arguments.task),
        **{name: getattr(arguments, name) for name in ("split", "grader", "splits", "prompt", "shots", "by")},
        "n": len(todo),
        "questions": asked.hexdigest()[:16],
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "quantisation": lm.quantisation,
        "experts": [expert.digest for expert in experts],
        "classifier": classifier and classifier.digest,
        "max_new_tokens": arguments.max_new_tokens or max(task.max_new_tokens for task in tasks),
        "batch_size": arguments.batch_size,
    }
    settings |= precision(arguments)
    if arguments.alphas:
        settings["alphas"] = Alphas.load(arguments.alphas).values
    if two_passes:
        settings["dispatch"] = arguments.dispatch or ("classifier" if classifier else "prompt")
        choice = "soft" if settings["dispatch"] == "uniform" else arguments.choice  # an average is of all of them
        settings |= {"choice": choice, "seed": arguments.seed}
    return settings


def _answer(subject: _Subject, alphas: Path | None, settings: Mapping[str, Any]) -> tuple[Any, int]:
    """(function that answers a batch, its size): the model, one expert or mixture merged into it, or two passes."""
    from sva.adaptation.adaptive_lm import adaptive
    from sva.adaptation.by_two_passes import by_two_passes, router_examples
    from sva.adaptation.label_scoring import choice
    from sva.adaptation.mixture_file import load_mixture
    from sva.evaluation import evaluate
    from sva.generation.frozen import merge_expert

    lm, experts, classifier = subject
    budget, rows = settings["max_new_tokens"], settings["batch_size"]
    if "dispatch" in settings:
        how = {"choice": choice(settings["choice"]), "progress": is_writer()}
        model = adaptive(lm, experts, classifier=classifier, **how)
        examples = router_examples(experts) if settings["dispatch"] == "embedding" else ()
        model = model.by(settings["dispatch"], examples=examples, seed=settings["seed"])
        return by_two_passes(model, budget), rows
    if alphas:
        lm = load_mixture(lm, alphas, experts, progress=is_writer())
    elif experts:
        lm = merge_expert(lm, experts[0], progress=is_writer())
    if settings["by"] == "likelihood":
        return evaluate.choosing(lm, rows)
    return evaluate.greedy(lm, budget, rows, progress=is_writer())


def _check_apart(expert: Any, task: Any, split: str) -> None:
    """Raises UserError where the expert was trained on rows that are to be reported; only under clean splits."""
    from sva.adaptation.by_two_passes import trained_on
    from sva.tasks import names
    from sva.tasks import task as make_task
    from sva.tasks.splits import require_apart

    trained, settings = trained_on(expert), expert.metadata.get("config") or {}
    if trained in names() and trained != "routing":
        require_apart(make_task(trained, splits=settings.get("splits", "clean")), task, split)


def scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy with Wilson's 95 % interval and how often each reason came, of an evaluation's rows."""
    import numpy as np

    from sva.evaluation.evaluate import likeliest
    from sva.evaluation.stats import accuracy

    right = np.array([row["correct"] for row in rows])
    result = {"accuracy": accuracy(right)._asdict(), "reasons": dict(Counter(row["reason"] for row in rows))}
    if rows and rows[0]["scores"]:
        # of the option that is likeliest as a whole; the one above is the likeliest per character
        whole = np.array([likeliest(row["scores"]) == row["right_option"] for row in rows])
        result["accuracy_unnormalised"] = accuracy(whole)._asdict()
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if len(tasks) > 1:
        of = np.array([tasks.index(row["task"]) for row in rows])
        result["by_task"] = {name: accuracy(right[of == place])._asdict() for place, name in enumerate(tasks)}
    return result


def compared(a: Path, b: Path) -> dict[str, Any]:
    """Accuracies of two evaluations of the same questions, and their difference with a paired bootstrap's interval.

    Raises:
      UserError: a file is not of an evaluation, or the two have no or not the same questions.
    """
    import numpy as np

    from sva.evaluation.stats import accuracy, paired_difference

    (settings_a, rows_a), (settings_b, rows_b) = _rows(a), _rows(b)
    both = sorted(rows_a.keys() & rows_b.keys())
    other = [i for i in both if rows_a[i]["question"] != rows_b[i]["question"]]
    if not both or other:
        place = f"question {other[0]} is another" if other else "they have no example in common"
        raise UserError(f"{a} and {b} cannot be compared: {place}; evaluate the same task, split and --prompt")
    right = [np.array([rows[i]["correct"] for i in both]) for rows in (rows_a, rows_b)]
    return {
        "task": settings_a["task"],
        "n": len(both),
        "a": {"records": str(a), "settings": settings_a, "accuracy": accuracy(right[0])._asdict()},
        "b": {"records": str(b), "settings": settings_b, "accuracy": accuracy(right[1])._asdict()},
        "b_minus_a": paired_difference(right[1], right[0])._asdict(),
    }


def _rows(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """(settings, {index: row}) of an evaluation's file."""
    settings, records = read_records(path)
    if "task" not in settings or not all("index" in record for record in records):
        raise UserError(f"{path} is not the records of an evaluation; sva evaluate TASK --out {path} makes them")
    return settings, {record["index"]: record for record in records}


def as_text(result: Mapping[str, Any]) -> str:
    """A result in a few lines."""
    from sva.adaptation import dispatch_report
    from sva.evaluation.stats import percent

    if "b_minus_a" in result:
        a, b, gain = result["a"], result["b"], result["b_minus_a"]
        return (
            f"{result['task']}, n = {result['n']}\n"
            f"A {percent(a['accuracy'])}  {a['records']}\nB {percent(b['accuracy'])}  {b['records']}\n"
            f"B - A {100 * gain['mean']:+.1f} [{100 * gain['low']:+.1f}, {100 * gain['high']:+.1f}] points"
        )
    reasons = ", ".join(f"{count} {name}" for name, count in sorted(result["reasons"].items()))
    whole = result.get("accuracy_unnormalised")
    return (
        f"{result['task']}: {percent(result['accuracy'])}, n = {result['n']}"
        f", weights {result['quantisation'] or 'as stored'}"
        + (f"; not normalised by length {percent(whole)}" if whole else "")
        + "".join(f"\n  {name} {percent(each)}" for name, each in result.get("by_task", {}).items())
        + (f"\n{dispatch_report.as_text(result['first_pass'])}" if "first_pass" in result else "")
        + f"\n{reasons}\nrecords: {result['records']}"
    )


COMMAND = Command("evaluate", Evaluate, run)
