"""The whole method on one small model: an expert's answer at once, one trained live, a mixed set in two passes."""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from sva.adaptation import dispatch_report
from sva.adaptation.experts import labels_and_slots
from sva.cli.demo_answers import BATCH, System, alone, answers, in_two_passes
from sva.cli.demo_report import contrast, report, say, table
from sva.evaluation import evaluate
from sva.evaluation.evaluate import Item, Record
from sva.generation.decompose import decompose
from sva.generation.lm import LM
from sva.generation.load import load
from sva.spectral.expert import Expert
from sva.tasks import task as make_task
from sva.tasks.labels import OTHER
from sva.training import config, metrics
from sva.training.run import train
from sva.utils import plots
from sva.utils.files import write_json
from sva.utils.provenance import command, versions

MODEL = "smollm2-135m-instruct-q4_1"  # what the shipped experts were trained on, also where a hub answers
SHOWN = "capitals"  # the shipped expert whose answer is seen first
LIVE = "largest"  # trained here and now
LIVE_SETTINGS = (  # those of configs/smollm2-largest.yaml
    f"model={MODEL}",
    f"task={LIVE}",
    "rollout.max_new_tokens=8",
    "train.steps=8",  # fewer than there: after the seventh most sampled answers are right
    "train.micro_batch=4",
    "train.remat=false",
    "evaluate.size=64",
)
PER_KIND = 48  # held-out prompts of each kind in the mixed set
CLASSIFIER = "classification expert"  # the first pass


def demo(directory: Path) -> dict[str, Any]:
    """Runs the demo, resuming from whatever `directory` holds, and returns what its result.json says."""
    started, kept = time.time(), directory / "answers"
    say(f"1/4  the base model and its expert for {SHOWN!r}, both asked the same")
    lm = load(MODEL)
    shipped, classifier = load_shipped(lm)
    todo = mixed([LIVE, *shipped, OTHER])
    budget = max(item.task.max_new_tokens for item in todo)
    base = alone(lm, "base", None, budget)
    print(contrast(SHOWN, *_first(base, alone(lm, _everywhere(SHOWN), shipped[SHOWN], budget), todo, kept)), flush=True)
    say(f"2/4  training the expert for {LIVE!r}: reward +1 for a right answer, -1 for a wrong one")
    live, trained = train_live(lm, directory)
    curve = metrics.read(directory / LIVE / "metrics.jsonl")
    plots.learning_curve(curve, f"SVF on {lm.name}: {LIVE}", directory / "learning_curve.png")
    experts = {LIVE: live, **shipped}
    say(f"3/4  {len(todo)} unseen prompts in two passes: the model says which kind each is, then answers as its expert")
    both = answers(in_two_passes(lm, "two-pass", list(experts.values()), classifier, budget), todo, kept)
    say(f"4/4  the same prompts by the base model and each of {len(experts)} experts, alone")
    records = {"base": _rest(base, OTHER, both, todo, kept)}
    for name, expert in experts.items():
        system = alone(lm, _everywhere(name), expert, budget)
        records[system.name] = _rest(system, expert.metadata["label"], both, todo, kept)
    records["two-pass"] = both
    own = {kind: _everywhere(kind) for kind in experts} | {OTHER: base.name}
    records["oracle dispatch"] = [records[own[item.task.name]][i] for i, item in enumerate(todo)]
    result = {
        "model": lm.name,
        "quantisation": lm.quantisation,
        "n": len(todo),
        "live": {name: trained[name] for name in ("task", "n", "before", "after", "gain")},
        **table(records, [item.task.name for item in todo]),
        **_first_pass(both, list(experts.values()), classifier, directory),
        "seconds": round(time.time() - started, 1),
        "versions": versions(),
        "command": command(),
    }
    write_json(directory / "result.json", result)
    lines = (json.dumps({"system": name} | r._asdict()) for name, rows in records.items() for r in rows)
    (directory / "answers.jsonl").write_text("\n".join(lines) + "\n")
    print(report(result, directory))
    return result


def _everywhere(name: str) -> str:
    return f"{name} everywhere"


def _first(base: System, expert: System, todo: Sequence[Item], kept: Path) -> tuple[list[Record], list[Record]]:
    """The first batch's answers by both; the weights are decomposed while the base's program is compiled."""
    with ThreadPoolExecutor(1, "decompose") as pool:
        decomposing = pool.submit(decompose, base.lm, "mlp")
        by_base = answers(base, todo[:BATCH], kept)
        decomposing.result()
    return by_base, answers(expert, todo[:BATCH], kept)


def _rest(system: System, label: str, both: Sequence[Record], todo: Sequence[Item], kept: Path) -> list[Record]:
    """A record of every item: behind the first batch, those that two passes gave with this label are taken over."""
    missing = [i for i in range(len(todo)) if i < BATCH or both[i].label != label]
    found = dict(zip(missing, answers(system, [todo[i] for i in missing], kept), strict=True))
    return [found.get(i, record) for i, record in enumerate(both)]


def _first_pass(
    records: Sequence[Record], experts: Sequence[Expert], classifier: Expert, directory: Path
) -> dict[str, Any]:
    """What the first pass chose and what both passes cost; the confusion is drawn as well."""
    labels = [label.name for label in labels_and_slots(experts, classifier)[0]]
    right, chosen = zip(*[(record.right_label, record.label) for record in records], strict=True)
    confusion = dispatch_report.confusion(right, chosen, labels)
    plots.confusion({CLASSIFIER: confusion}, labels, directory / "dispatch.png")
    share = float(np.trace(confusion) / confusion.sum())
    return {
        "labels": labels,
        "dispatch": {CLASSIFIER: {"accuracy": share, "confusion": confusion.tolist()}},
        "cost": {CLASSIFIER: dispatch_report.costs([record._asdict() for record in records])},
    }


def train_live(lm: LM, directory: Path) -> tuple[Expert, dict[str, Any]]:
    """(the expert, its run's result) of `LIVE`, trained in `directory` or found there."""
    return train(config.load(overrides=[*LIVE_SETTINGS, f"run_dir={directory / LIVE}"]), lm=lm)


def asset_files() -> list[Path]:
    """The expert files in the package."""
    return sorted(Path(str(resources.files("sva"))).glob("assets/*.safetensors"))


def load_shipped(lm: LM) -> tuple[dict[str, Expert], Expert]:
    """({task: expert}, classification expert) of the package, each trained by the config of its name in configs/."""
    found = [Expert.load(path, fingerprint=lm.fingerprint, base=lm.name) for path in asset_files()]
    (classifier,) = (expert for expert in found if "labels" in expert.metadata)
    return {str(expert.metadata["task"]): expert for expert in found if expert is not classifier}, classifier


def mixed(names: Sequence[str]) -> list[Item]:
    """Held-out prompts, one of each kind in turn."""
    return evaluate.mixed([make_task(name) for name in names], "test", PER_KIND)
