"""`sva evaluate`: accuracy of a model, an expert or two passes on a task, with a record of every example."""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sva.errors import UserError, at_least

_TEXT = "Accuracy on a task's held-out rows, with an interval and a record of every example."


def add(commands: Any, model: Mapping[str, Any]) -> None:
    """Adds the command; `model` is what every --model option shares."""
    parser = commands.add_parser(
        "evaluate",
        help=_TEXT,
        description=f"{_TEXT} Stopped at any moment, the same command goes on. Several experts answer in two passes.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("task", nargs="?", help="a task's name, or the path of a .jsonl or .py file")
    parser.add_argument("--model", **model)
    parser.add_argument("--expert", type=Path, action="append", default=[], help="an expert file; may be repeated")
    parser.add_argument("--classifier", type=Path, help="a classification expert for the first pass")
    parser.add_argument("--alphas", type=Path, help="one mixture of the experts, from sva adapt")
    parser.add_argument("--split", default="test", help="train, validation or test (default: %(default)s)")
    parser.add_argument("--size", type=int, default=200, help="rows at most (default: %(default)s)")
    parser.add_argument("--grader", default="strict", help="strict, or reference: the public code's verdicts")
    parser.add_argument("--splits", default="clean", help="clean, or reference: the public code's splits")
    parser.add_argument("--prompt", default="own", help="own, or reference: the public code's prompts and budgets")
    parser.add_argument("--shots", type=int, default=0, help="worked examples in the prompt (default: %(default)s)")
    parser.add_argument("--sandbox", default="strict", help="strict, or best-effort: what this machine's kernel offers")
    parser.add_argument("--by", choices=["generation", "likelihood"], default="generation", help="how it chooses")
    parser.add_argument("--max-new-tokens", type=int, help="of each answer (default: the task's)")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts at once (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file of records (default: in runs/evaluate, named by the settings)")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two files of records, instead")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    if (arguments.task is None) == (arguments.compare is None):
        raise UserError("name one task to evaluate, or two files of records with --compare A B")
    result = compared(*arguments.compare) if arguments.compare else evaluated(arguments)
    print(json.dumps(result, indent=2) if arguments.json else as_text(result))


def evaluated(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command prints of one evaluation, and its records on disk."""
    from sva import evaluate, records
    from sva.alphas import Alphas
    from sva.lm import load
    from sva.runs import command, versions
    from sva.spectral.expert import Expert
    from sva.tasks import task as make_task

    at_least("--size", arguments.size, 1)
    at_least("--batch-size", arguments.batch_size, 1)
    if arguments.max_new_tokens is not None:
        at_least("--max-new-tokens", arguments.max_new_tokens, 1)
    if arguments.classifier and not arguments.expert:
        raise UserError("--classifier chooses between experts; name them with --expert")
    if arguments.alphas and (arguments.classifier or not arguments.expert):
        raise UserError("--alphas is one mixture for all questions: name its experts with --expert, and no classifier")
    two_passes = (len(arguments.expert) > 1 and not arguments.alphas) or arguments.classifier is not None
    if two_passes and (arguments.by == "likelihood" or arguments.shots or arguments.prompt != "own"):
        raise UserError("two passes ask the question alone; leave out --by, --shots and --prompt, or the other experts")
    task = make_task(
        arguments.task,
        arguments.grader,
        splits=arguments.splits,
        prompt=arguments.prompt,
        shots=arguments.shots,
        sandbox=arguments.sandbox,
    )
    todo = evaluate.items(task, arguments.split, arguments.size)
    if arguments.by == "likelihood":
        task.options(todo[0].example)
    lm = load(arguments.model)
    paths = [*arguments.expert, *([arguments.classifier] if arguments.classifier else [])]
    experts = [Expert.load(path, fingerprint=lm.fingerprint, base=lm.name) for path in paths]
    for expert in experts:
        _check_apart(expert, task, arguments.split)
    asked = hashlib.sha256("\0".join(json.dumps(item.task.turns(item.example)) for item in todo).encode())
    settings = {
        "task": arguments.task,
        **{name: getattr(arguments, name) for name in ("split", "grader", "splits", "prompt", "shots", "by")},
        "n": len(todo),
        "questions": asked.hexdigest()[:16],
        "model": lm.name,
        "fingerprint": lm.fingerprint,
        "quantisation": lm.quantisation,
        "experts": [expert.digest for expert in experts],
        "classifier": bool(arguments.classifier),
        **({"alphas": Alphas.load(arguments.alphas).values} if arguments.alphas else {}),
        "max_new_tokens": arguments.max_new_tokens or task.max_new_tokens,
        "batch_size": arguments.batch_size,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    out = arguments.out or Path("runs/evaluate") / f"{task.name.replace('/', '_')}-{digest}.jsonl"
    with records.opened(out, settings, {"command": command(), "versions": versions()}) as file:
        answer = _answer(lm, experts, arguments, settings["max_new_tokens"])
        rows = evaluate.recorded(file, todo, answer, arguments.batch_size, f"evaluate {task.name}")
    return settings | scores(rows) | {"records": str(out)}


def _answer(lm: Any, experts: Sequence[Any], arguments: argparse.Namespace, max_new_tokens: int) -> Any:
    """What answers a batch: the model, merged with its one expert, or the two passes over several."""
    from sva import evaluate
    from sva.adaptive import build
    from sva.alphas import adapted
    from sva.lm import merge, spectra_of

    if arguments.alphas:
        lm = adapted(lm, arguments.alphas, experts)
    elif len(experts) > 1:
        classifier = experts[-1] if arguments.classifier else None
        return evaluate.by_two_passes(
            build(lm, experts[: len(arguments.expert)], classifier=classifier), max_new_tokens
        )
    elif experts:
        spectra = spectra_of(lm, experts[0].names)
        lm = merge(lm, spectra, experts[0].middles(spectra))
    return evaluate.by_likelihood(lm) if arguments.by == "likelihood" else evaluate.by_generation(lm, max_new_tokens)


def _check_apart(expert: Any, task: Any, split: str) -> None:
    """Raises UserError where the expert was trained on rows that are to be reported; only under clean splits."""
    from sva.tasks import names
    from sva.tasks import task as make_task
    from sva.tasks.splits import require_apart

    trained = (expert.metadata.get("config") or {}).get("task", expert.metadata.get("task"))
    if trained in names() and trained != "routing":
        require_apart(make_task(trained), task, split)


def scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy with Wilson's 95 % interval and how often each reason came, of an evaluation's rows."""
    import numpy as np

    from sva.evaluate import likeliest
    from sva.stats import accuracy

    right = np.array([row["correct"] for row in rows])
    result = {"accuracy": accuracy(right)._asdict(), "reasons": dict(Counter(row["reason"] for row in rows))}
    if rows and rows[0]["scores"]:
        # of the option that is likeliest as a whole; the one above is the likeliest per character
        whole = np.array([likeliest(row["scores"]) == row["right_option"] for row in rows])
        result["accuracy_unnormalised"] = accuracy(whole)._asdict()
    return result


def compared(a: Path, b: Path) -> dict[str, Any]:
    """Accuracies of two evaluations of the same questions, and their difference with a paired bootstrap's interval.

    Raises:
      UserError: a file is none of an evaluation, or the two have no or not the same questions.
    """
    import numpy as np

    from sva.records import read
    from sva.stats import accuracy, paired_difference

    (settings_a, rows_a), (settings_b, rows_b) = read(a), read(b)
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


def as_text(result: Mapping[str, Any]) -> str:
    """A result in a few lines."""
    from sva.cli import percent

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
        + f"\n{reasons}\nrecords: {result['records']}"
    )
