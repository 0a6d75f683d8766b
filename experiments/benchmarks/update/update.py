"""Composition of all mlp matrices, and one z-update, beside a torch implementation of the public code's algorithm.

    python experiments/benchmarks/update/update.py               # extra `bench`; writes result.json beside this file
    python experiments/benchmarks/update/update.py --llama 4     # on an accelerator: so many layers; writes llama.json

SmolLM2-135M-Instruct in float32, its 90 mlp matrices, `sigmoid_nuclear`, 32 sequences of 96 tokens of which the last
24 are completion, rewards of +1 and -1, no baseline, no KL; or layers of Llama-3-8B's shape, random, spectra too. The
public code (SakanaAI/self-adaptive-llms) composes every W' = U diag(s z) V^T, runs one sequence at a time, lets
autograd fill a dense gradient for each W', and contracts those to gradients of p; `batched` does the same with all
sequences in one batch. Ours is `sva.training.update.train_step`, the update that training runs, on 32 prompts of one
completion each, so nothing is shared between rows. `products` are the limit: the bare matrix products that
composition, or the update, cannot do without, each by itself.

All sides run in turn in one process, with as many threads each, and torch's waiting passively; medians and ratios.
Compilation and a warm-up are outside the times. Peak memory is what one update adds to the model and its spectra: to a
process of its own, or to an accelerator's memory; what compiling our program adds before is told apart. The gradients
of both sides are compared before anything is timed.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "passive"

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from sva.cli.throughput import step_matrices
from sva.generation.decompose import decompose
from sva.generation.lm import LM
from sva.generation.load import load
from sva.generation.merge import merge_params
from sva.models.weights import expected
from sva.parallel import compile_cache
from sva.spectral.forms import Spectrum
from sva.spectral.parametrisations import family
from sva.training.config.reinforce import ReinforceConfig
from sva.training.config.train import TrainConfig
from sva.training.optimizers import update_config
from sva.training.reinforce import Batch, reinforce_loss
from sva.training.update import init_state, train_step
from sva.utils.files import write_json
from sva.utils.matmul import dot
from sva.utils.provenance import command, versions

ROWS, PROMPT, NEW, ROUNDS = 32, 72, 24, 3
CFG = TrainConfig(micro_batch=4, remat=False, lr=2e-3)
ON_ACCELERATOR = TrainConfig(micro_batch=ROWS, remat=False, lr=2e-3)
FAMILY = family("sigmoid_nuclear")


class Public:
    """The public code's way: weights composed into the model, dense gradients, contraction."""

    def __init__(self, model: Any, spectra: dict[str, Spectrum], raw: dict[str, np.ndarray], ids: Any, rewards: Any):
        self.model = model.requires_grad_(False)
        device = model.device
        self.spectra = {
            name: tuple(torch.tensor(np.asarray(x), device=device) for x in (spectrum.u, spectrum.s, spectrum.vt.T))
            for name, spectrum in spectra.items()
        }
        self.raw = {name: torch.tensor(x, device=device, requires_grad=True) for name, x in raw.items()}
        self.adam = torch.optim.Adam(self.raw.values(), lr=CFG.lr)
        self.ids, self.rewards = torch.tensor(ids, device=device), torch.tensor(rewards, device=device)

    def compose(self) -> dict[str, torch.Tensor]:
        """{name: W'}, as the public code writes it: two products and the rescaling."""
        composed = {}
        for name, (u, s, v) in self.spectra.items():
            z = torch.sigmoid(self.raw[name])
            composed[name] = (u @ torch.diag_embed(s * z) @ v.T) * (s.sum() / (s * z).sum())
        wait()
        return composed

    def gradients(self, size: int) -> None:
        """Fills the gradient of every raw vector from sequences in pieces of `size`."""
        self.adam.zero_grad()
        composed = self.compose()
        for name, weight in composed.items():
            parameter = self.model.get_parameter(name)
            parameter.data.copy_(weight.detach())
            parameter.requires_grad_(True)
            parameter.grad = None
        for start in range(0, ROWS, size):
            ids = self.ids[start : start + size]
            logits = self.model(ids).logits[:, PROMPT - 1 : -1]
            logps = torch.log_softmax(logits, dim=-1).gather(-1, ids[:, PROMPT:, None])[..., 0]
            loss = -(self.rewards[start : start + size] * logps.sum(dim=1)).sum() / ROWS
            loss.backward()
        for name, weight in composed.items():
            weight.backward(self.model.get_parameter(name).grad)

    def update(self, size: int) -> None:
        """One clipped Adam step."""
        self.gradients(size)
        torch.nn.utils.clip_grad_norm_(self.raw.values(), CFG.clip_norm)
        self.adam.step()
        wait()


class Ours:
    """The same update by `train_step`."""

    def __init__(
        self,
        lm: LM,
        spectra: dict[str, Spectrum],
        raw: dict[str, np.ndarray],
        ids: Any,
        rewards: Any,
        cfg: TrainConfig = CFG,
    ):
        self.lm, self.flat, self.spectra, self.cfg = lm, spectra, lm.model.nest(spectra), cfg
        state = init_state(spectra, FAMILY, update_config(cfg))
        self.state = state.replace(raw={name: jnp.asarray(x) for name, x in raw.items()})
        ids = jnp.asarray(ids, jnp.int32)
        self._program: Callable[[], Any] = lambda: None
        self._z = jax.jit(lambda raw, s: jax.tree.map(FAMILY.matrix_z, raw, s))
        ones = jnp.ones((ROWS, NEW), jnp.int32)
        prompt_mask = jnp.ones((ROWS, PROMPT), jnp.int32)
        self.batch = Batch(ids[:, :PROMPT], prompt_mask, ids[:, PROMPT:], ones, jnp.asarray(rewards))

    def compose(self) -> Any:
        """The parameter tree with all W', as training makes it: z in one program, the merging in another."""
        z = self._z(self.state.raw, {name: spectrum.s for name, spectrum in self.flat.items()})
        return jax.block_until_ready(merge_params(self.lm.model, self.lm.params, self.flat, z))

    def gradients(self) -> dict[str, np.ndarray]:
        """By weight name, without micro-batches."""
        loss = ReinforceConfig(baseline="none")
        gradient = jax.jit(jax.grad(reinforce_loss, has_aux=True), static_argnames=("model", "family", "cfg"))
        grads = gradient(
            self.state.raw,
            self.flat,
            self.lm.params,
            self.batch,
            model=self.lm.model,
            family=FAMILY,
            cfg=loss,
        )
        return {name: np.asarray(x) for name, x in grads[0].items()}

    def compile(self) -> None:
        """Makes the program of `update`."""
        settings = {"family": FAMILY, "loss": ReinforceConfig(baseline="none"), "cfg": update_config(self.cfg)}
        arguments = self.state, self.spectra, self.lm.params, self.batch
        program = train_step.lower(*arguments, model=self.lm.model, **settings).compile()
        self._program = lambda: program(*arguments)

    def update(self) -> None:
        """One clipped Adam step; the state stays as it was."""
        jax.block_until_ready(self._program())

    def products(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Calls of the bare products of a composition, and of an update on micro-batches that are as large."""
        spectra = list(self.flat.values())
        others = [
            w for w in step_matrices(self.lm) if not any(w.shape == x.u.shape[:1] + x.vt.shape[1:] for x in spectra)
        ]
        head = max(others, key=lambda w: w.size)
        attention = [w for w in others if w is not head]
        rows = {"all": self.cfg.micro_batch * (PROMPT + NEW), "completion": self.cfg.micro_batch * NEW}

        @jax.jit
        def compose(spectra: Any) -> list[jax.Array]:
            return [jnp.matmul(x.u, x.vt, precision="highest") for x in spectra]

        def there_and_back(w: jax.Array, tokens: int) -> list[jax.Array]:
            """The product of so many rows with w, and that of their gradient: each as a row sum, behind a barrier."""
            wide, long = (jnp.ones((1, tokens, size), w.dtype) for size in w.shape)
            forward = jax.lax.optimization_barrier(dot(long, w))
            backward = jax.lax.optimization_barrier(jnp.matmul(wide, w, precision="highest"))
            return [jnp.sum(forward), jnp.sum(backward)]

        @jax.jit
        def update(spectra: Any, attention: Any, head: Any) -> list[Any]:
            matrices = [w for x in spectra for w in (x.u, x.vt)] + attention
            return [there_and_back(w, rows["all"]) for w in matrices] + [there_and_back(head, rows["completion"])]

        def all_updates() -> None:
            for _ in range(ROWS // self.cfg.micro_batch):
                jax.block_until_ready(update(spectra, attention, head))

        return lambda: jax.block_until_ready(compose(spectra)), all_updates


def wait() -> None:
    """Until the device has done what torch asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peer_in(directory: Path) -> Any:
    """transformers' model of a checkpoint."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def problem(lm: LM) -> tuple[dict[str, Spectrum], dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """(spectra, raw, ids [B, T], rewards [B]), from one seed."""
    return drawn(lm, decompose(lm, "mlp", progress=False))


def drawn(lm: LM, spectra: dict[str, Spectrum]) -> tuple[dict[str, Spectrum], dict[str, np.ndarray], Any, Any]:
    """As `problem`, with these spectra."""
    rng = np.random.default_rng(0)
    raw = {name: rng.normal(0.1, 0.01, x.s.shape).astype(np.float32) for name, x in spectra.items()}
    ids = rng.integers(100, lm.model.cfg.vocab_size, (ROWS, PROMPT + NEW))
    return spectra, raw, ids, rng.choice(np.float32([-1, 1]), ROWS)


def peak_gigabytes() -> float:
    """Of this process's resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def held_gigabytes() -> float:
    """Of this process's resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30


def memory(side: str, directory: Path) -> None:
    """Prints by how much one update of a side raises the peak of a process that holds model and spectra."""
    lm = load(str(directory), progress=False)
    parts = problem(lm)
    found = {}
    if side == "ours":
        ours = Ours(lm, *parts)
        before = held_gigabytes()
        ours.compile()
        found["ours, compiling"] = held_gigabytes() - before
        run = ours.update
    else:
        public = Public(peer_in(directory), *parts)
        run = partial(public.update, 1 if side == "public" else ROWS)
    before = held_gigabytes()
    run()
    print(json.dumps(found | {side: peak_gigabytes() - before}))


def seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def medians(sides: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(all times, medians) of the sides, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for _ in range(rounds):
        for name, run in sides.items():
            times[name].append(seconds(run))
            print(f"{name}: {times[name][-1]:.2f} s", file=sys.stderr)
    return times, {name: statistics.median(found) for name, found in times.items()}


def pairing(ours: Ours, public: Public, size: int) -> dict[str, Any]:
    """Gradients compared, then all times."""
    public.gradients(ROWS)
    theirs, mine = {name: x.grad.cpu().numpy() for name, x in public.raw.items()}, ours.gradients()
    error = max(float(np.linalg.norm(mine[k] - theirs[k]) / np.linalg.norm(theirs[k])) for k in mine)
    compose, update = ours.products()
    composed, compose_medians = medians(
        {"sva": ours.compose, "public": public.compose, "products": compose}, 4 * ROUNDS
    )
    updates = {
        "sva": ours.update,
        "public": lambda: public.update(1),
        "public, batched": lambda: public.update(size),
        "products": update,
    }
    updated, update_medians = medians(updates, ROUNDS)
    return {
        "rows": ROWS,
        "tokens": PROMPT + NEW,
        "completion": NEW,
        "micro_batch": ours.cfg.micro_batch,
        "largest_relative_gradient_difference": error,
        "composition": {
            "seconds": composed,
            "ratio": compose_medians["public"] / compose_medians["sva"],
            "share_of_products": compose_medians["products"] / compose_medians["sva"],
        },
        "update": {
            "seconds": updated,
            "ratio": update_medians["public"] / update_medians["sva"],
            "ratio_batched": update_medians["public, batched"] / update_medians["sva"],
            "share_of_products": update_medians["products"] / update_medians["sva"],
        },
        "versions": versions() | {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": command(),
    }


def smollm2() -> dict[str, Any]:
    """On this machine's forms."""
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "model"
        load("smollm2-135m-instruct-q4_1").save(directory)
        added = {}
        for side in ("ours", "public", "batched"):  # before this process holds two models
            call = [sys.executable, __file__, "--memory", side, "--directory", str(directory)]
            printed = subprocess.run(call, capture_output=True, text=True, check=True).stdout
            added |= json.loads(printed.splitlines()[-1])
        lm = load(str(directory))
        parts = problem(lm)
        public, ours = Public(peer_in(directory), *parts), Ours(lm, *parts)
        ours.compile()
    machine = {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "wait_policy": os.environ["OMP_WAIT_POLICY"],
    }
    found = {"model": "smollm2-135m-instruct-q4_1", **machine, **pairing(ours, public, ROWS)}
    return found | {"peak_gigabytes_added": added}


def llama(layers: int) -> dict[str, Any]:
    """On an accelerator, where both sides' memory is counted by the libraries."""
    sys.path.append(str(Path(__file__).parents[1] / "gpu"))
    from llama import peer_of, shaped

    lm = shaped(layers, "float32")
    spectra = {}
    for place, (name, leaf) in enumerate(expected(lm.model.cfg).items()):
        if ".mlp." in name:
            (out, into), key = leaf.shape, jax.random.key(place)
            rank = min(out, into)
            u, vt = (
                jax.random.normal(jax.random.fold_in(key, i), shape) * max(shape) ** -0.5
                for i, shape in enumerate(((out, rank), (rank, into)))
            )
            spectra[name] = Spectrum(u, jnp.linspace(2, 0.1, rank), vt)
    parts = drawn(lm, spectra)
    ours = Ours(lm, *parts, cfg=ON_ACCELERATOR)
    added = {}
    ours.compile()
    if held := jax.devices()[0].memory_stats():
        ours.update()
        added["ours"] = (jax.devices()[0].memory_stats()["peak_bytes_in_use"] - held["bytes_in_use"]) / 2**30
    peer = peer_of(lm)
    for name in spectra:  # which the public way writes to
        peer.get_parameter(name).data = peer.get_parameter(name).data.clone()
    public = Public(peer, *parts)
    if torch.cuda.is_available():
        for side, size in (("public", 1), ("batched", ROWS)):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            public.update(size)
            added[side] = (torch.cuda.max_memory_allocated() - before) / 2**30
    found = {"model": lm.name, "device": jax.devices()[0].device_kind, **pairing(ours, public, ROWS)}
    return found | {"peak_gigabytes_added": added}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--llama", type=int, metavar="LAYERS")
    parser.add_argument("--memory", choices=["ours", "public", "batched"], help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    compile_cache.start()
    if arguments.memory:
        memory(arguments.memory, arguments.directory)
        return
    result = llama(arguments.llama) if arguments.llama else smollm2()
    write_json(Path(__file__).with_name("llama.json" if arguments.llama else "result.json"), result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
