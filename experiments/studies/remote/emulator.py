"""A model, spectra and a run in a bucket, through gcsfs and over HTTP: against an emulator of Google Cloud Storage.

    pip install gcsfs gcp-storage-emulator
    python experiments/studies/remote/emulator.py      # prints what it finds; minutes

The tests of `sva.utils.remote` lay gs:// in a folder; this shows that gcsfs does what they suppose. A toy model is
loaded from the bucket, decomposed into it, trained in it, lost after two steps, and trained to the end by another
process.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PORT = 9023
RUN = "gs://bucket/runs/one"


def main() -> None:
    from gcp_storage_emulator.server import create_server  # pyright: ignore[reportMissingImports]

    from sva.spectral.expert import Expert
    from sva.training import metrics
    from sva.utils.remote import to_path

    os.environ["STORAGE_EMULATOR_HOST"] = f"http://localhost:{PORT}"
    with tempfile.TemporaryDirectory() as folder:
        server = create_server("localhost", PORT, in_memory=False, default_bucket="bucket", data_dir=folder)
        server.start()
        try:
            weights(Path(folder))
            run(Path(folder), RUN, lose_it=True)
            print("lost:", [row["step"] for row in metrics.read(to_path(RUN) / "metrics.jsonl")])
            run(Path(folder), RUN, lose_it=False)
            print("to its end:", [row["step"] for row in metrics.read(to_path(RUN) / "metrics.jsonl")])
            here = f"{folder}/here"
            run(Path(folder), here, lose_it=False)
            one, other = (Expert.load(f"{place}/expert.safetensors").digest for place in (RUN, here))
            print("the expert of a run that was not lost:", one == other)
        finally:
            server.stop()


def weights(folder: Path) -> None:
    """Sends a model to the bucket, loads it from there, and decomposes it into the bucket."""
    import sva
    from sva.generation.testing import toy_lm
    from sva.utils.remote import to_path, upload

    toy = toy_lm()
    toy.save(folder / "model")
    for file in (folder / "model").iterdir():
        upload(file, to_path("gs://bucket/model") / file.name)
    lm = sva.load("gs://bucket/model", progress=False)
    print("the same weights:", lm.fingerprint == toy.fingerprint)
    os.environ["SVA_SPECTRA"] = "gs://bucket/spectra"
    spectra = sva.decompose(lm, progress=False)
    (directory,) = to_path("gs://bucket/spectra").iterdir()
    print("spectra there:", len(spectra), "files:", len(list(directory.iterdir())))


def run(folder: Path, run_dir: str, *, lose_it: bool) -> None:
    """Trains four steps in a process of its own; one that is lost is killed when two of them are in the bucket."""
    from sva.generation.testing import THINGS
    from sva.utils.remote import to_path

    task = folder / "red.jsonl"
    lines = [{"prompt": f"what colour the {a} of the {b} ?", "answer": "red red"} for a in THINGS for b in THINGS[:4]]
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = folder / "config.yaml"
    config.write_text("model: gs://bucket/model\nrollout: {prompts: 4, samples: 2, max_new_tokens: 4}\n")
    words = [f"task={task}", "train.steps=4", "reinforce.baseline=none", "evaluate.size=3", f"run_dir={run_dir}"]
    call = [sys.executable, "-m", "sva.cli.main", "train", str(config), *words]
    said = folder / "stderr.txt"
    with said.open("w") as stream:
        process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=stream)
    listed = to_path(run_dir) / ".sva-files"
    while lose_it and process.poll() is None:
        if listed.exists() and "state/2/" in listed.read_text():
            process.kill()
        time.sleep(0.05)
    if process.wait() != (-9 if lose_it else 0):
        sys.exit(f"exit code {process.returncode}: {said.read_text()[-2000:]}")


if __name__ == "__main__":
    main()
