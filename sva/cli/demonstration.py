"""The whole method on one small model: train an expert live, load others, answer a mixed set in two passes."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from sva.adaptation import dispatch_report
from sva.adaptation.adaptive_lm import AdaptiveLM, adaptive
from sva.adaptation.by_two_passes import by_two_passes
from sva.evaluation import evaluate
from sva.evaluation.evaluate import Item, Record
from sva.evaluation.stats import accuracy, paired_difference
from sva.generation.decompose import decompose, spectra_of
from sva.generation.lm import LM
from sva.generation.load import load
from sva.generation.merge import merge
from sva.spectral.expert import Expert
from sva.tasks import task as make_task
from sva.tasks.labels import OTHER
from sva.training import config, metrics
from sva.training.run import train
from sva.utils import plots
from sva.utils.files import write_json
from sva.utils.provenance import command, versions

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
    decompose(lm, "mlp")
    say(f"2/4  training the expert for {LIVE!r}: reward +1 for a right answer, -1 for a wrong one")
    live, trained = train_live(lm, directory)
    curve = metrics.read(directory / LIVE / "metrics.jsonl")
    plots.learning_curve(curve, f"SVF on {lm.name}: {LIVE}", directory / "learning_curve.png")
    shipped, classifier = load_shipped(lm)
    experts = {str(expert.metadata["task"]): expert for expert in (live, *shipped)}
    say(f"3/4  the base model and each of {len(experts)} experts, alone, on a mixed set they have not seen")
    todo, kinds = mixed([*experts, OTHER])
    answers = {"base": alone(lm, todo, "base", directory)}
    for name, expert in experts.items():
        answers[f"{name} everywhere"] = alone(lm, todo, name, directory, expert)
    say("4/4  two passes: the model says what kind each prompt is, then answers with that expert")
    model = adaptive(lm, list(experts.values()), classifier=classifier)
    labels = [label.name for label in model.labels]
    dispatchers, costs = {}, {}
    for name, by, system in (
        ("classification expert", "classifier", "two-pass"),
        ("prompt (zero-shot)", "prompt", "two-pass, zero-shot"),
    ):
        answers[system] = two_passes(model.by(by), todo, name)
        right, chosen = zip(*[(record.right_label, record.label) for record in answers[system]], strict=True)
        dispatchers[name] = dispatch_report.confusion(right, chosen, labels)
        costs[name] = dispatch_report.costs([record._asdict() for record in answers[system]])
    own = {kind: f"{kind} everywhere" for kind in experts} | {OTHER: "base"}
    answers["oracle dispatch"] = [answers[own[kind]][i] for i, kind in enumerate(kinds)]
    plots.confusion(dispatchers, labels, directory / "dispatch.png")
    result = {
        "model": lm.name,
        "quantisation": lm.quantisation,
        "n": len(todo),
        "live": {name: trained[name] for name in ("task", "n", "before", "after", "gain")},
        **table(answers, kinds),
        "labels": labels,
        "dispatch": {
            name: {"accuracy": float(np.trace(matrix) / matrix.sum()), "confusion": matrix.tolist()}
            for name, matrix in dispatchers.items()
        },
        "cost": costs,
        "seconds": round(time.time() - started, 1),
        "versions": versions(),
        "command": command(),
    }
    write_json(directory / "result.json", result)
    lines = (json.dumps({"system": name} | r._asdict()) for name, rows in answers.items() for r in rows)
    (directory / "answers.jsonl").write_text("\n".join(lines) + "\n")
    print(report(result, directory))
    return result


def train_live(lm: LM, directory: Path) -> tuple[Expert, dict[str, Any]]:
    """(the expert, its run's result) of `LIVE`, trained in `directory` or found there."""
    return train(config.load(overrides=[*LIVE_SETTINGS, f"run_dir={directory / LIVE}"]), lm=lm)


def asset_files() -> list[Path]:
    """The expert files in the package."""
    return sorted(Path(str(resources.files("sva"))).glob("assets/*.safetensors"))


def load_shipped(lm: LM) -> tuple[list[Expert], Expert]:
    """(experts, classification expert) of the package, each trained by the configuration of its name in configs/."""
    found = [Expert.load(path, fingerprint=lm.fingerprint, base=lm.name) for path in asset_files()]
    (classifier,) = (expert for expert in found if "labels" in expert.metadata)
    return [expert for expert in found if "labels" not in expert.metadata], classifier


def mixed(names: Sequence[str]) -> tuple[list[Item], list[str]]:
    """(held-out prompts, one of each kind in turn; the kind of each)."""
    todo = evaluate.mixed([make_task(name) for name in names], "test", PER_KIND)
    return todo, [item.task.name for item in todo]


def alone(lm: LM, todo: Sequence[Item], name: str, directory: Path, expert: Expert | None = None) -> list[Record]:
    """Answers of the base or of one expert, kept in `directory` under what they depend on."""

    def answers() -> list[Record]:
        adapted = lm
        if expert is not None:
            spectra = spectra_of(lm, expert.names)
            adapted = merge(lm, spectra, expert.z(spectra))
        return evaluate.evaluate(adapted, todo, batch_size=BATCH, title=name)

    of = expert.digest if expert else lm.fingerprint
    return evaluate.kept(directory / "alone" / f"{name}-{of[:12]}.jsonl", todo, answers)


def two_passes(model: AdaptiveLM, todo: Sequence[Item], title: str) -> list[Record]:
    """Records of both passes."""
    answer = by_two_passes(model, max(item.task.max_new_tokens for item in todo))
    return [record for batch in evaluate.batches(todo, BATCH, f"two passes: {title}") for record in answer(batch)]


def table(answers: Mapping[str, Sequence[Record]], kinds: Sequence[str]) -> dict[str, Any]:
    """Accuracies overall and by kind, and the paired differences that matter."""
    right = {name: np.array([record.correct for record in records]) for name, records in answers.items()}
    single = max((name for name in right if name.endswith("everywhere")), key=lambda name: right[name].mean())
    by_kind = {
        name: {kind: float(ok[[k == kind for k in kinds]].mean()) for kind in dict.fromkeys(kinds)}
        for name, ok in right.items()
    }
    return {
        "accuracy": {name: accuracy(ok)._asdict() for name, ok in right.items()},
        "by_kind": by_kind,
        "best_single": single,
        "two_pass_over_base": paired_difference(right["two-pass"], right["base"])._asdict(),
        "two_pass_over_best_single": paired_difference(right["two-pass"], right[single])._asdict(),
    }


def report(result: Mapping[str, Any], directory: Path) -> str:
    """What happened, for a person who has read nothing."""

    def share(interval: Mapping[str, float]) -> str:
        return f"{100 * interval['mean']:5.1f} % [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"

    def points(interval: Mapping[str, float]) -> str:
        return f"{100 * interval['mean']:+.1f} points [{100 * interval['low']:+.1f}, {100 * interval['high']:+.1f}]"

    live, kinds = result["live"], list(result["by_kind"]["base"])
    sent = {name: f"{100 * found['accuracy']:.0f} %" for name, found in result["dispatch"].items()}
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
        f"Sent to the right expert: {', '.join(f'{share} by the {name}' for name, share in sent.items())}.",
        "",
        f"What the passes took over all prompts:{'s':>12}{'tokens':>12}{'GFLOP':>12}",
        *(
            f"  {name:24}{kind:8}{cost[kind]['seconds']:16.1f}{cost[kind]['read'] + cost[kind]['drawn']:12}"
            f"{cost[kind]['flops'] / 1e9:12.0f}"
            for name, cost in result["cost"].items()
            for kind in ("first", "second")
        ),
        *(
            f"  {name:24}the first's share {cost['share_of_first']['seconds']:6.0%}"
            f"{cost['share_of_first']['tokens']:12.0%}{cost['share_of_first']['flops']:12.0%}"
            for name, cost in result["cost"].items()
        ),
        "(oracle dispatch: every prompt answered by its own kind's expert, 'other' by the base)",
        f"Pictures and records: {directory}",
    ]
    return "\n".join(lines)


def say(text: str) -> None:
    """A heading between the progress bars."""
    print(f"\n== {text}", file=sys.stderr)
