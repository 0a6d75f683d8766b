"""lm-evaluation-harness three ways on an adapted model: `hf` on the merged checkpoint, sva in process, sva's server.

    python experiments/benchmarks/lm_eval/three_ways.py    # extras `bench` and `serve`; SVA_DATA holds the tasks

ARC-Easy (200 questions, likelihood) and GSM8K (100 questions, five examples, generation) as the harness defines them,
from local files; SmolLM2-135M-Instruct with the packaged expert for last words, float32. The harness is unmodified and
runs in a process of its own for each way and task: it makes its model, answers some of the questions, so that programs
are compiled, and then all of them, which is timed. Every choice and every answer is compared with those of `hf`;
result.json beside this file holds the times and each answer that differs.
"""

import argparse
import gzip
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

import sva
from sva.parallel import compile_cache
from sva.utils.files import write_json
from sva.utils.provenance import command, versions

MODEL = "smollm2-135m-instruct-q4_1"
EXPERT = Path(sva.__file__).parent / "assets/list_last.safetensors"
TASKS = {"arc_easy": ("arc/arc_easy.yaml", 200), "gsm8k": ("gsm8k/gsm8k.yaml", 100)}
WARM = {"arc_easy": 200, "gsm8k": 40}  # questions that are asked before the clock runs
WAYS = ("hf", "sva", "server")
HERE = Path(__file__).parent


def write_tasks(directory: Path) -> None:
    """The harness's own definitions, reading the files of SVA_DATA."""
    data = Path(os.environ["SVA_DATA"])
    for name, (shipped, _) in TASKS.items():
        files = {}
        for split in ("train", "validation", "test"):
            if (source := data / f"{name}_{split}.jsonl.gz").exists():
                files[split] = directory / f"{name}_{split}.jsonl"
                files[split].write_bytes(gzip.decompress(source.read_bytes()))
        lines = [f"include: {Path(lm_eval.__file__).parent / 'tasks' / shipped}", f"task: {name}_local"]
        lines += ["dataset_path: json", "dataset_name: null", "dataset_kwargs:", "  data_files:"]
        lines += [f"    {split}: {path}" for split, path in files.items()]
        (directory / f"{name}_local.yaml").write_text("\n".join(lines) + "\n")


@contextmanager
def server(log: Path) -> Iterator[int]:
    """A running `sva serve` of the model and its expert: its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = [sys.executable, "-m", "sva.cli.main", "serve", "--model", MODEL, "--expert", str(EXPERT)]
    with log.open("w") as file:
        process = subprocess.Popen([*call, "--port", str(port)], stdout=file, stderr=file)
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").read()
                    break
                except OSError:
                    if process.poll() is not None:
                        raise SystemExit(f"the server ended: {log.read_text()}") from None
                    time.sleep(0.5)
            yield port
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def arguments_of(way: str, checkpoint: Path, port: int) -> tuple[str, dict[str, Any]]:
    """The name of the harness's model for a way, and its arguments."""
    if way == "hf":
        return "hf", {"pretrained": str(checkpoint), "dtype": "float32", "device": "cpu", "batch_size": 16}
    if way == "sva":
        return "sva", {"pretrained": MODEL, "expert": str(EXPERT)}
    about = {"tokenizer_backend": "huggingface", "tokenizer": str(checkpoint), "max_length": 8192}
    address = f"http://127.0.0.1:{port}/v1/completions"
    return "local-completions", {"base_url": address, "model": EXPERT.stem, "num_concurrent": 16, **about}


def evaluate(pipe: Connection, model: str, settings: Mapping[str, Any], task: str, limit: int, tasks: Path) -> None:
    """Sends, from a process of its own, (seconds until the model is ready, seconds of the questions, their records)."""
    if model == "sva":
        compile_cache.start()
        importlib.import_module("sva.serving.lm_eval")  # registers the name
    started = time.perf_counter()
    lm = get_model(model)(**settings)
    ready = time.perf_counter() - started
    about: Any = {"model": lm, "tasks": [f"{task}_local"], "bootstrap_iters": 0}
    about["task_manager"] = TaskManager(include_path=str(tasks))
    lm_eval.simple_evaluate(**about, limit=min(WARM[task], limit))
    started = time.perf_counter()
    found = lm_eval.simple_evaluate(**about, limit=limit)
    seconds = time.perf_counter() - started
    assert found is not None
    samples = [{key: each[key] for key in ("doc_id", "resps")} for each in found["samples"][f"{task}_local"]]
    pipe.send((ready, seconds, sorted(samples, key=lambda each: each["doc_id"])))


def apart(*arguments: Any) -> tuple[float, float, list[Mapping[str, Any]]]:
    """What `evaluate` sends, from a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=evaluate, args=(theirs, *arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit(f"the harness ended with its task open: {arguments[0]}, {arguments[2]}") from None
    finally:
        process.join()


def answer(record: Mapping[str, Any]) -> Any:
    """The option chosen, or the text."""
    replies = record["resps"]
    if len(replies) == 1:
        return replies[0][0]
    scores = [float(reply[0][0]) for reply in replies]
    return scores.index(max(scores))


def differences(records: list, others: list) -> list[dict[str, Any]]:
    """Each question whose answer is not the one of `hf`, with how close its two best options were."""
    found = []
    for record, other in zip(records, others, strict=True):
        if answer(record) != answer(other):
            entry = {"doc_id": record["doc_id"], "hf": answer(record), "answer": answer(other)}
            if len(record["resps"]) > 1:
                best = sorted((float(reply[0][0]) for reply in record["resps"]), reverse=True)
                entry["margin_nats"] = best[0] - best[1]
            found.append(entry)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="questions of each task (default: 200 and 100)")
    parser.add_argument("--out", type=Path, default=HERE / "result.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"model": MODEL, "expert": EXPERT.stem, "versions": versions(), "command": command()}
    result |= {"lm_eval": lm_eval.__version__, "cores": os.cpu_count(), "tasks": {}}
    with tempfile.TemporaryDirectory() as directory, server(Path(directory) / "server.log") as port:
        lm = sva.load(MODEL)
        expert = sva.Expert.load(EXPERT)
        frozen = sva.frozen(lm, expert)
        checkpoint = Path(directory) / "merged"
        sva.merge(lm, frozen, expert.z(frozen)).save(checkpoint)
        del lm, frozen
        write_tasks(Path(directory))
        for task, (_, questions) in TASKS.items():
            limit, found = arguments.limit or questions, {}
            about: dict[str, Any] = {"questions": limit, "seconds": {}, "seconds_until_ready": {}}
            for way in WAYS:
                asked = *arguments_of(way, checkpoint, port), task, limit, Path(directory)
                about["seconds_until_ready"][way], about["seconds"][way], found[way] = apart(*asked)
                print(f"{task} {way}: {about['seconds'][way]:.1f} s", flush=True)
            about["times_hf"] = {way: about["seconds"]["hf"] / each for way, each in about["seconds"].items()}
            about["other_answers"] = {way: differences(found["hf"], rows) for way, rows in found.items()}
            result["tasks"][task] = about
            write_json(arguments.out, result)
    print(json.dumps(result["tasks"], indent=2))


if __name__ == "__main__":
    main()
