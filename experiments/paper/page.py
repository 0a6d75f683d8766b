"""docs/results.md: what came out, in plain words that follow from the numbers, each beside its command and record."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from experiments.paper import plan
from experiments.paper.methods import METHODS
from experiments.paper.records import ANSWER, Failure, Store, devices
from experiments.paper.render import millions, p_value
from experiments.paper.scales import Scale

SIGNIFICANT = 0.05

NOT_RUN = "Not run."
INTRODUCTION = """# What came out

Transformer-Squared claims that scaling singular values (SVF) needs far fewer numbers and far fewer samples than LoRA,
trains by policy gradient where LoRA collapses, and composes. This page is what we found with
{model} on {device}. It is written by
`python -m experiments.paper.every --scale {scale}` from the records in `experiments/paper/cells`, so that no number
here is older than its record, and a difference counts as shown only where Holm's correction over all comparisons of its
table leaves p below 0.05.

A small model on short tasks is not the paper's Llama-3-8B on GSM8K: what holds here need not hold there. What was run,
when and on what, failures too, is in `experiments/LOG.md`; how to make the paper's own table is in
[Reproducing the paper](reproducing.md).

- Tasks: {tasks}. They were chosen by a rule that was written down before any cell was trained
  (`experiments/paper/tasks.py`), on validation.
- Learning rates: the best of three tries a method, on validation of {first}, one seed. Every try is in
  {settings}.
- Of {planned} cells and studies that can be named so far {done} are done: {cells} trained cells, {studies} studies of
  trained experts; {failed} failed. Each record has the answers to all its held-out prompts, before and after. Questions
  that no record answers yet are listed at the end.
"""


def text(scale: Scale, store: Store, results: Path, docs: Path) -> str:
    """The page, from the JSON files that the tables wrote into `results`; links are relative to `docs`."""
    known = plan.decided(scale, store.get)
    records = [record for record in store.everything() if record["scale"] == scale.name]
    planned = [store.get(each) for each in plan.every(scale, store.get)]
    failures = [each for each in planned if isinstance(each, Failure)]
    trained = [record for record in records if "held_out" in record]
    here = Path(os.path.relpath(results, docs))
    head = INTRODUCTION.format(
        model=scale.model,
        device=devices(records) or "nothing yet",
        scale=scale.name,
        tasks=", ".join(known.tasks),
        first=known.tasks[0],
        settings=f"[table 6]({here}/table6.md)",
        done=sum(each is not None and not isinstance(each, Failure) for each in planned),
        planned=len(planned),
        cells=len(trained),
        studies=len(records) - len(trained),
        failed=len(failures),
    )
    sections = _sections(results, here)
    parts = [head, *sections[:1], *_one_answer(trained), *sections[1:]]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _sections(results: Path, here: Path) -> list[str]:
    """One section a question that has an answer, where its table has been made, and a list of those that have none."""
    parts, open_ = [], []
    for name, title, words in (
        ("table1", "Does SVF beat LoRA?", _table1),
        ("axis_prompts", "Does it need fewer samples?", _prompts),
        ("axis_parameters", "Does it need fewer numbers?", _parameters),
        ("figure9", "Does LoRA collapse under policy gradient?", _collapse),
        ("table4", "Which matrices, and which learning?", _table1),
        ("table7", "IA3 and DoRA", _table1),
        ("fidelity", "For those who saw smaller gains: SVF with other settings", _table1),
        ("table2", "Does it compose? Unseen tasks", _systems),
        ("table5", "Experts moved to another model, unseen tasks", _systems),
        ("table9", "Experts moved to another model, their own tasks", _systems),
        ("many", "Dispatch among many", _many),
        ("table8", "How many shots few-shot search needs", _systems),
        ("figure_z", "How alike experts are", _alike),
        ("figure10", "How much of a spectrum its largest values hold", _spectrum),
        ("three_views", "Whole models, a mixture of experts, or experts of z", _views),
    ):
        path = results / f"{name}.json"
        if path.exists():
            data = json.loads(path.read_text())
            picture = results / f"{name}.png"
            shown = [f"![{title}]({here}/{picture.name})", ""] if picture.exists() else []
            table = results / f"{name}.md"
            numbers = f"[the table]({here}/{table.name}), " if table.exists() else ""
            source = f"From {numbers}[its numbers]({here}/{path.name}), made by `{data['command']}`."
            lines = words(data)
            if lines == [NOT_RUN]:
                open_.append(f"- {title.removesuffix('?')}: {source}")
            else:
                parts.append("\n".join([f"## {title}", "", *shown, *lines, "", source]))
    return [*parts, "\n".join(["## Not run yet", "", *open_])] if open_ else parts


def _one_answer(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A section on the main cells that give one answer to half of their held-out prompts or more."""
    place, lines = ANSWER.index("answer"), []
    for record in sorted(records, key=lambda record: record["cell"]):
        answers = [row[place] for row in record["held_out"]["after"]]
        answer, count = Counter(answers).most_common(1)[0]
        if record["stage"] == "main" and 2 * count >= len(answers):
            said, right = "none" if answer is None else f'"{answer}"', 100 * record["after"]["mean"]
            lines.append(
                f"- {record['task']}, {record['examples']} prompts, seed {record['seed']}: {_title(record['method'])} "
                f"answers {said} {count} times of {len(answers)}; right {right:.1f} %."
            )
    about = "A reward can be had without the task: by one answer to most prompts, whatever they ask."
    return ["\n".join(["## Where an answer no longer depends on the prompt", "", about, "", *lines])] if lines else []


class Difference(NamedTuple):
    """One paired difference, and the words for its two sides and where it was measured."""

    one: str
    other: str
    where: str
    entry: Mapping[str, Any]


def said(differences: Sequence[Difference]) -> list[str]:
    """A line each for those that are shown, one for all that are not, and one for bounds, which have no p."""
    if not differences:
        return [NOT_RUN]
    tested = [each for each in differences if each.entry["p_holm"] is not None]
    lines, rest, bounds = [], {}, []
    for one, other, where, entry in differences:
        mean, low, high = (100 * entry[name] for name in ("mean", "low", "high"))
        number = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]" + (" (one seed)" if entry["seeds"] == 1 else "")
        if entry["p_holm"] is None:
            bounds.append(f"{one} against {other}: {where} {number}")
        elif entry["p_holm"] < SIGNIFICANT:
            side = "above" if mean > 0 else "below"
            lines.append(f"- {where}: {one} is {side} {other} by {number} points, p {p_value(entry['p_holm'])}.")
        else:
            rest.setdefault(f"{one} against {other}", []).append(f"{where} {number}")
    if rest:
        sizes = [100 * each.entry["detectable"] for each in tested if each.entry["p_holm"] >= SIGNIFICANT]
        listed = "; ".join(f"{pair}: {', '.join(places)}" for pair, places in rest.items())
        would = f"differences of {min(sizes):.1f} to {max(sizes):.1f} points would show four times in five"
        lines.append(f"- No difference shown ({would}): {listed}.")
    if bounds:
        lines.append(f"- Chosen on the test prompts themselves, so bounds and no result: {'; '.join(bounds)}.")
    return lines


def _title(method: str) -> str:
    return METHODS[method].title if method in METHODS else f"the {method}"


def _table1(data: Mapping[str, Any]) -> list[str]:
    entries = data["differences"]
    return said([Difference(_title(e["method"]), _title(e["less"]), e["task"], e) for e in entries])


def _prompts(data: Mapping[str, Any]) -> list[str]:
    entries = data["svf_less_lora"]
    return said([Difference("SVF", "LoRA", f"{e['task']}, {e['examples']} prompts", e) for e in entries])


def _parameters(data: Mapping[str, Any]) -> list[str]:
    return said([Difference(_title(e["method"]), _title(e["less"]), e["task"], e) for e in data["pairs"]])


def _collapse(data: Mapping[str, Any]) -> list[str]:
    about = f"On {data['task']}, at every learning rate tried (mean reward of a step's samples, from -1 to +1):"
    ends = [
        f"- {name}: {each['result']}" + (f"; last reward {each['rewards'][-1]:+.2f}." if each["rewards"] else ".")
        for name, each in data["curves"].items()
    ]
    return [about, "", *ends]


def _many(data: Mapping[str, Any]) -> list[str]:
    lines = []
    for when, what in (("seen", "there"), ("unseen", "left out")):
        lines += [f"With every kind's own expert {what}:", "", *_systems(data[when]), ""]
    return lines[:-1] if set(lines) & {NOT_RUN} == set() else [NOT_RUN]


def _systems(data: Mapping[str, Any]) -> list[str]:
    there = {name: each for name, each in data["systems"].items() if each["less_base"]}
    return said([Difference(name, "the base", "over all", each["less_base"] | each) for name, each in there.items()])


def _alike(data: Mapping[str, Any]) -> list[str]:
    """Mean cosines of two experts' changes, of one task and of two."""
    tasks = [name.rpartition(" ")[0] for name in data["experts"]]
    pairs: dict[str, list[float]] = {"one task's seeds": [], "two tasks": []}
    for i, j in itertools.combinations(range(len(tasks)), 2):
        pairs["one task's seeds" if tasks[i] == tasks[j] else "two tasks"].append(data["cosines"][i][j])
    found = [f"of {name} {fmean(cosines):+.2f} (pairs: {len(cosines)})" for name, cosines in pairs.items() if cosines]
    return [f"Mean cosine of what two experts change, s (z - 1): {', '.join(found)}."]


def _spectrum(data: Mapping[str, Any]) -> list[str]:
    """The share of the largest values in the sum, mean over layers."""
    place = data["ranks"].index(32)
    shares = {name: 100 * fmean(row[place] for row in rows) for name, rows in data["shares"].items()}
    found = ", ".join(f"{name} {share:.0f} %" for name, share in shares.items())
    return [f"The largest 32 singular values of {data['model']} hold of their sum, mean over layers: {found}."]


def _views(data: Mapping[str, Any]) -> list[str]:
    """Three sentences: what is right, what it takes to train and keep, how long it lasts; then the differences."""
    systems, costs = data["systems"], data["costs"]
    names = {"macro": "whole models behind a router", "micro": "one mixture", "self-adaptive": "two passes"}
    right = {view: 100 * systems[name]["score"]["mean"] for view, name in data["views"].items()}
    base, tasks = 100 * systems["base"]["score"]["mean"], ", ".join(data["tasks"])

    def each(text: Callable[[str], str]) -> str:
        return ", ".join(f"{words} {text(view)}" for view, words in names.items())

    lines = [
        f"Of the held-out prompts of {tasks} the base answers {base:.1f} % rightly, "
        + each(lambda view: f"{right[view]:.1f} %")
        + f" (seeds: {len(data['seeds'])}; {data['n']} prompts, {data['model']} on {data['device']}).",
        "Trained and stored numbers: "
        + each(lambda view: f"{_amount(costs[view]['parameters'])} and {_amount(costs[view]['stored_parameters'])}")
        + "; held in memory: "
        + each(lambda view: f"{costs[view]['bytes_held'] / 1e6:.0f} MB")
        + ".",
        "Seconds to the first answer, and for all: "
        + each(lambda view: f"{costs[view]['first_answer_seconds']:.1f} and {costs[view]['evaluation_seconds']:.1f}")
        + ".",
        "",
    ]
    entries = [*data["between"], *({**entry, "less": "the base"} for entry in data["less_base"])]
    return [*lines, *said([Difference(e["system"], e["less"], "over all", e) for e in entries])]


def _amount(number: float) -> str:
    return millions(round(number))
