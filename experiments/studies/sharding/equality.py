"""What a mesh changes: loss, gradient, rollout and two passes on 8 host devices beside one device.

    python experiments/studies/sharding/equality.py --scan --form factored
    # SmolLM2; writes result.json here
    python experiments/studies/sharding/equality.py --model toy --output /tmp/toy.json    # heads divide; seconds

One device makes a rollout from a fixed expert with fixed keys. Recorded, it is given to every mesh: loss and gradient
in the expert's raw values are compared, over all of them and for each matrix. Live, every mesh makes the rollout and
the two-pass answer again, from the same rows and keys: tokens are equal up to the first step whose margin (for
sampling, of logits and Gumbel noise) is under 1e-3, and every such step is listed. A mesh whose `tensor` does not
divide the heads (SmolLM2 has 9, and 3 for keys) repeats them, and says so.

With SVA_COORDINATOR, SVA_PROCESSES and SVA_PROCESS set, each process brings its own devices (--devices).
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import sva
from sva.adaptation import two_pass
from sva.adaptation.adaptive_lm import adaptive
from sva.generation.chat import encode, render
from sva.generation.decode import PromptBatch, generate
from sva.generation.lm import LM
from sva.generation.merge import merge_params
from sva.generation.sampling import Greedy, Temperature
from sva.generation.testing import toy_lm
from sva.models import layout
from sva.models.weights import by_name
from sva.parallel import compile_cache, processes, sharding
from sva.parallel.mesh_config import MeshConfig
from sva.spectral.expert import Expert
from sva.spectral.forms import adapters
from sva.spectral.mixing import mixture
from sva.spectral.parametrisations import SIGMOID_NUCLEAR
from sva.training.config.reinforce import ReinforceConfig
from sva.training.reinforce import Batch, reinforce_loss
from sva.utils.files import write_json
from sva.utils.padding import left_pad
from sva.utils.provenance import command, versions

PROMPTS, SAMPLES, NEW = 8, 2, 16
KL_COEFS = (0.0, 0.2)
QUESTIONS = [
    "Name a colour of the rainbow.",
    "What is 7 times 8?",
    "Write one word that rhymes with house.",
    "Which is larger, 91 or 19?",
    "Name a thing in a kitchen.",
    "What is the capital of Italy?",
    "Spell the word boat backwards.",
    "Finish: roses are red, violets are",
]


class Recorded(NamedTuple):
    """What one device found."""

    batch: Batch  # host arrays
    losses: list[float]  # one a KL coefficient
    grads: list[dict[str, np.ndarray]]  # likewise, by weight name
    tokens: np.ndarray  # [B, N]
    answers: np.ndarray  # [B, N]
    probs: np.ndarray  # [B, C], of the first pass


class Setting(NamedTuple):
    """A model on a mesh, and the experts it runs."""

    lm: LM
    spectra: dict[str, Any]
    nested: Any  # the same, as the model's tree
    experts: list[Expert]


class Adapted(NamedTuple):
    """What a rollout and two passes ran on, to score their tokens again."""

    params: Any
    adapter: Any
    serving: two_pass.ServingState
    alphas: np.ndarray  # [B, E_max]


def setting(lm: LM, spectra: dict[str, Any], files: Sequence[Path]) -> Setting:
    """The model with two experts: of these files, or else made, whose values move every component far."""
    experts = [Expert.load(file, fingerprint=lm.fingerprint, base=lm.name) for file in files]
    if experts:
        return Setting(lm, spectra, lm.model.nest(spectra), experts)
    for seed, label in enumerate(("colour", "thing")):
        rng = np.random.default_rng(seed)
        raw = {name: rng.normal(0.1, 0.3, x.s.shape).astype(np.float32) for name, x in spectra.items()}
        experts.append(Expert(raw, "sigmoid_nuclear", {"label": label, "description": f"a {label}"}))
    return Setting(lm, spectra, lm.model.nest(spectra), experts)


def moved(base: Setting, mesh: Mesh) -> Setting:
    """The same on a mesh. Host devices that hold the same array share its memory, so a copied model costs none."""

    def move(tree: Any, leaves: Any) -> Any:
        return sharding.place(jax.tree.map(np.asarray, tree), sharding.shardings(leaves, mesh))

    model, leaves = base.lm.model, layout.spectra(base.lm.model.cfg, base.spectra)
    params, nested = move(base.lm.params, layout.params(model)), move(base.nested, layout.nested(model, leaves))
    spectra = by_name(nested, base.spectra, scan=True) if model.scan_layers else move(base.spectra, leaves)
    lm = dataclasses.replace(base.lm, params=params, mesh=mesh, spectra={} if model.scan_layers else spectra)
    return Setting(lm, spectra, nested, base.experts)


def rollout(at: Setting, ids: np.ndarray, mask: np.ndarray, form: str) -> tuple[Any, Any, Any]:
    """(generation of PROMPTS * SAMPLES rows by the first expert, the params and the adapter that made it)."""
    z = at.experts[0].z(at.spectra)
    params, adapter = at.lm.params, None
    if form == "factored":
        adapter = adapters(at.nested, at.lm.model.nest(z))
    else:
        params = merge_params(at.lm.model, params, at.spectra, z)
    out = generate(
        at.lm.model,
        params,
        PromptBatch(np.repeat(ids, SAMPLES, axis=0), np.repeat(mask, SAMPLES, axis=0), keys(), np.int32(NEW)),
        np.full(4, -1, np.int32),
        adapter,
        max_new_tokens=NEW,
        sampling=Temperature(),
    )
    return processes.to_host(out), params, adapter


def keys() -> jax.Array:
    """One a row."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(PROMPTS * SAMPLES))


@partial(jax.jit, static_argnames=("model", "kl_coef"))
def gradient(raw: Any, spectra: Any, params: Any, batch: Batch, *, model: Any, kl_coef: float) -> Any:
    """(loss, gradients by weight name)."""

    def loss(raw: Any) -> Any:
        cfg = ReinforceConfig(kl_coef=kl_coef, baseline="none")
        return reinforce_loss(model.nest(raw), spectra, params, batch, model=model, family=SIGMOID_NUCLEAR, cfg=cfg)

    (value, _), grads = jax.value_and_grad(loss, has_aux=True)(raw)
    return sharding.repeat_all((value, grads))


def both_passes(at: Setting) -> tuple[two_pass.TwoPass, two_pass.ServingState]:
    """The answers, and what served them."""
    system = adaptive(at.lm, at.experts, progress=False)
    rows = system.rows(QUESTIONS)
    request = two_pass.Request(
        two_pass.TokenBatch(*prompts(at.lm)),
        np.int32(NEW),
        np.full(4, -1, np.int32),
        keys()[:PROMPTS],
        max_new_tokens=NEW,
        sampling=Greedy(),
    )
    out = two_pass.two_pass(system.serving, system.dispatcher, rows, request)
    return processes.to_host(out), system.serving


def prompts(lm: LM) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) of the questions."""
    ids, mask = encode(lm, [render(lm, question) for question in QUESTIONS])
    return left_pad(ids, mask, int(mask.sum(axis=1).max()))


def measure(at: Setting, batch: Batch | None, form: str) -> tuple[Recorded, Adapted]:
    """Everything at one setting; its own rollout is the batch where none is given."""
    ids, mask = prompts(at.lm)
    found, params, adapter = rollout(at, ids, mask, form)
    if batch is None:
        rewards = np.where(np.arange(PROMPTS * SAMPLES) % 3 == 0, 1.0, -1.0).astype(np.float32)
        batch = Batch(ids, mask, found.tokens, np.ones_like(found.tokens), rewards)  # pyright: ignore
    placed = batch
    if at.lm.mesh is not None:
        placed = sharding.place(batch, sharding.shardings(layout.rows(batch), at.lm.mesh))
    raw = {name: jnp.asarray(x) for name, x in at.experts[0].raw.items()}
    found_grads = [gradient(raw, at.nested, at.lm.params, placed, model=at.lm.model, kl_coef=kl) for kl in KL_COEFS]
    losses, grads = zip(*processes.to_host(found_grads), strict=True)
    answer, serving = both_passes(at)
    recorded = Recorded(
        batch, list(map(float, losses)), list(grads), found.tokens, answer.generation.tokens, answer.decision.probs
    )
    return recorded, Adapted(params, adapter, serving, answer.decision.alphas)


def relative(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """L2 norm of the difference over that of b."""
    squares = [(float(np.sum((x - y) ** 2.0)), float(np.sum(y**2.0))) for x, y in zip(a, b, strict=True)]
    return float(np.sqrt(sum(d for d, _ in squares) / sum(n for _, n in squares)))


def margins(lm: LM, on: Adapted, ours: np.ndarray, theirs: np.ndarray, *, sampled: bool) -> list[dict[str, Any]]:
    """Of every row that differs, the first step at which it does, and its margin on one device."""
    ids, mask = prompts(lm)
    steps = []
    for row in np.flatnonzero((ours != theirs).any(axis=1)):
        step = int(np.flatnonzero(ours[row] != theirs[row])[0])
        prompt = row // SAMPLES if sampled else row
        text = np.concatenate([ids[prompt][mask[prompt] > 0], theirs[row][:step]])[None]
        if sampled:
            scores = np.asarray(sva.logits(lm.model, on.params, text, np.ones_like(text), on.adapter))[0, -1]
            scores = scores + np.asarray(jax.random.gumbel(jax.random.fold_in(keys()[row], step), scores.shape))
        else:
            adapter = mixture(on.serving.bank, on.alphas[row : row + 1])
            scores = np.asarray(sva.logits(lm.model, on.serving.params, text, np.ones_like(text), adapter))[0, -1]
        second, first = np.sort(scores)[-2:]
        steps.append({"row": int(row), "step": step, "margin": float(first - second)})
    return steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m-instruct-q4_1")
    parser.add_argument("--meshes", nargs="+", default=["1x1x1", "8x1x1", "2x4x1", "2x2x2"])
    parser.add_argument("--devices", type=int, default=8, help="of this process")
    parser.add_argument("--scan", action="store_true", help="scan the layers")
    parser.add_argument("--form", choices=["dense", "factored"], default="dense", help="of the rollout")
    parser.add_argument("--expert", type=Path, nargs=2, default=[], help="two trained ones, instead of two made ones")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("result.json"))
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    compile_cache.start()
    processes.start()
    with tempfile.TemporaryDirectory() as directory:
        source = arguments.model
        if source == "toy":
            os.environ["SVA_CACHE"] = str(Path(directory) / "cache")
            source = str(Path(directory) / "toy")
            toy_lm().save(source)
        lm = sva.load(source, scan_layers=arguments.scan, progress=False)
        result = compare(lm, arguments.meshes, arguments.form, arguments.expert)
    result |= {
        "model": arguments.model,
        "scan_layers": arguments.scan,
        "rollout": arguments.form,
        "experts": [file.name for file in arguments.expert],
        "processes": jax.process_count(),
    }
    result |= {"devices": jax.device_count(), "versions": versions(), "command": command()}
    if processes.is_writer():
        write_json(arguments.output, result)
        print(json.dumps(result, indent=2))


def compare(lm: LM, meshes: Sequence[str], form: str, files: Sequence[Path]) -> dict[str, Any]:
    """One row a mesh, each beside one device of this process."""
    base = setting(lm, sva.decompose(lm, "mlp", progress=False), files)
    want, on = measure(base, None, form)
    rows = {}
    for name in meshes:
        mesh = sharding.make_mesh(MeshConfig(*map(int, name.split("x"))))
        with jax.set_mesh(mesh):
            at = moved(base, mesh)
            got, _ = measure(at, want.batch, form)
        rows[name] = {
            "kl_coefs": [
                {
                    "kl_coef": kl,
                    "loss": got.losses[i],
                    "loss_difference": abs(got.losses[i] - want.losses[i]) / abs(want.losses[i]),
                    "gradient": relative(list(got.grads[i].values()), list(want.grads[i].values())),
                    "gradient_worst_matrix": max(relative([x], [want.grads[i][n]]) for n, x in got.grads[i].items()),
                }
                for i, kl in enumerate(KL_COEFS)
            ],
            "rollout_rows_differing": margins(base.lm, on, got.tokens, want.tokens, sampled=True),
            "answers_differing": margins(base.lm, on, got.answers, want.answers, sampled=False),
            "first_pass_difference": float(np.abs(got.probs - want.probs).max()),
            "notes": sharding.notes(layout.params(at.lm.model), mesh),
        }
        print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
    return {"losses": want.losses, "rows": PROMPTS * SAMPLES, "new_tokens": NEW, "meshes": rows}


if __name__ == "__main__":
    main()
