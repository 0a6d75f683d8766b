"""What two passes gain, and over what: every dispatcher and every baseline on held-out prompts, in pairs, three seeds.

    sva sweep configs/sweeps/smollm2-procedural.yaml    # the experts: three tasks, three seeds each
    python experiments/studies/dispatch/table.py [--size 160 --unseen 48]

Two sets: `mixed`, the kinds that the experts were trained on and "other", and `unseen`, of every family of procedural
kinds the first that no expert and no classifier was trained on; of each kind its first test prompts, in turn. A seed is
that of the three experts' training, of few-shot adaptation and of dispatch by lot. Systems differ in the first pass and
in nothing else: the base and every expert everywhere, the uniform average of the experts, dispatch by lot, a linear
classifier of the base's hidden states fitted on the experts' training prompts, the paper's question scored, scored
softly, with a threshold, and generated, the same by the classification expert, few-shot adaptation to each kind on
three of its training prompts (`sva adapt --budget light`), and the oracle. Decoding is greedy. On `unseen` the right
label is that of the kind's family where an expert has it ("smallest" is about numbers, as "largest" is), or "other".

A row's answer depends on its own mixture only (a row in a batch of many experts is bit for bit what it is where all are
on its own, tests/test_two_pass.py), so every prompt is answered once by the base and by each expert, and a first pass
that sends it to one of them takes that answer. Its second pass's seconds are that answer's too.

Every batch is written when it is finished (runs/dispatch), and the same command goes on. It writes result.json,
table.md, table.png, and confusion.json and confusion.png (the paper's figure 6) beside this file.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from sva.adaptation import dispatch_report, few_shot
from sva.adaptation.adaptive_lm import AdaptiveLM, adaptive
from sva.adaptation.by_two_passes import by_two_passes, router_examples
from sva.adaptation.label_scoring import Soft
from sva.cli import demonstration as demo
from sva.cli.adapt import BUDGETS
from sva.evaluation import evaluate
from sva.evaluation.evaluate import Item
from sva.evaluation.stats import accuracy, paired_difference
from sva.generation.lm import LM
from sva.generation.load import load
from sva.parallel import compile_cache
from sva.spectral.expert import Expert
from sva.tasks import task
from sva.tasks.labels import OTHER
from sva.tasks.sources.kinds import KINDS, MIXTURES
from sva.training.search import CEM
from sva.utils import plots
from sva.utils.files import write_json
from sva.utils.jsonl import resumed
from sva.utils.progress import progress_bar
from sva.utils.provenance import command, versions
from sva.utils.timing import Stopwatch

HERE, RUNS = Path(__file__).parent, Path("runs/dispatch")
TRAINED = ("largest", "list_last", "capitals")
EXPERTS = "runs/sweeps/procedural/smollm2-{task}_seed={seed}/expert.safetensors"
BATCH, SEEDS, LEAST = 32, 3, 0.5
FIRST = ("prompt", "classifier", "generated", "embedding")  # first passes that do not depend on the experts' values
Rows = list[dict[str, Any]]


class Choice(NamedTuple):
    """What a first pass chose for one prompt."""

    label: str
    prob: float
    first: dict[str, Any]


class Cells:
    """Answers and choices of one set of prompts, those that are on disk already not made again."""

    def __init__(self, name: str, items: list[Item], budget: int, about: Mapping[str, Any]) -> None:
        self.name, self.items, self.budget = name, items, budget
        self.about = dict(about, set=name, n=len(items), budget=budget, batch=BATCH)

    def __call__(self, system: str, answer: Callable[[Sequence[Item]], list[Any]], **about: Any) -> Rows:
        """One row an item, of what `answer` gives for each batch."""
        path = RUNS / f"{self.name}-{system.replace(', ', '-').replace(' ', '_')}-{len(self.items)}.jsonl"
        settings = dict(self.about, system=system, **about)
        with resumed(path, settings, {"command": command(), "versions": versions()}) as file:
            return evaluate.recorded(file, self.items, answer, BATCH, f"{self.name}: {system}")

    def some(self, name: str, places: Sequence[int]) -> "Cells":
        """Those of some of the prompts."""
        return Cells(f"{self.name}-{name}", [self.items[i] for i in places], self.budget, self.about)

    def two_passes(self, system: str, model: AdaptiveLM, **about: Any) -> Rows:
        """The answers of a model's two passes."""
        return self(system, by_two_passes(model, self.budget), **about)

    def choices(self, name: str, model: AdaptiveLM) -> Rows:
        """What a first pass chooses."""
        stopwatch = Stopwatch()

        def answer(batch: Sequence[Item]) -> list[Choice]:
            decision, costs = model.measured_choice([item.question for item in batch], stopwatch)
            named = zip(model.named(decision), costs, strict=True)
            return [Choice(label, prob, cost._asdict()) for (label, prob), cost in named]

        return self(f"{name} chooses", answer)


def prompts(mixed: int, unseen: int) -> dict[str, list[Item]]:
    """The items of both sets, so many of each kind."""
    seen, new = {*TRAINED, *MIXTURES[OTHER]}, {}
    for name, kind in KINDS.items():
        if name not in seen:
            new.setdefault(kind.label, name)
    kinds = {"mixed": ([*TRAINED, OTHER], mixed), "unseen": ([*new.values()], unseen)}
    return {name: evaluate.mixed(list(map(task, names)), "test", size) for name, (names, size) in kinds.items()}


def sent(answers: Mapping[str, Rows], choices: Sequence[tuple[str, float, Any]], right: Sequence[str]) -> Rows:
    """The rows of a first pass that sends each prompt to one expert, or to the base."""
    return [
        answers[label][i] | {"label": label, "prob": prob, "right_label": wanted, "first": first}
        for i, ((label, prob, first), wanted) in enumerate(zip(choices, right, strict=True))
    ]


def searched(lm: LM, pool: few_shot.Pool, experts: Sequence[Expert], kind: str, seed: int) -> list[float]:
    """The alphas of `sva adapt KIND --budget light --seed SEED`, one an expert, searched where no file has them yet."""
    path = RUNS / f"alphas-{kind}-seed={seed}-{'-'.join(expert.digest[:8] for expert in experts)}.json"
    if not path.exists():
        shots, generations = BUDGETS["light"]
        search, key = CEM(population=32, low=0.0, high=1.0), jax.random.key(seed)
        chosen = few_shot.draw(task(kind), "train", shots, seed)
        start = search.init(pool.start())
        steps = few_shot.adapt(
            lm, pool, chosen, search, few_shot.FewShotConfig(), key, state=start, generations=range(1, generations + 1)
        )
        found = []
        with progress_bar(f"adapt {kind}, seed {seed}", generations, "generation") as bar:
            for step in steps:
                found.append(step)
                bar.update()
        last, history = found[-1], [dict(step.row) for step in found]
        alphas = last.alphas if few_shot.is_found(history) else np.zeros_like(last.alphas)
        write_json(path, {"alphas": alphas.tolist(), "history": history})
    return json.loads(path.read_text())["alphas"]


def adapted(lm: LM, experts: Sequence[Expert], cells: Cells, seed: int) -> Rows:
    """The answers of the mixture that a few training prompts of each kind find, kind by kind."""
    pool = few_shot.pool(lm, experts, progress=False)
    rows: dict[int, Any] = {}
    for kind in dict.fromkeys(item.task.name for item in cells.items):
        places = [i for i, item in enumerate(cells.items) if item.task.name == kind]
        alphas = searched(lm, pool, experts, kind, seed)
        answer = evaluate.by_generation(few_shot.mixed(lm, pool, alphas), cells.budget)
        found = cells.some(kind, places)(f"few-shot, seed {seed}", answer, alphas=alphas)
        rows |= zip(places, (row | {"alphas": alphas} for row in found), strict=True)
    return [rows[i] for i in range(len(cells.items))]


def seeds_of(lm: LM, classifier: Expert, cells: Cells) -> Iterator[dict[str, Rows]]:
    """{system: rows} of one seed after another."""
    free = {"seconds": 0.0, "read": 0, "drawn": 0, "flops": 0.0}
    choices: dict[str, Rows] = {}
    base: Rows = []
    for seed in range(SEEDS):
        files = [EXPERTS.format(task=name, seed=seed) for name in TRAINED]
        experts = [Expert.load(Path(file), fingerprint=lm.fingerprint) for file in files]
        model = adaptive(lm, experts, classifier=classifier, progress=seed == 0)
        labels = [label.name for label in model.labels if label.name != OTHER]
        right = [item.task.label if item.task.label in labels else OTHER for item in cells.items]
        if not choices:
            examples = router_examples(experts)
            choices = {name: cells.choices(name, model.by(name, examples=examples)) for name in FIRST}
            base = cells.two_passes("base", model.by(f"fixed:{OTHER}"))
        about = {"experts": [expert.digest for expert in experts]}
        answers = {
            label: cells.two_passes(f"{label} everywhere, seed {seed}", model.by(f"fixed:{label}"), **about)
            for label in labels
        }
        made = {"base": base} | {f"{label} everywhere": rows for label, rows in answers.items()}
        made["uniform"] = cells.two_passes(f"uniform, seed {seed}", model.by("uniform"), **about)
        answers[OTHER] = base
        lots = np.random.default_rng(seed).integers(len(model.labels), size=len(cells.items))
        made["random"] = sent(answers, [(model.labels[i].name, 1.0, free) for i in lots], right)
        for name in FIRST:
            chosen = [(row["label"], row["prob"], row["first"]) for row in choices[name]]
            made[name] = sent(answers, chosen, right)
            if name in ("prompt", "classifier"):
                unsure = [(label if prob >= LEAST else OTHER, prob, first) for label, prob, first in chosen]
                made[f"{name}, {LEAST}"] = sent(answers, unsure, right)
                by = model.by(name)
                by = dataclasses.replace(by, serving=dataclasses.replace(by.serving, choice=Soft()))
                made[f"{name}, soft"] = cells.two_passes(f"{name}, soft, seed {seed}", by, **about)
        made["few-shot"] = adapted(lm, experts, cells, seed)
        yield made | {"oracle": sent(answers, [(label, 1.0, free) for label in right], right)}


def summary(found: Sequence[Mapping[str, Rows]]) -> dict[str, Any]:
    """Accuracies, paired differences from the base, the best single expert and few-shot, and costs, of one set.

    A prompt counts as right by the share of seeds that answer it rightly, and intervals are over prompts. The best
    single expert is the one that is best on this set over all seeds, known in hindsight.
    """
    kinds = [row["task"] for row in found[0]["base"]]
    right = {name: np.array([[row["correct"] for row in made[name]] for made in found], float) for name in found[0]}
    of_a_prompt = {name: ok.mean(axis=0) for name, ok in right.items()}
    single = max((name for name in right if name.endswith("everywhere")), key=lambda name: right[name].mean())
    nothing = np.zeros(len(kinds))
    table = {}
    for system, ok in of_a_prompt.items():
        is_same = (right[system] == right[system][0]).all()
        table[system] = {
            "accuracy": (accuracy(right[system][0]) if is_same else paired_difference(ok, nothing))._asdict(),
            "by_seed": right[system].mean(axis=1).tolist(),
            "over_base": paired_difference(ok, of_a_prompt["base"])._asdict(),
            "over_best_single": paired_difference(ok, of_a_prompt[single])._asdict(),
            "by_kind": {kind: float(ok[[k == kind for k in kinds]].mean()) for kind in dict.fromkeys(kinds)},
        }
        rows = [row for made in found for row in made[system]]
        if rows[0]["first"] is not None:
            scores = dispatch_report.scores(rows)
            table[system] |= {name: scores[name] for name in ("right_label", "labels", "confusion", "cost")}
    few = [{row["task"]: row["alphas"] for row in made["few-shot"]} for made in found]
    table["few-shot"]["alphas"] = {kind: [of_a_seed[kind] for of_a_seed in few] for kind in few[0]}
    spread = float(np.std(of_a_prompt["few-shot"] - of_a_prompt[single], ddof=1))
    return {
        "n": len(kinds),
        "kinds": list(dict.fromkeys(kinds)),
        "best_single": single,
        # By the normal approximation: 2.8 standard errors of the difference between few-shot and the best single.
        "shown_four_times_in_five": 2.8 * spread / np.sqrt(len(kinds)),
        "systems": table,
    }


def markdown(result: Mapping[str, Any]) -> str:
    """The table, percent and points with 95 % intervals."""

    def points(x: Mapping[str, float]) -> str:
        return f"{100 * x['mean']:+.1f} [{100 * x['low']:+.1f}, {100 * x['high']:+.1f}]"

    lines = []
    for name, found in result["sets"].items():
        lines += [
            f"## {name}: {found['n']} prompts of {len(found['kinds'])} kinds, {SEEDS} seeds",
            "",
            f"Best single expert, in hindsight: {found['best_single']}. A difference between it and few-shot of "
            f"{100 * found['shown_four_times_in_five']:.1f} points would show four times in five.",
            "",
            "| first pass | right | by seed | over the base | over the best single | right label | first pass |",
            "|---|---|---|---|---|---|---|",
        ]
        for system, row in found["systems"].items():
            sent_right, share = "", ""
            if "cost" in row:
                sent_right = "" if system == "uniform" else f"{100 * row['right_label']['mean']:.0f} %"
                share = f"{row['cost']['share_of_first']['seconds']:.0%} of the time"
            right = f"{100 * row['accuracy']['mean']:.1f} % | {', '.join(f'{100 * x:.1f}' for x in row['by_seed'])}"
            over = f"{points(row['over_base'])} | {points(row['over_best_single'])}"
            lines.append(f"| {system} | {right} | {over} | {sent_right} | {share} |")
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
        title = f"{name}: {found['n']} prompts, {SEEDS} seeds"
        axes.set(title=title, xlabel="right answers, % (95 % interval); dotted: the base")
        axes.grid(alpha=0.3, axis="x")
    sheet.savefig(path, dpi=120)


def confusions(found: Mapping[str, Any]) -> None:
    """What the dispatchers chose on the mixed set, as a picture and as numbers."""
    shown = {name: found["systems"][name] for name in ("generated", "prompt", "classifier", "embedding")}
    counts = {name: np.array(row["confusion"]) // SEEDS for name, row in shown.items()}  # a first pass has no seed
    plots.confusion(counts, shown["prompt"]["labels"], HERE / "confusion.png")
    tables = {name: {"labels": row["labels"], "counts": counts[name].tolist()} for name, row in shown.items()}
    write_json(HERE / "confusion.json", tables)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=160, help="test prompts of each kind of the mixed set")
    parser.add_argument("--unseen", type=int, default=48, help="test prompts of each unseen kind")
    arguments = parser.parse_args()
    compile_cache.start()
    lm = load(demo.MODEL)
    _, classifier = demo.load_shipped(lm)
    about = {"model": lm.name, "classifier": classifier.digest}
    result: dict[str, Any] = {**about, "quantisation": lm.quantisation, "sets": {}}
    for name, items in prompts(arguments.size, arguments.unseen).items():
        budget = max(item.task.max_new_tokens for item in items)
        result["sets"][name] = summary(list(seeds_of(lm, classifier, Cells(name, items, budget, about))))
        write_json(HERE / "result.json", result | {"versions": versions(), "command": command()})
        (HERE / "table.md").write_text(markdown(result) + "\n")
        figure(result, HERE / "table.png")
    confusions(result["sets"]["mixed"])
    print(markdown(result))


if __name__ == "__main__":
    main()
