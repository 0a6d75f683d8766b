"""The whole method on one small model: train an expert live, load others, answer a mixed set in two passes."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from sva import config, evaluate, metrics, plots
from sva.adaptive import AdaptiveLM, build
from sva.evaluate import Item, Record
from sva.files import write_json
from sva.lm import LM, decompose, load, merge
from sva.runs import command, train_expert, versions
from sva.spectral.expert import Expert
from sva.stats import accuracy, paired_difference
from sva.tasks import task as make_task
from sva.tasks.labels import OTHER

MODEL = "smollm2-135m-instruct-q4_1"  # what the shipped experts were trained on, also where a hub answers
LIVE = "largest"  # trained here and now
LIVE_SETTINGS = (  # those of configs/smollm2-largest.yaml
    f"model={MODEL}",
    f"task={LIVE}",
    "rollout.max_new_tokens=8",
    "train.steps=14",
    "train.micro_batch=4",
    "train.remat=false",
)
PER_KIND = 80  # held-out prompts of each kind in the mixed set
BATCH = 32


def demo(directory: Path) -> dict[str, Any]:
    """Runs the demo, going on from whatever `directory` holds, and returns what its result.json says."""
    started = time.time()
    say("1/4  the model and its singular values")
    lm = load(MODEL)
    spectra = decompose(lm, "mlp")
    say(f"2/4  training the expert for {LIVE!r}: reward +1 for a right answer, -1 for a wrong one")
    settings = config.load(overrides=[*LIVE_SETTINGS, f"run_dir={directory / LIVE}"])
    live, trained = train_expert(settings, lm=lm)
    curve = metrics.read(directory / LIVE / "metrics.jsonl")
    plots.learning_curve(curve, f"SVF on {lm.name}: {LIVE}", directory / "learning_curve.png")
    experts = [live, *load_shipped(lm)]
    say(f"3/4  the base model and each of {len(experts)} experts, alone, on a mixed set they have not seen")
    kinds = [*(str(expert.metadata["task"]) for expert in experts), OTHER]
    todo = mixed(kinds)
    answers = {"base": evaluate.evaluate(lm, todo, batch_size=BATCH, title="base")}
    for name, expert in zip(kinds, experts, strict=False):
        adapted = merge(lm, spectra, expert.z(spectra))
        answers[f"{name} everywhere"] = evaluate.evaluate(adapted, todo, batch_size=BATCH, title=name)
    say("4/4  two passes: the model says what kind each prompt is, then answers with that expert")
    model = build(lm, experts)
    labels = [label.name for label in model.labels]
    probs, first_seconds = first_pass(model, todo)
    answers["two-pass"], total_seconds = two_passes(model, todo)
    own = {kind: f"{kind} everywhere" for kind in kinds[:-1]} | {OTHER: "base"}
    order = [kinds[i % len(kinds)] for i in range(len(todo))]
    answers["oracle dispatch"] = [answers[own[kind]][i] for i, kind in enumerate(order)]
    matrix = np.zeros((len(kinds), len(labels)), int)
    for kind, row in zip(order, probs, strict=True):
        matrix[kinds.index(kind), row.argmax()] += 1
    plots.confusion({"prompt dispatcher": matrix}, labels, directory / "dispatch.png")
    result = {
        "model": lm.name,
        "quantisation": lm.quantisation,
        "n": len(todo),
        "live": {name: trained[name] for name in ("task", "n", "before", "after", "gain")},
        **table(answers, order, kinds),
        "dispatch_accuracy": float(np.trace(matrix) / matrix.sum()),
        "confusion": matrix.tolist(),
        "first_pass_share": first_seconds / total_seconds,
        "seconds": round(time.time() - started, 1),
        "versions": versions(),
        "command": command(),
    }
    write_json(directory / "result.json", result)
    lines = (json.dumps({"system": name} | r._asdict()) for name, rows in answers.items() for r in rows)
    (directory / "answers.jsonl").write_text("\n".join(lines) + "\n")
    print(report(result, kinds, directory))
    return result


def load_shipped(lm: LM) -> list[Expert]:
    """The experts that come with the package, each trained by the configuration of its name in configs/."""
    files = sorted(Path(str(resources.files("sva"))).glob("assets/*.safetensors"))
    return [Expert.load(path, fingerprint=lm.fingerprint, base=lm.name) for path in files]


def mixed(kinds: Sequence[str]) -> list[Item]:
    """Held-out prompts, one of each kind in turn."""
    rows = [evaluate.items(make_task(kind), "test", PER_KIND) for kind in kinds]
    return [item for turn in zip(*rows, strict=True) for item in turn]


def first_pass(model: AdaptiveLM, todo: Sequence[Item]) -> tuple[np.ndarray, float]:
    """([n, C] label probabilities, seconds without compiling) of the first pass alone."""
    questions = [item.question for item in todo]
    model.choose(questions[:BATCH])
    started, found = time.perf_counter(), []
    for batch in evaluate.batches(todo, BATCH, "first pass alone"):
        found.append(model.choose([item.question for item in batch]))
    return np.concatenate(found), time.perf_counter() - started


def two_passes(model: AdaptiveLM, todo: Sequence[Item]) -> tuple[list[Record], float]:
    """(records, seconds without compiling) of both passes."""
    budget = max(item.task.max_new_tokens for item in todo)
    model.answer([item.question for item in todo[:BATCH]], budget)
    started, records = time.perf_counter(), []
    for batch in evaluate.batches(todo, BATCH, "two passes"):
        given = model.answer([item.question for item in batch], budget)
        records += evaluate.grade(batch, [a.text for a in given], [a.tokens for a in given])
    return records, time.perf_counter() - started


def table(answers: Mapping[str, Sequence[Record]], order: Sequence[str], kinds: Sequence[str]) -> dict[str, Any]:
    """Accuracies overall and by kind, and the paired differences that matter."""
    right = {name: np.array([record.correct for record in records]) for name, records in answers.items()}
    single = max((name for name in right if name.endswith("everywhere")), key=lambda name: right[name].mean())
    by_kind = {
        name: {kind: float(ok[[k == kind for k in order]].mean()) for kind in kinds} for name, ok in right.items()
    }
    return {
        "accuracy": {name: accuracy(ok)._asdict() for name, ok in right.items()},
        "by_kind": by_kind,
        "best_single": single,
        "two_pass_over_base": paired_difference(right["two-pass"], right["base"])._asdict(),
        "two_pass_over_best_single": paired_difference(right["two-pass"], right[single])._asdict(),
    }


def report(result: Mapping[str, Any], kinds: Sequence[str], directory: Path) -> str:
    """What happened, for a person who has read nothing."""

    def share(interval: Mapping[str, float]) -> str:
        return f"{100 * interval['mean']:5.1f} % [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"

    def points(interval: Mapping[str, float]) -> str:
        return f"{100 * interval['mean']:+.1f} points [{100 * interval['low']:+.1f}, {100 * interval['high']:+.1f}]"

    live = result["live"]
    lines = [
        "",
        f"An expert is {result['model']}'s own weights with their singular values rescaled: one vector a matrix.",
        f"Trained here: {live['task']}, greedy on {live['n']} prompts never seen: {share(live['before'])} before, "
        f"{share(live['after'])} after.",
        "",
        f"Mixed set of {result['n']} held-out prompts ({', '.join(kinds)}); accuracy with 95 % interval:",
        f"  {'':24}{'all':>24}   " + "".join(f"{kind:>12}" for kind in kinds),
    ]
    for name, interval in result["accuracy"].items():
        cells = "".join(f"{100 * result['by_kind'][name][kind]:12.0f}" for kind in kinds)
        lines.append(f"  {name:24}{share(interval):>24}   {cells}")
    lines += [
        "",
        f"Two passes against the base model:   {points(result['two_pass_over_base'])}",
        f"Two passes against {result['best_single']}: {points(result['two_pass_over_best_single'])}",
        f"First pass: {100 * result['dispatch_accuracy']:.0f} % of prompts sent to the right expert, "
        f"{100 * result['first_pass_share']:.0f} % of the time of both.",
        "(oracle dispatch: every prompt answered by its own kind's expert, 'other' by the base)",
        f"Pictures and records: {directory}",
    ]
    return "\n".join(lines)


def say(text: str) -> None:
    """A heading between the progress bars."""
    print(f"\n== {text}", file=sys.stderr)
