"""What dropping singular components costs and saves: the shipped experts on SmolLM2-135M-Instruct, by tolerance.

    python experiments/studies/delta/delta.py          # writes result.json and delta.png beside this file

The three experts are one set, as `sva.adaptive` would serve them. For each tolerance (relative to a matrix's largest
singular value): k, the bound on what an expert's change of W loses, the KL divergence of the model
that runs without those components from the exact one (nats a token, over the tokens of GSM8K test questions, or of
procedural prompts where GSM8K is not at hand), the bytes predicted to be read for a token decoded at batch 1, and the
form that the code takes for each matrix by those bytes. `delta` is delta-k in all matrices, `served` what the code
takes. Here components are left out by setting their d to 0, which gives the same numbers: one compiled program does
for all rows.
"""

from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from sva.evaluation import evaluate
from sva.generation import chat
from sva.generation.decompose import spectra_of
from sva.generation.load import load
from sva.generation.logprobs import score
from sva.generation.merge import factored
from sva.models.transformer import apply, positions_of, variables
from sva.parallel import compile_cache
from sva.spectral.expert import Expert
from sva.spectral.forms import delta
from sva.spectral.serving_plan import plan, summary
from sva.tasks import task
from sva.utils.errors import UserError
from sva.utils.files import write_json
from sva.utils.provenance import command, versions

TOLERANCES = (0.0, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2, 1e-1)
PROMPTS = 8


def prompts(lm):
    """(name of the prompts, ids, mask)."""
    for name in ("gsm8k", "other"):
        try:
            found = evaluate.items(task(name), "test", PROMPTS)
        except UserError:
            continue
        return name, *chat.encode(lm, [chat.render(lm, item.question) for item in found])
    raise UserError("neither GSM8K nor the procedural prompts can be read")


def spread(values):
    """Median and largest."""
    return {"median": float(np.median(values)), "max": float(np.max(values))}


def shipped_experts() -> dict:
    """{name: expert} of those in the package, in order of their names."""
    assets = sorted((resources.files("sva") / "assets").iterdir(), key=lambda path: path.name)
    return {path.name.split(".")[0]: Expert.load(str(path)) for path in assets if path.name.endswith(".safetensors")}


class Divergences:
    """KL of models that leave components out from the exact ones, in nats a token, over the same prompts."""

    def __init__(self, lm, spectra, zs) -> None:
        self.lm, self.spectra, self.zs = lm, spectra, zs
        self.source, self.ids, self.mask = prompts(lm)
        ids, mask = self.ids, self.mask

        @jax.jit
        def hidden(params, adapter):
            return apply(lm.model, variables(lm.model, params, adapter), ids, *positions_of(jnp.asarray(mask)))[0]

        @jax.jit
        def divergence(params, found, exact):
            scores = score(
                lambda h: apply(lm.model, {"params": params}, h, method="unembed"), found, jnp.asarray(ids), exact
            )
            return jnp.sum(scores.kl * mask) / mask.sum()

        self._hidden, self._divergence = hidden, divergence
        self._exact = {name: hidden(lm.params, factored(spectra, z)) for name, z in zs.items()}

    def of(self, name, adapter) -> float:
        """Of the model with this adapter, None for the base, from the exact expert of that name."""
        found = self._hidden(self.lm.params, adapter)
        return float(self._divergence(self.lm.params, found, self._exact[name]))

    def of_plans(self, plans) -> dict[str, float]:
        """{expert: nats a token}, with the components that these plans keep."""
        found = {}
        for name, z in self.zs.items():
            adapter = {weight: delta(spectrum, z[weight]) for weight, spectrum in self.spectra.items()}
            for weight, made in plans.items():
                if made.form == "delta":
                    kept = np.zeros(len(self.spectra[weight].s), np.float32)
                    kept[made.components] = 1
                    adapter[weight] = adapter[weight].replace(d=adapter[weight].d * kept)
            found[name] = self.of(name, adapter)
        return found


def main() -> None:
    compile_cache.start()
    lm = load("smollm2-135m-instruct-q4_1")
    experts = shipped_experts()
    names = list(next(iter(experts.values())).raw)
    spectra = spectra_of(lm, names)
    zs = {name: expert.z(spectra) for name, expert in experts.items()}
    divergences = Divergences(lm, spectra, zs)
    kl = divergences.of_plans
    untouched = sum(x.nbytes for x in jax.tree.leaves(lm.params))
    untouched -= sum(spectra[name].u.shape[0] * spectra[name].vt.shape[1] * 4 for name in names)
    rows = []
    for tolerance in TOLERANCES:
        served = plan(spectra, list(zs.values()), tolerance)
        deltas = plan(spectra, list(zs.values()), tolerance, exact_base=True)
        bytes_of = {
            form: untouched + sum(x.token_bytes[form] for x in served.values())
            for form in ("dense", "factored", "delta")
        }
        bytes_of["served"] = untouched + sum(x.token_bytes[x.form] for x in served.values())
        in_delta = [x.form == "delta" for x in served.values()]
        kl_delta = kl(deltas) if tolerance else dict.fromkeys(zs, 0.0)  # nothing is left out
        kl_served = kl_delta if all(in_delta) else kl(served) if any(in_delta) else dict.fromkeys(zs, 0.0)
        rows.append(
            {
                "tolerance": tolerance,
                "k": spread([len(x.components) for x in deltas.values()]),
                "relative_bound": spread([x.losses.max() / x.s_max for x in deltas.values()]),
                "kl_nats_per_token": {"delta": kl_delta, "served": kl_served},
                "bytes_per_token": bytes_of,
                "matrices_in_delta_form": sum(in_delta),
                "says": summary(served),
            }
        )
        print(line(rows[-1]), flush=True)
    result = {
        "model": lm.name,
        "experts": list(zs),
        "matrices": len(names),
        "prompts": {
            "task": divergences.source,
            "rows": len(divergences.ids),
            "tokens": int(divergences.mask.sum()),
        },
        "kl_of_the_base": {name: divergences.of(name, None) for name in zs},
        "rows": rows,
        "versions": versions(),
        "command": command(),
    }
    write_json(Path(__file__).with_name("result.json"), result)
    draw(result, Path(__file__).with_name("delta.png"))
    print("KL of the base from each expert: ", {name: f"{x:.3f}" for name, x in result["kl_of_the_base"].items()})


def line(row) -> str:
    """A row of the table: means over the experts for KL, bytes relative to merged weights."""
    kl = {name: np.mean(list(found.values())) for name, found in row["kl_nats_per_token"].items()}
    read = {form: size / row["bytes_per_token"]["dense"] for form, size in row["bytes_per_token"].items()}
    k, bound = row["k"], row["relative_bound"]
    return (
        f"tolerance {row['tolerance']:.0e} | k {k['median']:.0f} (max {k['max']:.0f}) | bound {bound['max']:.1e} | "
        f"KL delta {kl['delta']:.1e} served {kl['served']:.1e} | bytes: factored {read['factored']:.3f} "
        f"delta {read['delta']:.3f} served {read['served']:.3f} | {row['matrices_in_delta_form']} in delta form"
    )


def draw(result, path) -> None:
    """KL against predicted bytes a token, one point a tolerance."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name in result["experts"]:
        points = [
            (x["bytes_per_token"]["delta"] / x["bytes_per_token"]["dense"], x["kl_nats_per_token"]["delta"][name])
            for x in result["rows"]
            if x["tolerance"]
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{name}, delta-k")
    first = result["rows"][0]["bytes_per_token"]
    axes.axvline(first["factored"] / first["dense"], color="k", ls="--", label="factored: exact")
    axes.set(xlabel="predicted bytes a token, relative to merged", ylabel="KL to exact (nats a token)", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
