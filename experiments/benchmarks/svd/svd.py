"""Decomposition beside torch.svd, which the public code runs in float32: medians, ratios, errors of both.

    python experiments/benchmarks/svd/svd.py  # extra `bench`; about 10 minutes; writes result.json beside this file
    python experiments/benchmarks/svd/svd.py smollm2        # one part: smollm2, large, spectra, routes, experts

smollm2   its 90 mlp matrices; sva one after another on all threads as torch does, and as the store runs it: one matrix
          a core, on one thread each
large     4096 x 14336, Llama-3-8B's down_proj, random
spectra   576 x 1536 with condition 1e8, half the rank, repeated values, zeros
routes    LAPACK's gesdd in float64 and two float32 routes by JAX, as an accelerator would run them, on four shapes
experts   the shipped experts merged by these spectra and by gesdd's: difference over the change that they make
device    where there is a GPU: Llama-3-8B's shapes, random; sva, which has the first round made there, the same on the
          host alone, and torch.svd there; copies there and back are in the times

Both sides run in one process and in turn, on the same number of threads. Errors are measured in float64: relative
reconstruction (Frobenius), max abs(U^T U - I), max abs(V^T V - I), and max abs(s - LAPACK's float64 s) / s_max.
"""

import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from sva.generation.load import load
from sva.models.checkpoint_formats import open_checkpoint
from sva.models.hub import resolve
from sva.spectral import svd as implementation
from sva.spectral.expert import Expert
from sva.spectral.forms import Spectrum
from sva.spectral.svd import orthogonality_errors, reconstruction_error, svd
from sva.utils.files import write_json
from sva.utils.provenance import command, versions
from sva.utils.trees import select

MODEL = "smollm2-135m-instruct-q4_1"
RESULT = Path(__file__).with_name("result.json")
CORES = len(os.sched_getaffinity(0))


def torch_svd(w: np.ndarray) -> Spectrum:
    u, s, v = torch.svd(torch.from_numpy(w))
    return Spectrum(u.numpy(), s.numpy(), np.ascontiguousarray(v.numpy().T))


def gesdd(w: np.ndarray) -> Spectrum:
    u, s, vt = scipy.linalg.svd(w.astype(np.float64), full_matrices=False, check_finite=False)
    return Spectrum(*(np.ascontiguousarray(x, np.float32) for x in (u, s, vt)))


@jax.jit
def float32_gram(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a wide w, by eigenvectors of w w^T in float32."""
    values, u = jnp.linalg.eigh(jnp.matmul(w, w.T, precision="highest"))
    u, s = u[:, ::-1], jnp.sqrt(jnp.maximum(values[::-1], 0))
    return u, s, jnp.matmul(u.T, w, precision="highest") / s[:, None]


@jax.jit
def float32_qdwh(w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a wide w, by the polar decomposition of its transpose and eigenvectors of the symmetric factor, in float32."""
    polar, h, *_ = jax.lax.linalg.qdwh(w.T)
    values, v = jnp.linalg.eigh(h)
    v = v[:, ::-1]
    return v, values[::-1], jnp.matmul(polar, v, precision="highest").T


def jax_route(route):
    return lambda w: Spectrum(*map(np.asarray, route(jnp.asarray(w))))


def errors(w: np.ndarray, spectrum: Spectrum, true: np.ndarray) -> dict[str, float]:
    u, v = orthogonality_errors(spectrum)
    s = float(np.abs(spectrum.s - true).max() / true[0]) if true[0] else float(np.abs(spectrum.s).max())
    return {"relative": reconstruction_error(w, spectrum), "u": u, "v": v, "s": s}


def worst(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: max(one[key] for one in found) for key in found[0]}


def true_values(w: np.ndarray) -> np.ndarray:
    return scipy.linalg.svdvals(w.astype(np.float64), check_finite=False)


def timed(runs: dict, rounds: int, base: str) -> dict:
    """Seconds of each round, in turn; medians; and how many times faster than `base` each one is."""
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratios = {name: medians[base] / median for name, median in medians.items() if name != base}
    return {"seconds": times, "median_seconds": medians, f"times_faster_than_{base}": ratios}


def mlp_weights() -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(resolve(MODEL))
    return {name: checkpoint.read(name).astype(np.float32) for name in select(checkpoint.shapes, "mlp")}


def smollm2() -> dict:
    weights = list(mlp_weights().values())

    def side_by_side() -> None:
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(CORES) as pool:
            list(pool.map(svd, weights))

    runs = {
        "torch.svd": lambda: [torch_svd(w) for w in weights],
        "sva, one after another": lambda: [svd(w) for w in weights],
        "sva, as the store runs it": side_by_side,
    }
    result = timed(runs, 3, "torch.svd")
    true = [true_values(w) for w in weights]
    spectra = [svd(w) for w in weights]
    for name, found in (("sva", spectra), ("torch.svd", map(torch_svd, weights))):
        result[f"worst_errors_{name}"] = worst([errors(*one) for one in zip(weights, found, true, strict=True)])
    result["smallest_s_over_largest"] = float(min(s[-1] / s[0] for s in true))
    started = time.perf_counter()
    for w, spectrum in zip(weights, spectra, strict=True):
        reconstruction_error(w, spectrum)
        orthogonality_errors(spectrum)
    return result | {"matrices": len(weights), "measuring_errors_seconds": time.perf_counter() - started}


def large() -> dict:
    w = np.random.default_rng(0).standard_normal((4096, 14336), np.float32) * np.float32(0.02)
    last = {}
    runs = {
        "torch.svd": lambda: last.update(torch=torch_svd(w)),
        "sva": lambda: last.update(sva=svd(w)),
    }
    result = timed(runs, 2, "torch.svd")
    true = true_values(w)
    return result | {"errors_sva": errors(w, last["sva"], true), "errors_torch.svd": errors(w, last["torch"], true)}


def spectra() -> dict:
    rng, size = np.random.default_rng(0), 576
    u, v = (np.linalg.qr(rng.standard_normal((n, size))).Q for n in (size, 1536))
    kinds = {
        "condition 1e8, log-uniform": np.logspace(0, -8, size),
        "half the rank": np.where(np.arange(size) < size // 2, 1.0, 0.0),
        "repeated values": np.repeat([3.0, 1e-3, 1e-6], size // 3),
        "zeros": np.zeros(size),
    }
    result = {}
    for name, s in kinds.items():
        w = (u * s) @ v.T  # float64 for sva and LAPACK: rounding to float32 fills what is small
        w32 = w.astype(np.float32)
        result[name] = timed({"torch.svd": lambda w=w32: torch_svd(w), "sva": lambda w=w32: svd(w)}, 5, "torch.svd") | {
            "errors_sva": errors(w32, svd(w32), true_values(w32)),
            "errors_sva_float64_input": errors(w, svd(w), true_values(w)),
            "errors_torch.svd": errors(w32, torch_svd(w32), true_values(w32)),
        }
    return result


def routes() -> dict:
    rng = np.random.default_rng(0)
    found = {"SmolLM2 down_proj 0": next(w for name, w in mlp_weights().items() if "down" in name)}
    found |= {f"random {m} x {n}": rng.standard_normal((m, n), np.float32) for m, n in ((192, 576), (576, 576))}
    found["random 2048 x 2048"] = rng.standard_normal((2048, 2048), np.float32)
    result = {}
    for name, w in found.items():
        runs = {
            "gesdd float64": gesdd,
            "sva": svd,
            "float32 gram": jax_route(float32_gram),
            "float32 qdwh": jax_route(float32_qdwh),
        }
        true = true_values(w)
        kept = {route: errors(w, run(w), true) for route, run in runs.items()}  # compiles, too
        times = timed({route: lambda run=run, w=w: run(w) for route, run in runs.items()}, 3, "gesdd float64")
        result[name] = times | {"errors": kept}
    return result


def experts() -> dict:
    lm = load(MODEL)
    weights = mlp_weights()
    ours, theirs = ({name: route(w) for name, w in weights.items()} for route in (svd, gesdd))
    result = {}
    for path in sorted((Path(__file__).parents[3] / "sva" / "assets").glob("*.safetensors")):
        expert = Expert.load(path, fingerprint=lm.fingerprint)
        z, z_theirs = expert.z(ours), expert.z(theirs)
        shares, wrong, total = {}, 0.0, 0.0
        for name in z:
            one, two = (
                (x.u.astype(np.float64) * (x.s * (np.asarray(scale, np.float64) - 1))) @ x.vt.astype(np.float64)
                for x, scale in ((ours[name], z[name]), (theirs[name], z_theirs[name]))
            )
            difference, change = np.sum((one - two) ** 2), np.sum(two**2)
            shares[name] = float(np.sqrt(difference / change))
            wrong, total = wrong + difference, total + change
        largest = max(shares, key=lambda name: shares[name])
        result[path.stem] = {
            "difference_over_change": float(np.sqrt(wrong / total)),
            "largest": {largest: shares[largest]},
            "median": statistics.median(shares.values()),
        }
    return result


def device() -> dict:
    if jax.default_backend() != "gpu":
        raise SystemExit("svd.py device: JAX sees no GPU here; run the other parts")
    result = {"device": jax.devices()[0].device_kind, "host_cores": CORES}
    for shape in ((1024, 4096), (4096, 4096), (4096, 14336)):
        w = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(0.02)
        last = {}

        def there(w=w, last=last) -> None:
            u, s, v = torch.svd(torch.from_numpy(w).cuda())
            last["torch.svd"] = Spectrum(u.cpu().numpy(), s.cpu().numpy(), np.ascontiguousarray(v.cpu().numpy().T))

        def on_host(w=w) -> None:
            with patch.object(implementation, "ON_DEVICE", 1 << 30):
                svd(w)

        svd(w)  # compiles
        torch.svd(torch.ones(8, 16).cuda())
        runs = {"torch.svd": there, "sva": lambda w=w, last=last: last.update(sva=svd(w)), "sva, on the host": on_host}
        found = timed(runs, 1 if shape[1] > 4096 else 3, "torch.svd")
        true = true_values(w)
        found |= {f"errors_{name}": errors(w, spectrum, true) for name, spectrum in last.items()}
        result[" x ".join(map(str, shape))] = found
        print(shape, json.dumps(found), flush=True)
    return result


PARTS = {"smollm2": smollm2, "large": large, "spectra": spectra, "routes": routes, "experts": experts}
ALL = {**PARTS, "device": device}


def main() -> None:
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    blas = [
        f"{x['internal_api']} {x['version']} {x['architecture']}" for x in threadpool_info() if x["user_api"] == "blas"
    ]
    for name in sys.argv[1:] or PARTS:
        found = ALL[name]() | {"threads": {"torch": torch.get_num_threads(), "blas": CORES}, "command": command()}
        found["load_average"] = os.getloadavg()
        found |= {"versions": versions() | {"torch": torch.__version__}, "blas": sorted(set(blas)), "cores": CORES}
        result[name] = found
        write_json(RESULT, result)
        print(json.dumps({name: found}, indent=2), flush=True)


if __name__ == "__main__":
    main()
