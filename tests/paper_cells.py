"""Records of cells that nothing was trained for: the tables' tests make what a campaign would."""

import numpy as np

from experiments.paper import plan
from experiments.paper.cells import flat
from experiments.paper.methods import METHODS
from experiments.paper.records import Store
from experiments.paper.revisions import CURRENT
from sva.evaluation.stats import accuracy

N = 40


class Made:
    """Stands in for a `Trainer`: a cell's accuracy is its method's, whatever is trained."""

    def __init__(self, share=None):
        self.share = {"svf": 0.7, "lora": 0.5, "ia3": 0.6} | (share or {})
        self.ran = []

    def run(self, cell):
        """A record like `Trainer.run`'s."""
        self.ran.append(cell)
        rng = np.random.default_rng(int(cell.digest, 16))
        before = np.random.default_rng(int.from_bytes(cell.task.encode()[:4], "big")).random(N) < 0.2
        after = rng.random(N) < self.share.get(cell.method, 0.4)
        curve = [{"reward": step / 10 - 0.9, "grad_norm": 0.5, "mean_length": 3.0} for step in range(8)]
        return {
            "cell": cell.name,
            **{name: getattr(cell, name) for name in ("stage", "method", "task", "examples", "seed", "lr", "split")},
            "scale": cell.scale.name,
            "key": cell.key,
            "revisions": CURRENT._asdict(),
            "n": N,
            "before": accuracy(before)._asdict(),
            "after": accuracy(after)._asdict(),
            "gain": {"mean": float(after.mean() - before.mean())},
            "parameters": 1000 * (1 + list(METHODS).index(cell.method)),
            "device": "cpu",
            "seconds": 2.0,
            "config": flat(cell.config),
            "curve": curve,
            "held_out": {when: [[int(x), "a", "a", 1, ""] for x in xs] for when, xs in _both(before, after)},
        }


def _both(before, after):
    return (("before", before), ("after", after))


def campaign(directory, scale, stages=None, runs=None):
    """The store of every cell of these stages, and what ran them."""
    from experiments.paper.queue import Queue

    store, runs = Store(directory), runs or Made()
    chosen = stages or plan.STAGES
    Queue(lambda: [cell for cell in plan.every(scale, store.get) if cell.stage in chosen], store).work(runs)
    return store, runs
