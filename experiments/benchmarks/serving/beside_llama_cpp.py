"""`sva serve` beside llama.cpp's server: the same GGUF file, the same clients, the base alone (llama.cpp cannot mix).

    python -m experiments.benchmarks.serving.beside_llama_cpp --llama-python PYTHON [--minutes 2] [--clients 64]

PYTHON has the package xllamacpp, which holds llama.cpp's own HTTP server. Both get 32 rows (llama.cpp: slots) of 512
tokens and two threads, and answer in turn, twice each, on the same machine: greedily, streamed, through the official
client, every prompt with a number that no other has. llama.cpp's cache of prompts is on, as it is by default: it
reads a prompt only from where it differs from the last one of its slot. It computes with the packed 4-bit weights and
activations in 8 bits, sva with weights unpacked to float32 and no cache of prompts.

Written to beside_llama_cpp.json, after every part: answers and tokens a second, seconds to the first token and in all.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai

from experiments.benchmarks.serving.load import COUNTRIES, MODEL, ROWS, TOKENS, Answer, percentiles

LLAMA = """
import importlib.metadata, sys, time, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.n_gpu_layers, p.n_parallel, p.n_threads_http = sys.argv[1], 0, 0, {rows}, 2 * {clients}
p.n_ctx, p.cpuparams.n_threads, p.cpuparams_batch.n_threads = 512 * {rows}, {threads}, {threads}
server = xllamacpp.Server(p)
version = importlib.metadata.version("xllamacpp")
print("serving", "xllamacpp", version, "at", server.listening_address + "/v1", flush=True)
time.sleep(1e6)
"""


@contextlib.contextmanager
def running(words: list[str]) -> Iterator[list[str]]:
    """The line that a server prints when it is ready, in words; the server ends with the block."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        line = next(line for line in server.stdout if line.startswith("serving"))
        try:
            yield line.split()
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                server.kill()


async def client(api: openai.AsyncOpenAI, number: int, turns: range, until: float, answers: list[Answer]) -> None:
    """Asks until time is up; what did not end before that is left out."""
    for turn in turns:
        key = 100_000 + 1_000 * number + turn
        more = " Explain in two sentences." if (number + turn) % 3 == 0 else ""
        country = COUNTRIES[(number + turn) % len(COUNTRIES)]
        text = f"Note the number {key}. What is the capital of {country}? Repeat the number first.{more}"
        started, first, tokens, said = time.monotonic(), 0.0, 0, ""
        stream = await api.chat.completions.create(
            model="base",  # llama.cpp answers with its only model, whatever the name
            messages=[{"role": "user", "content": text}],
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first, said = first or time.monotonic() - started, said + chunk.choices[0].delta.content
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        if time.monotonic() > until:
            return
        answers.append(Answer(key, said, first, time.monotonic() - started, tokens))


async def ask_all(url: str, clients: int, seconds: float, first_turn: int) -> list[Answer]:
    """What a server says to all clients in so many seconds."""
    limits = httpx2.Limits(max_connections=clients + 8)
    async with httpx2.AsyncClient(timeout=600, limits=limits) as inner:
        api = openai.AsyncOpenAI(base_url=url, api_key="none", http_client=inner)
        answers: list[Answer] = []
        until = time.monotonic() + seconds
        turns = range(first_turn, first_turn + 400)
        await asyncio.gather(*(client(api, number, turns, until, answers) for number in range(clients)))
    return answers


def figures(answers: list[Answer], seconds: float) -> dict:
    """The figures of a part."""
    return {
        "answers": len(answers),
        "answers_a_second": len(answers) / seconds,
        "tokens_a_second": sum(answer.tokens for answer in answers) / seconds,
        "first_token_seconds": percentiles([answer.first for answer in answers if answer.first]),
        "total_seconds": percentiles([answer.total for answer in answers]),
        "example": answers[0].text,
    }


def main() -> None:
    from sva.models.hub import resolve
    from sva.utils.files import write_json
    from sva.utils.provenance import command, versions

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", required=True)
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("beside_llama_cpp.json"))
    options = parser.parse_args()
    threads = os.cpu_count()
    program = LLAMA.format(rows=ROWS, threads=threads, clients=options.clients)
    sides = {
        "sva": [sys.executable, "-m", "sva.cli", "serve", "--model", MODEL, "--port", "0", "--rows", str(ROWS)],
        "llama.cpp": [options.llama_python, "-c", program, str(resolve(MODEL))],
    }
    said_command = command().replace(options.llama_python, "PYTHON")  # no path of one machine
    result: dict = {"clients": options.clients, "rows": ROWS, "threads": threads, "parts": []}
    for part in range(2):
        for side, words in sides.items():
            with running(words) as said:
                asyncio.run(ask_all(said[-1], options.clients, 20, 0))
                seconds = 60 * options.minutes
                found = figures(asyncio.run(ask_all(said[-1], options.clients, seconds, 500)), seconds)
            result["parts"].append({"side": side, "part": part, "said": " ".join(said[1:-2]), **found})
            write_json(options.out, result | {"command": said_command, "versions": versions()})
            print(side, found, flush=True)
    for name in ("answers_a_second", "tokens_a_second"):
        mean = {side: sum(x[name] for x in result["parts"] if x["side"] == side) for side in sides}
        result[f"{name}_of_llama_cpp"] = mean["sva"] / mean["llama.cpp"]
        print(name, f"{mean['sva'] / mean['llama.cpp']:.2f} of llama.cpp's")
    write_json(options.out, result | {"command": said_command, "versions": versions()})


if __name__ == "__main__":
    main()
