"""Requests made up from the server's own OpenAPI page, by schemathesis: none may end it, hang, or be answered with 5xx.

    python -m experiments.benchmarks.serving.fuzz --schemathesis ST [--cases 5000] [--seed 0]

ST is the program `st` of the package schemathesis, which is not among this project's. The server is the toy model with
two random experts: what is tried is the reading of requests, not the answers. A status of 500 and above fails, and a
body that is not what the page says, and a request that takes over 30 seconds. fuzz.json has the number of cases, what
failed, and the statuses by path; a failure, or fewer cases than were asked for, also makes this exit with 1.
"""

import argparse
import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np

CHECKS = "not_a_server_error,content_type_conformance,response_schema_conformance"
OPERATIONS = 8  # of the page with many different requests
LIMITS = ("--max-tokens", "16", "--timeout", "20", "--rows", "4", "--context", "256")


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """The address of a server of the toy model, which ends with the block."""
    from sva.generation.testing import toy_lm
    from sva.models.weights import expected
    from sva.spectral.expert import Expert
    from sva.utils.trees import select

    lm = toy_lm()
    lm.save(folder / "toy")
    words = [sys.executable, "-m", "sva.cli", "serve", "--model", str(folder / "toy"), "--port", "0", *LIMITS]
    for seed, name in enumerate(("red", "boat")):
        rng = np.random.default_rng(seed)
        raw = {weight: rng.uniform(0.5, 1.5, 32).astype(np.float32) for weight in select(expected(lm.model.cfg), "mlp")}
        Expert(raw, "linear", {"fingerprint": lm.fingerprint, "label": name}).save(folder / f"{name}.safetensors")
        words += ["--expert", str(folder / f"{name}.safetensors")]
    log = (folder / "log").open("w+")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            if not line:
                raise SystemExit((folder / "log").read_text())
            yield line.split()[-1].removesuffix("/v1")
            if process.poll() is not None:
                raise SystemExit(f"the server ended: {(folder / 'log').read_text()[-2000:]}")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def statuses(url: str) -> dict[str, dict[str, int]]:
    """How many requests of each path were answered with each status, as the server counted them."""
    found: dict[str, dict[str, int]] = {}
    text = httpx2.get(f"{url}/metrics", timeout=30).text
    for path, status, count in re.findall(
        r'^sva_requests_total{path="(.*)",status="(\d+)"} (\S+)$', text, re.MULTILINE
    ):
        found.setdefault(path, {})[status] = int(float(count))
    return found


def main() -> None:
    from sva.utils.files import write_json
    from sva.utils.provenance import command, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemathesis", required=True)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("fuzz.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, server(Path(place)) as url:
        report = Path(place) / "report.json"
        program = Path(shutil.which(options.schemathesis) or sys.exit(f"no program {options.schemathesis}")).absolute()
        words = [str(program), "run", f"{url}/openapi.json", "--checks", CHECKS, "--request-timeout", "30"]
        words += ["--phases", "coverage,fuzzing", "--max-examples", str(-(-options.cases // OPERATIONS))]
        words += ["--seed", str(options.seed), "--continue-on-failure", "--suppress-health-check", "all"]
        words += ["--report", "json", "--report-json-path", str(report), "--no-color"]
        subprocess.run(words, check=False, cwd=place)  # schemathesis keeps a cache of its own there
        found = json.loads(report.read_text())
        kept = ("schemathesis_version", "running_time", "stop_reason", "operations", "test_cases", "failures", "errors")
        result = {name: found[name] for name in kept} | {"statuses": statuses(url)}
    said_command = command().replace(options.schemathesis, "ST")  # no path of one machine
    write_json(options.out, result | {"command": said_command, "versions": versions()})
    failed = result["failures"] or result["errors"] or found["test_cases"]["generated"] < options.cases
    served = [status for by in result["statuses"].values() for status in by if status >= "500"]
    print(result["test_cases"], "statuses of 500 and above:", served)
    sys.exit(bool(failed or served))


if __name__ == "__main__":
    main()
