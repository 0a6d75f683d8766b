"""Mixed load on `sva serve`: 64 clients at once, each with a mixture of its own, while experts come and go.

    python experiments/benchmarks/serving/load.py [--minutes 10] [--clients 64]    # extra `bench` is not needed

SmolLM2-135M-Instruct with the shipped experts, 32 rows. Every client asks its own prompts in turn, greedily, streaming,
through the official client; each prompt carries a number that no other has. Beside them six tasks load an expert each,
mix another, ask it, and drop both, again and again. Before that the offline engine (`sva.complete`) answers the same
prompts under the same mixtures on as many rows: what the server says must be the same tokens, but where the two
likeliest are closer than the margin rule's 1e-3 (DESIGN.md, section 10), and its tokens a second are set beside the
engine's.

Written to result.json: errors, answers that differ, answers with a foreign number, seconds to the first token and in
all (median, 99 %), tokens a second of both, the server's memory every few seconds, and how many programs it compiled
while the load ran after everybody had asked everything once.
"""

import argparse
import asyncio
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import httpx2
import numpy as np
import openai

ROOT = Path(__file__).resolve().parents[3]
MODEL, EXPERTS = "smollm2-135m-instruct-q4_1", ("capitals", "list_last")
ROWS, PROMPTS, TOKENS, MARGIN, CHURNING = 32, 2, 48, 1e-3, 6
COUNTRIES = ("Switzerland", "France", "Peru", "Japan", "Kenya", "Norway", "Chile", "Egypt")


class Ask(NamedTuple):
    """One prompt of one client."""

    client: int
    number: str  # that no other prompt has
    text: str
    mixture: dict[str, float]


def asks(clients: int) -> list[Ask]:
    """The prompts of all clients."""
    rng = np.random.default_rng(0)
    found = []
    for client in range(clients):
        mixture = {name: round(float(rng.uniform(0, 1)), 3) for name in EXPERTS}
        for place in range(PROMPTS):
            number = str(100_000 + 7 * (client * PROMPTS + place))
            country = COUNTRIES[(client + place) % len(COUNTRIES)]
            more = " Explain in two sentences." if (client + place) % 3 == 0 else ""
            text = f"Note the number {number}. What is the capital of {country}? Repeat the number first.{more}"
            found.append(Ask(client, number, text, mixture))
    return found


class Offline(NamedTuple):
    """What the engine says to the prompts."""

    texts: list[str]
    margins: list[list[float]]  # of each answer's tokens: between the two likeliest, nats
    tokens: list[int]
    seconds: float


def offline(questions: list[Ask]) -> Offline:
    """The engine's answers, timed once everything is compiled."""
    import sva
    from sva.generation import chat
    from sva.generation.complete import CompleteOptions, Mixtures, complete
    from sva.generation.engine import EngineConfig
    from sva.parallel import compile_cache
    from sva.serving import run
    from sva.serving.worker import WorkerConfig
    from sva.spectral.expert import Expert

    compile_cache.start()
    lm = sva.load(MODEL, progress=False)
    experts = {name: Expert.load(ROOT / f"sva/assets/{name}.safetensors") for name in EXPERTS}
    bank = run.make_worker(lm, "base", experts, None, 15, WorkerConfig(rows=ROWS)).bank
    alphas = np.stack([bank.hold(ask.mixture).alphas for ask in questions])
    prompts = chat.tokenize(lm, [chat.render(lm, ask.text) for ask in questions])
    options = CompleteOptions(mixtures=Mixtures(bank.tree, alphas), engine=EngineConfig(rows=ROWS))
    for _ in range(2):
        started = time.perf_counter()
        found = sorted(complete(lm, prompts, TOKENS, options=options))
        seconds = time.perf_counter() - started
    margins = []
    for one, ids, row in zip(found, prompts, questions, strict=True):
        whole = np.asarray([[*ids, *one.tokens[:-1]]])
        logits = np.asarray(lm.logits(whole, np.ones_like(whole), z=bank.mixed(row.mixture)))[0, len(ids) - 1 :]
        best = np.sort(logits, axis=-1)
        margins.append((best[:, -1] - best[:, -2]).tolist())
    return Offline([one.text for one in found], margins, [len(one.tokens) for one in found], seconds)


class Answer(NamedTuple):
    """What the server said to one ask."""

    place: int  # of the ask
    text: str
    first: float  # seconds to the first text
    total: float
    tokens: int


async def client_loop(api, questions: list[Ask], places: list[int], until: float, answers: list, errors: list) -> None:
    """Asks its prompts in turn until time is up, each at least once."""
    turn = 0
    while turn < len(places) or time.monotonic() < until:
        place = places[turn % len(places)]
        ask, started, first, text, tokens = questions[place], time.monotonic(), 0.0, "", 0
        turn += 1
        try:
            stream = await api.chat.completions.create(
                model="base",
                messages=[{"role": "user", "content": ask.text}],
                max_tokens=TOKENS,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"mixture": ask.mixture},
            )
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    first = first or time.monotonic() - started
                    text += chunk.choices[0].delta.content
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            answers.append(Answer(place, text, first, time.monotonic() - started, tokens))
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")


async def churn(api, http, number: int, until: float, errors: list) -> int:
    """Loads, mixes, asks and drops experts of its own until time is up; how many rounds that were."""
    rounds, late, remixed = 0, f"late{number}", f"remixed{number}"
    content = (ROOT / "sva/assets/capitals.safetensors").read_bytes()
    while time.monotonic() < until:
        try:
            weights = {late: round(rounds % 10 / 10, 1), "list_last": 0.5}
            (await http.put(f"/v1/experts/{late}", content=content)).raise_for_status()
            (await http.post("/v1/experts", json={"name": remixed, "mixture": weights})).raise_for_status()
            message = [{"role": "user", "content": "What is the capital of Italy?"}]
            await api.chat.completions.create(model=remixed, messages=message, max_tokens=8, temperature=0)
            for name in (remixed, late):
                (await http.delete(f"/v1/experts/{name}")).raise_for_status()
            rounds += 1
        except Exception as error:
            errors.append(f"churn: {type(error).__name__}: {error}")
        await asyncio.sleep(0.1)
    return rounds


async def watch(pid: int, until: float) -> list[float]:
    """The process's resident memory in MiB, now and then."""
    found = []
    while time.monotonic() < until:
        status = Path(f"/proc/{pid}/status").read_text()
        found.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024)
        await asyncio.sleep(5)
    return found


async def compiled(http) -> int:
    """Programs that the server has asked XLA for."""
    return int(float(re.search(r"sva_compiled_programs_total ([\d.e+]+)", (await http.get("/metrics")).text)[1]))


async def load(url: str, pid: int, questions: list[Ask], clients: int, minutes: float) -> dict:
    """What came of the load."""
    limits = httpx2.Limits(max_connections=clients + 8)
    http = httpx2.AsyncClient(base_url=url.removesuffix("/v1"), timeout=600, limits=limits)
    inner = httpx2.AsyncClient(timeout=600, limits=limits)
    api = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, http_client=inner)
    places = [[place for place, ask in enumerate(questions) if ask.client == client] for client in range(clients)]

    async def all_clients(until: float, answers: list, errors: list) -> None:
        await asyncio.gather(*(client_loop(api, questions, own, until, answers, errors) for own in places))

    warm_errors: list[str] = []
    await churn(api, http, 0, time.monotonic() + 1, warm_errors)
    await all_clients(0.0, [], warm_errors)
    before = await compiled(http)
    answers, errors, started = [], list(warm_errors), time.monotonic()
    until = started + 60 * minutes
    changes = [churn(api, http, number, until, errors) for number in range(CHURNING)]
    memory, _, *rounds = await asyncio.gather(watch(pid, until), all_clients(until, answers, errors), *changes)
    seconds = time.monotonic() - started
    return {
        "answers": answers,
        "errors": errors,
        "seconds": seconds,
        "rounds_of_churn": sum(rounds),
        "memory_mib": [round(x) for x in memory],
        "compiled_meanwhile": await compiled(http) - before,
    }


def compared(answers: list[Answer], questions: list[Ask], engine: Offline) -> dict:
    """How the server's answers compare with the engine's."""
    numbers = {ask.number for ask in questions}
    same, near, wrong, foreign = 0, 0, [], 0
    for answer in answers:
        ask, said = questions[answer.place], engine.texts[answer.place]
        foreign += any(number in answer.text for number in numbers - {ask.number})
        if answer.text == said:
            same += 1
        elif min(engine.margins[answer.place]) < MARGIN:
            near += 1
        else:
            wrong.append({"ask": ask.text, "server": answer.text, "engine": said})
    return {"same": same, "differ_within_margin": near, "differ": wrong, "with_a_foreign_number": foreign}


def percentiles(values: list[float]) -> dict[str, float]:
    """Median and 99 %."""
    return {"p50": round(statistics.median(values), 3), "p99": round(float(np.quantile(values, 0.99)), 3)}


def main() -> None:
    from sva.utils.files import write_json
    from sva.utils.provenance import command, versions

    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("result.json"))
    options = parser.parse_args()
    questions = asks(options.clients)
    engine = offline(questions)
    print(f"offline: {sum(engine.tokens) / engine.seconds:.1f} tokens/s", flush=True)
    experts = [word for name in EXPERTS for word in ("--expert", str(ROOT / f"sva/assets/{name}.safetensors"))]
    words = [sys.executable, "-m", "sva.cli", "serve", "--model", MODEL, *experts, "--port", "0", "--rows", str(ROWS)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        url = server.stdout.readline().split()[-1]
        found = asyncio.run(load(url, server.pid, questions, options.clients, options.minutes))
        server.send_signal(signal.SIGTERM)
        ended = server.wait(timeout=60)
    answers: list[Answer] = found.pop("answers")
    drawn = sum(answer.tokens for answer in answers)
    result = {"clients": options.clients, "rows": ROWS, "answers": len(answers), "exit": ended, **found}
    result |= compared(answers, questions, engine)
    result["first_token_seconds"] = percentiles([answer.first for answer in answers if answer.first])
    result["total_seconds"] = percentiles([answer.total for answer in answers])
    rate, alone = drawn / result["seconds"], sum(engine.tokens) / engine.seconds
    result |= {"tokens_a_second": rate, "offline_tokens_a_second": alone, "part_of_offline": rate / alone}
    write_json(options.out, result | {"command": command(), "versions": versions()})
    for name in ("answers", "errors", "differ", "with_a_foreign_number", "compiled_meanwhile", "rounds_of_churn"):
        print(name, result[name] if name != "differ" else len(result[name]))
    print(result["first_token_seconds"], result["total_seconds"], f"{rate:.1f} tokens/s, {rate / alone:.2f} of offline")


if __name__ == "__main__":
    main()
