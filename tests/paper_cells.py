"""Records of cells that nothing was trained for: the tables' tests make what a campaign would."""

import numpy as np

from experiments.paper import many, plan, training
from experiments.paper.methods import METHODS
from experiments.paper.queue import Queue
from experiments.paper.records import Store
from experiments.paper.studies import Study
from experiments.paper.tasks import task
from sva.evaluation.stats import accuracy
from sva.tasks.labels import OTHER

N = 40


class Made:
    """Stands in for a `Trainer`: a cell's accuracy is its method's, whatever is trained."""

    def __init__(self, store=None):
        self.store, self.ran = store, []
        self.share = {"svf": 0.7, "lora": 0.5, "ia3": 0.6}

    def run(self, cell):
        """A record like `Trainer.run`'s."""
        self.ran.append(cell)
        rng = np.random.default_rng(int(cell.digest, 16))
        about = {**training.identity(cell), "device": "cpu", "seconds": 2.0, "config": cell.flat}
        if isinstance(cell, Study):
            return about | _study(cell, rng)
        before = np.random.default_rng(int.from_bytes(cell.task.encode()[:4], "big")).random(N) < 0.2
        after = rng.random(N) < self.share.get(cell.method, 0.4)
        if self.store is not None and cell.is_kept:
            self.store.expert_path(cell).parent.mkdir(exist_ok=True)
            self.store.expert_path(cell).touch()
        curve = [{"reward": step / 10 - 0.9, "grad_norm": 0.5, "mean_length": 3.0} for step in range(8)]
        return about | {
            **{name: getattr(cell, name) for name in ("task", "examples", "seed", "lr", "split")},
            "n": N,
            "before": accuracy(before)._asdict(),
            "after": accuracy(after)._asdict(),
            "parameters": 1000 * (1 + list(METHODS).index(cell.method)),
            "curve": curve,
            **({"sampled": {"before": _drawn(before), "after": _drawn(after)}} if cell.is_sampled else {}),
            "held_out": {"before": _answers(before), "after": _answers(after)},
        }


def _answers(rights):
    return [[int(right), "a", "a", 1, ""] for right in rights]


def _drawn(rights):
    return {"rights": [[int(x)] * 8 for x in rights], "answers": [["a"] * 8 for _ in rights]}


def _study(study, rng):
    def rights():
        return (rng.random(study["size"]) < 0.5).astype(int).tolist()

    if study.method == "search":
        return {
            "n": study["size"],
            "alphas": rng.random(3).tolist(),
            "best": [0.5],
            "rights": {"base": rights(), "few-shot": rights()},
        }
    if study.method == "moved":
        found = {f"base/{name}": rights() for name in study["tasks"]}
        for name in study["tasks"]:
            for trained in study["trained"]:
                if name not in study["trained"] or name == trained:
                    found |= {f"{how}/{name}/{trained}": rights() for how in ("ordered", "shuffled")}
        return {"n": study["size"], "rights": found}
    if study.method == "many":
        tasks = [name for _ in range(study["size"]) for name in study["tasks"]]
        systems = ("base", *study["tasks"])
        return {
            "n": len(tasks),
            "tasks": tasks,
            "rights": {name: (rng.random(len(tasks)) < 0.5).astype(int).tolist() for name in systems},
            "seen": dict.fromkeys(many.ROUTERS["seen"], tasks),
            "unseen": dict.fromkeys(many.ROUTERS["unseen"], [study["tasks"][0]] * len(tasks)),
        }
    tasks = [name for name in study["tasks"] for _ in range(study["size"])]
    labels = [*dict.fromkeys(task(name).label for name in study["trained"]), OTHER]
    right = [task(name).label if task(name).label in labels else OTHER for name in tasks]
    systems = (*study["first"], "oracle", *(f"{label} everywhere" for label in labels))
    return {
        "n": len(tasks),
        "tasks": tasks,
        "labels": labels,
        "right_labels": right,
        "chosen": dict.fromkeys((*study["first"], "oracle"), right),
        "rights": {name: (rng.random(len(tasks)) < 0.5).astype(int).tolist() for name in systems},
        "costs": {name: {"first": 1.0, "second": 3.0} for name in study["tasks"]},
    }


def campaign(directory, scale, stages=None, runs=None):
    """The store of every cell of these stages, and what ran them."""
    store = Store(directory)
    runs, chosen = runs or Made(), stages or plan.STAGES
    runs.store = store
    listed, before = plan.every(scale, store.get, chosen), []
    while listed != before:  # what comes next is asked after every stage; a campaign's queue asks after every cell
        Queue(lambda now=listed: now, store).work(runs)
        listed, before = plan.every(scale, store.get, chosen), listed
    return store, runs
