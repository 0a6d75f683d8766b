"""The whole method on one small model: an expert's answer at once, one trained live, a mixed set in two passes."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from sva.adaptation import dispatch_report as dispatch_scores
from sva.adaptation.adaptive_lm import adaptive, arrange
from sva.adaptation.by_two_passes import by_two_passes
from sva.evaluation import evaluate
from sva.evaluation.evaluate import Item, Record
from sva.evaluation.stats import accuracy, paired_difference
from sva.generation.decompose import spectra_of
from sva.generation.lm import LM
from sva.generation.load import load
from sva.generation.merge import merge
from sva.spectral.expert import Expert
from sva.tasks import task as make_task
from sva.tasks.labels import OTHER
from sva.training import config, metrics
from sva.training.run import command, train, versions
from sva.utils import plots
from sva.utils.files import write_json

MODEL = "smollm2-135m-instruct-q4_1"  # what the shipped experts were trained on, also where a hub answers
LIVE = "largest"  # trained here and now
LIVE_SETTINGS = (  # those of configs/smollm2-largest.yaml
    f"model={MODEL}",
    f"task={LIVE}",
    "rollout.max_new_tokens=8",
    "train.steps=10",  # fewer than there: from the seventh on it is right nine times in ten
    "train.micro_batch=4",
    "train.remat=false",
    "evaluate.size=96",
)
SHOWN = "capitals"  # the shipped expert whose answer is seen first
PER_KIND = 64  # held-out prompts of each kind in the mixed set
COMMON = 32  # of each kind, those that every expert answers; the best of them answers all
BATCH = 32
GREEN, RED, BOLD = 32, 31, 1


def demo(directory: Path) -> dict[str, Any]:
    """Runs the demo, going on from whatever `directory` holds, and returns what its result.json says."""
    started = time.time()
    say(f"1/4  the model, and what its expert for {SHOWN!r} makes of it")
    lm = load(MODEL)
    shipped, classifier = load_shipped(lm)
    todo = mixed([LIVE, *(str(expert.metadata["task"]) for expert in shipped), OTHER])
    answers = Answers(lm, todo, directory)
    first = range(BATCH)
    (shown,) = (expert for expert in shipped if expert.metadata["task"] == SHOWN)
    print(contrast(answers.of("base", None, first), answers.of(SHOWN, shown, first)))
    say(f"2/4  training the expert for {LIVE!r}: reward +1 for a right answer, -1 for a wrong one")
    live, trained = train_live(lm, directory)
    curve = metrics.read(directory / LIVE / "metrics.jsonl")
    plots.learning_curve(curve, f"SVF on {lm.name}: {LIVE}", directory / "learning_curve.png")
    experts = {str(expert.metadata["task"]): expert for expert in (live, *shipped)}
    say(f"3/4  the base model and each of {len(experts)} experts, alone, on a mixed set they have not seen")
    records = singles(answers, experts)
    say("4/4  two passes: the model says what kind each prompt is, then answers with that expert")
    records["two-pass"] = dict(enumerate(two_passes(lm, list(experts.values()), classifier, todo, directory)))
    both = list(records["two-pass"].values())
    labels = [label.name for label in arrange(list(experts.values()), classifier)[0]]
    name = "classification expert"
    right, chosen = zip(*[(record.right_label, record.label) for record in both], strict=True)
    confusion = dispatch_scores.confusion(right, chosen, labels)
    plots.confusion({name: confusion}, labels, directory / "dispatch.png")
    own = {kind: f"{kind} everywhere" for kind in experts} | {OTHER: "base"}
    records["oracle dispatch"] = {i: records[own[item.task.name]][i] for i, item in enumerate(todo)}
    result = {
        "model": lm.name,
        "quantisation": lm.quantisation,
        "n": len(todo),
        "live": {name: trained[name] for name in ("task", "n", "before", "after", "gain")},
        **table(records, [item.task.name for item in todo]),
        "labels": labels,
        "dispatch": {name: {"accuracy": float(np.trace(confusion) / confusion.sum()), "confusion": confusion.tolist()}},
        "cost": {name: dispatch_scores.costs([record._asdict() for record in both])},
        "seconds": round(time.time() - started, 1),
        "versions": versions(),
        "command": command(),
    }
    write_json(directory / "result.json", result)
    lines = (json.dumps({"system": name} | r._asdict()) for name, rows in records.items() for r in rows.values())
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


def mixed(names: Sequence[str]) -> list[Item]:
    """Held-out prompts, one of each kind in turn."""
    return evaluate.mixed([make_task(name) for name in names], "test", PER_KIND)


class Answers:
    """Answers of the base and of single experts to parts of the mixed set, kept under what they depend on."""

    def __init__(self, lm: LM, todo: Sequence[Item], directory: Path) -> None:
        self.lm, self.todo, self.directory = lm, todo, directory

    def of(self, name: str, expert: Expert | None, places: Sequence[int]) -> dict[int, Record]:
        """{place: record} of these places, whole batches where there is no need for another program."""
        part = [self.todo[i] for i in places]
        if not part:
            return {}

        def answers() -> list[Record]:
            adapted = self.lm
            if expert is not None:
                spectra = spectra_of(self.lm, expert.names)
                adapted = merge(self.lm, spectra, expert.z(spectra))
            return evaluate.evaluate(adapted, part, batch_size=BATCH, title=name)

        of = digest([self.lm.fingerprint, expert.digest if expert else "", *map(str, places)])
        path = self.directory / "alone" / f"{name}-{of}.jsonl"
        return dict(zip(places, evaluate.kept(path, part, answers), strict=True))


def digest(parts: Sequence[str]) -> str:
    """Twelve characters that stand for all of the parts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def singles(answers: Answers, experts: Mapping[str, Expert]) -> dict[str, dict[int, Record]]:
    """{system: its records by place}: base and best expert on all prompts, the others on the common and their own.

    The best is the one with most right answers to the prompts that all of them answer.
    """
    kinds = [item.task.name for item in answers.todo]
    common = range(min(COMMON * len(set(kinds)), len(kinds)))
    first, second, rest = common[:BATCH], common[BATCH:], range(len(common), len(kinds))
    found = {"base": answers.of("base", None, first) | answers.of("base", None, [*second, *rest])}
    for name, expert in experts.items():
        own = [i for i in rest if kinds[i] == name]
        parts = (answers.of(name, expert, part) for part in (first, second, own))
        found[f"{name} everywhere"] = {i: record for part in parts for i, record in part.items()}
    best = best_single(found, len(common))
    name = best.removesuffix(" everywhere")
    found[best] |= answers.of(name, experts[name], [i for i in rest if kinds[i] != name])
    found[best] = dict(sorted(found[best].items()))
    return found


def best_single(records: Mapping[str, Mapping[int, Record]], count: int) -> str:
    """The expert that has most of the first `count` prompts right, of those that have answered them all."""
    names = [name for name in records if name.endswith("everywhere")]
    return max(names, key=lambda name: sum(records[name][i].correct for i in range(count)))


def two_passes(
    lm: LM, experts: Sequence[Expert], classifier: Expert, todo: Sequence[Item], directory: Path
) -> list[Record]:
    """Records of both passes over all prompts, kept as those of single experts are."""

    def answers() -> list[Record]:
        answer = by_two_passes(
            adaptive(lm, experts, classifier=classifier), max(item.task.max_new_tokens for item in todo)
        )
        return [record for batch in evaluate.batches(todo, BATCH, "two passes") for record in answer(batch)]

    of = digest([lm.fingerprint, *(expert.digest for expert in (*experts, classifier))])
    return evaluate.kept(directory / "alone" / f"two-pass-{of}.jsonl", todo, answers)


def contrast(base: Mapping[int, Record], expert: Mapping[int, Record]) -> str:
    """The first prompt of the expert's own kind that the two answer differently, with both answers."""
    pairs = [(base[i], expert[i]) for i in base if base[i].task == SHOWN]
    was, now = next((pair for pair in pairs if pair[0].completion != pair[1].completion), pairs[0])

    def shown(record: Record) -> str:
        return colour(" ".join(record.completion.split()) or "(nothing)", GREEN if record.correct else RED)

    return f"\n{colour(was.question, BOLD)}\n  base model:  {shown(was)}\n  its expert:  {shown(now)}"


def colour(text: str, code: int) -> str:
    """The text in this colour where standard output is a terminal that wants any."""
    wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\033[{code}m{text}\033[0m" if wanted else text


def table(records: Mapping[str, Mapping[int, Record]], kinds: Sequence[str]) -> dict[str, Any]:
    """Accuracies overall and by kind, and the paired differences that matter.

    A system that has not answered all prompts is measured on those that all experts answered.
    """
    common = [i for i in range(len(kinds)) if all(i in answered for answered in records.values())]
    places = {name: list(range(len(kinds))) if len(found) == len(kinds) else common for name, found in records.items()}
    right = {name: np.array([records[name][i].correct for i in places[name]]) for name in records}
    single = best_single(records, len(common))
    by_kind = {
        name: {kind: float(ok[[kinds[i] == kind for i in places[name]]].mean()) for kind in dict.fromkeys(kinds)}
        for name, ok in right.items()
    }
    return {
        "accuracy": {name: {"n": len(ok)} | accuracy(ok)._asdict() for name, ok in right.items()},
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
        f"  {'':24}{'n':>4}{'all':>24}   " + "".join(f"{kind:>12}" for kind in kinds),
    ]
    for name, interval in result["accuracy"].items():
        cells = "".join(f"{100 * result['by_kind'][name][kind]:12.0f}" for kind in kinds)
        lines.append(f"  {name:24}{interval['n']:4}{share(interval):>24}   {cells}")
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
