"""What two passes gain, and over what: every dispatcher and every baseline on held-out prompts, in pairs.

    python experiments/dispatch/table.py [--size 80] [--alphas FILE ...]    # 17 systems x 0.35 s a prompt on two cores

Two sets: `mixed`, the kinds that the demo's experts were trained on and "other", and `unseen`, the procedural kinds
that no expert and no classifier was trained on; of each kind --size test prompts, one of each kind in turn. Systems
differ in the first pass and in nothing else: the base and every expert everywhere, the uniform average of the
experts, dispatch by lot (three seeds), a linear classifier of the base's hidden states fitted on the experts' training
prompts, the paper's question scored, scored softly, with a threshold, and generated, the same by the classification
expert, and the oracle. Decoding is greedy, so only dispatch by lot and few-shot adaptation depend on a seed. On
`unseen` the right label is that of the kind's family where an expert has it ("smallest" is about numbers, as
"largest" is), or "other".

--alphas takes what `sva adapt` writes, each for the task in its settings: few-shot adaptation enters where every kind
of a set has a file of the same seed.

Every batch is written when it is finished (runs/dispatch), and the same command goes on. It writes result.json,
table.md, table.png, and confusion.json and confusion.png (the paper's figure 6) beside this file.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sva import demo, dispatch, dispatch_scores, evaluate, plots, records, runtime
from sva.adaptive import AdaptiveLM, build, load_experts
from sva.evaluate import Answer, Item
from sva.files import write_json
from sva.lm import LM, load, merge, spectra_of
from sva.runs import command, versions
from sva.spectral.expert import Expert, mix
from sva.stats import accuracy, paired_difference
from sva.tasks import task
from sva.tasks.labels import OTHER
from sva.tasks.procedural import KINDS, MIXTURES

HERE, RUNS = Path(__file__).parent, Path("runs/dispatch")
BATCH, SEEDS = 32, 3
CHOICES = ("hard", "soft", "0.5")


def experts(lm: LM, arguments: argparse.Namespace) -> tuple[list[Expert], Expert]:
    """(experts, classification expert): those given, or the shipped ones and the one that the demo trains."""
    if arguments.expert:
        found, classifier = load_experts(lm, arguments.expert, arguments.classifier)
        assert classifier is not None, "--expert needs --classifier"
        return found, classifier
    shipped, classifier = demo.load_shipped(lm)
    return [demo.train_live(lm, Path("runs/demo"))[0], *shipped], classifier


def prompts(found: Sequence[Expert], size: int) -> dict[str, list[Item]]:
    """The items of both sets."""
    trained = [str(evaluate.trained_on(expert)) for expert in found]
    seen = {*trained, OTHER, *MIXTURES[OTHER]}
    kinds = {"mixed": [*trained, OTHER], "unseen": [kind for kind in KINDS if kind not in seen]}
    return {name: evaluate.mixed(list(map(task, names)), "test", size) for name, names in kinds.items()}


def systems(model: AdaptiveLM, found: Sequence[Expert]) -> dict[str, AdaptiveLM]:
    """Every first pass by name."""
    labels = [label.name for label in model.labels if label.name != OTHER]
    made = {"base": model.by(f"fixed:{OTHER}")}
    made |= {f"{label} everywhere": model.by(f"fixed:{label}") for label in labels}
    made["uniform"] = model.by("uniform")
    made |= {f"random, seed {seed}": model.by("random", seed=seed) for seed in range(SEEDS)}
    made["embedding"] = model.by("embedding", examples=evaluate.examples(found))
    made["generated"] = model.by("generated")
    for name in ("prompt", "classifier"):
        by = model.by(name)
        for choice in CHOICES:
            served = dataclasses.replace(by.served, choice=dispatch.choice(choice))
            made[name if choice == "hard" else f"{name}, {choice}"] = dataclasses.replace(by, served=served)
    return made | {"oracle": model.by("oracle")}


def few_shot(lm: LM, found: Sequence[Expert], files: Sequence[Path], todo: Mapping[str, list[Item]]) -> dict[str, Any]:
    """{(set, system): what answers}, of the alphas of these files."""
    by_seed: dict[int, dict[str, Any]] = {}
    for path in files:
        saved = json.loads(path.read_text())
        by_seed.setdefault(saved["settings"]["seed"], {})[saved["settings"]["task"]] = saved
    spectra = spectra_of(lm, list(dict.fromkeys(name for expert in found for name in expert.names)))
    zs = {expert.digest: expert.z(spectra) for expert in found}

    def adapted(saved: Mapping[str, Any]) -> LM:
        return merge(lm, spectra, mix([zs[known["digest"]] for known in saved["experts"]], saved["alphas"]))

    def answers(of: Mapping[str, Any], budget: int) -> Answer:
        def answer(batch: Sequence[Item]) -> list[evaluate.Record]:
            rows: dict[int, evaluate.Record] = {}
            for kind in dict.fromkeys(item.task.name for item in batch):
                places = [i for i, item in enumerate(batch) if item.task.name == kind]
                made = evaluate.by_generation(adapted(of[kind]), budget)([batch[i] for i in places])
                rows |= zip(places, made, strict=True)
            return [rows[i] for i in range(len(batch))]

        return answer

    return {
        (name, f"few-shot, seed {seed}"): answers(of, budget_of(items))
        for seed, of in by_seed.items()
        for name, items in todo.items()
        if {item.task.name for item in items} <= of.keys()
    }


def budget_of(items: Sequence[Item]) -> int:
    """Tokens of an answer."""
    return max(item.task.max_new_tokens for item in items)


def cell(name: str, system: str, items: list[Item], answer: Answer, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of one system on one set, those that are on disk already not made again."""
    settings = dict(about, set=name, system=system, n=len(items), budget=budget_of(items), batch=BATCH)
    path = RUNS / f"{name}-{system.replace(', ', '-').replace(' ', '_')}-{len(items)}.jsonl"
    with records.opened(path, settings, {"command": command(), "versions": versions()}) as file:
        return evaluate.recorded(file, items, answer, BATCH, f"{name}: {system}")


def summary(rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Accuracies, paired differences from the base and from the best single expert, and costs, of one set."""
    right = {system: np.array([row["correct"] for row in found]) for system, found in rows.items()}
    kinds = [row["task"] for row in rows["base"]]
    single = max((name for name in right if name.endswith("everywhere")), key=lambda name: right[name].mean())
    table = {}
    for system, ok in right.items():
        table[system] = {
            "accuracy": accuracy(ok)._asdict(),
            "over_base": paired_difference(ok, right["base"])._asdict(),
            "over_best_single": paired_difference(ok, right[single])._asdict(),
            "by_kind": {kind: float(ok[[k == kind for k in kinds]].mean()) for kind in dict.fromkeys(kinds)},
        }
        if rows[system][0]["first"] is not None:
            found = dispatch_scores.scores(rows[system])
            table[system] |= {name: found[name] for name in ("right_label", "labels", "confusion", "cost")}
    return {"n": len(kinds), "best_single": single, "systems": table}


def markdown(result: Mapping[str, Any]) -> str:
    """The table, percent and points with 95 % intervals."""

    def points(x: Mapping[str, float]) -> str:
        return f"{100 * x['mean']:+.1f} [{100 * x['low']:+.1f}, {100 * x['high']:+.1f}]"

    lines = []
    for name, found in result["sets"].items():
        lines += [
            f"## {name}, n = {found['n']}, best single expert: {found['best_single']}",
            "",
            "| first pass | right | over the base | over the best single | right label | first pass, s | share |",
            "|---|---|---|---|---|---|---|",
        ]
        for system, row in found["systems"].items():
            sent, seconds, share = "", "", ""
            if "cost" in row:
                sent = f"{100 * row['right_label']['mean']:.0f} %"
                seconds = f"{row['cost']['first']['seconds']:.1f}"
                share = f"{row['cost']['share_of_first']['seconds']:.0%}"
            right = f"{100 * row['accuracy']['mean']:.1f} %"
            over = f"{points(row['over_base'])} | {points(row['over_best_single'])}"
            lines.append(f"| {system} | {right} | {over} | {sent} | {seconds} | {share} |")
        lines.append("")
    return "\n".join(lines)


def figure(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy of every system, with intervals, one panel a set."""
    sheet = Figure(figsize=(11, 5.5), layout="constrained")
    panels = np.atleast_1d(sheet.subplots(1, len(result["sets"])))
    for axes, (name, found) in zip(panels, result["sets"].items(), strict=True):
        rows = list(found["systems"].items())[::-1]
        means, lows, highs = (
            np.array([100 * row["accuracy"][key] for _, row in rows]) for key in ("mean", "low", "high")
        )
        axes.errorbar(means, range(len(rows)), xerr=[means - lows, highs - means], fmt="o", capsize=3)
        axes.set_yticks(range(len(rows)), [system for system, _ in rows])
        axes.axvline(100 * found["systems"]["base"]["accuracy"]["mean"], color="0.6", linestyle=":")
        axes.set(title=f"{name}, n = {found['n']}", xlabel="right answers, % (95 % interval); dotted: the base")
        axes.grid(alpha=0.3, axis="x")
    sheet.savefig(path, dpi=120)


def confusions(result: Mapping[str, Any]) -> None:
    """What the dispatchers chose on the mixed set, as a picture and as numbers."""
    shown = ("generated", "prompt", "classifier", "embedding")
    found = {name: result["sets"]["mixed"]["systems"][name] for name in shown}
    plots.confusion(
        {k: np.array(x["confusion"]) for k, x in found.items()}, found["prompt"]["labels"], HERE / "confusion.png"
    )
    write_json(
        HERE / "confusion.json", {k: {"labels": x["labels"], "counts": x["confusion"]} for k, x in found.items()}
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=80, help="test prompts of each kind")
    parser.add_argument("--expert", type=Path, action="append", default=[], help="instead of the shipped ones")
    parser.add_argument("--classifier", type=Path)
    parser.add_argument("--alphas", type=Path, nargs="+", default=[], help="files of sva adapt")
    arguments = parser.parse_args()
    runtime.start()
    lm = load(demo.MODEL)
    found, classifier = experts(lm, arguments)
    model = build(lm, found, classifier=classifier)
    todo = prompts(found, arguments.size)
    about = {"model": lm.name, "experts": [expert.digest for expert in found], "classifier": classifier.digest}
    made, adapted = systems(model, found), few_shot(lm, found, arguments.alphas, todo)
    result: dict[str, Any] = {**about, "quantisation": lm.quantisation, "sets": {}}
    for name, items in todo.items():
        rows = {
            system: cell(name, system, items, evaluate.by_two_passes(by, budget_of(items)), about)
            for system, by in made.items()
        }
        for (where, system), answer in adapted.items():
            if where == name:
                rows[system] = cell(name, system, items, answer, about)
        result["sets"][name] = summary(rows)
        write_json(HERE / "result.json", result | {"versions": versions(), "command": command()})
    (HERE / "table.md").write_text(markdown(result) + "\n")
    figure(result, HERE / "table.png")
    confusions(result)
    print(markdown(result))


if __name__ == "__main__":
    main()
