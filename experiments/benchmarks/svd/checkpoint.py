"""Memory and time of `sva decompose` on a synthetic Llama checkpoint of 3 GB in 6 shards, killed once and resumed.

    python experiments/benchmarks/svd/checkpoint.py [DIRECTORY]
    # about 3 minutes; writes checkpoint.json here

The checkpoint (seven layers of Llama-2-7B's shapes, bfloat16, random from a seed) is made in DIRECTORY, where it stays
and is used again, or in a temporary one. Anonymous memory is RssAnon of /proc/PID/status, sampled every 10 ms. Three
matrices of the last layer are decomposed: q and k, and down, the largest. The first run is killed (SIGKILL) 3 seconds
after the first of them is finished.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from sva.models.checkpoint_formats import open_checkpoint
from sva.models.config import from_hf
from sva.models.weights import expected
from sva.utils.files import write_json
from sva.utils.provenance import command, versions

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 7,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
SHARDS, TARGETS = 6, r"layers\.6\.(self_attn\.[qk]|mlp\.down)"


def make(directory: Path) -> None:
    """Writes the checkpoint."""
    directory.mkdir(parents=True)
    write_json(directory / "config.json", CONFIG)
    specs = expected(from_hf(CONFIG, "synthetic"))
    total = 2 * sum(int(np.prod(spec.shape)) for spec in specs.values())
    rng, shard, held, number, index = np.random.default_rng(0), {}, 0, 1, {}
    for i, (name, spec) in enumerate(specs.items()):
        weight = rng.standard_normal(spec.shape, np.float32) * np.float32(0.02)
        shard[name] = weight.astype(ml_dtypes.bfloat16)
        held += shard[name].nbytes
        if held * SHARDS >= total * number or i == len(specs) - 1:
            file = f"model-{number:05}-of-{SHARDS:05}.safetensors"
            safetensors.numpy.save_file(shard, directory / file)
            index |= dict.fromkeys(shard, file)
            shard, number = {}, number + 1
    write_json(directory / "model.safetensors.index.json", {"weight_map": index})


def run(arguments: list[str], cache: Path, stop_at: int | None = None) -> dict:
    """`sva decompose`: seconds, peak of RssAnon in MiB, finished files; killed when `stop_at` of them are there."""
    started, peak = time.time(), 0
    child = subprocess.Popen(
        [sys.executable, "-m", "sva.cli.main", "decompose", *arguments],
        env=os.environ | {"SVA_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
    )
    while child.poll() is None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
            peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        except OSError:
            continue  # it has just ended
        if stop_at and len(finished(cache)) >= stop_at:
            time.sleep(3)  # in the z of the next one
            child.send_signal(signal.SIGKILL)
            child.wait()
        time.sleep(0.01)
    printed = child.stdout.read().strip().replace(str(cache), "$SVA_CACHE")
    return {
        "exit_code": child.returncode,
        "seconds": round(time.time() - started, 1),
        "peak_anonymous_mib": round(peak / 1024),
        "finished": len(finished(cache)),
        "printed": printed,
    }


def finished(cache: Path) -> dict[str, int]:
    """When each file of the cache was written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("spectra/*/[!.]*.safetensors")}


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        model, cache = Path(*sys.argv[1:] or [temporary]) / "model", Path(temporary) / "cache"
        if not model.exists():
            make(model)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        assert len(list(model.glob("*.safetensors"))) == SHARDS
        shapes = open_checkpoint(model).shapes
        arguments = [str(model), "--targets", TARGETS]
        killed = run(arguments, cache, stop_at=1)
        before = finished(cache)
        resumed = run(arguments, cache)
        after = finished(cache)
        redone = [name for name, written in before.items() if after[name] != written]
        again = run(arguments, cache)
        manifest = json.loads(next(cache.glob("spectra/*/manifest.json")).read_text())
    result = {
        "checkpoint": {"bytes": size, "shards": SHARDS, "dtype": "bfloat16", "weights": len(shapes)},
        "targets": TARGETS,
        "killed": killed,
        "resumed": resumed,
        "finished_before_the_kill_and_redone": redone,
        "again": again,
        "matrices": [
            {key: record[key] for key in ("name", "shape", "relative_error", "u_error", "v_error")}
            for record in manifest["spectra"]
        ],
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "versions": versions(),
        "command": command(),
    }
    write_json(Path(__file__).with_name("checkpoint.json"), result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
