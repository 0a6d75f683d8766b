"""The rollout engine on SmolLM2-135M-Instruct, float32: a refilled job, label scoring, an expert a row.

    python experiments/benchmarks/engine/engine.py [job] [labels] [experts] [long]    # extra `bench`; default: all

- `job`: 256 GSM8K test questions whose answers have the lengths of lengths.json (uniform, 16 to 256), forced on both
  sides: 32 rows that refill here, batches of 32 in file order there. No end tokens. Ours runs twice, so that the
  second run compiles nothing; tokens are compared by the margin rule (DESIGN.md, section 10).
- `labels`: the first pass over 256 questions after an instruction of 300 tokens, four labels, beside a plain prefill
  of the same questions without any logits.
- `experts`: 32 rows that decode on the shipped experts, each in two slots of the bank, one row after another, beside
  32 rows on one of them, merged; 64 tokens, and of these the last 48 by themselves: prompts of rows on one expert are
  read faster, for what they have in common is read once.
- `long`: 1,000 GSM8K test questions, answers of 2 to 32 forced tokens, after a job of a few that meets every bucket:
  programs compiled and memory held after each hundred.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from importlib import resources
from pathlib import Path

import jax
import numpy as np

from sva.adaptation import label_scoring as dispatch
from sva.evaluation import evaluate
from sva.generation import chat
from sva.generation.complete import CompleteOptions, Mixtures, complete
from sva.generation.decompose import spectra_of
from sva.generation.load import load
from sva.generation.merge import merge, shared_form
from sva.models.transformer import apply, positions_of, variables
from sva.parallel import compile_cache as runtime
from sva.spectral import serving_plan
from sva.spectral.expert import Expert
from sva.spectral.mixing import bank, slots
from sva.tasks import task
from sva.tasks.labels import Label
from sva.training.run import command, versions
from sva.utils.files import write_json

HERE = Path(__file__).parent
ROUNDS = 5


def seconds(run) -> float:
    """Of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_turn(runs, rounds=ROUNDS):
    """({name: seconds}, {name: median}) of functions called in turn, after one call of each to compile."""
    times = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times, {name: statistics.median(found) for name, found in times.items()}


def job(lm) -> dict:
    """Refilled rows beside transformers' batches."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as directory:
        lm.save(Path(directory) / "model")
        peer = transformers.AutoModelForCausalLM.from_pretrained(Path(directory) / "model", dtype=torch.float32).eval()
    lengths = json.loads((HERE / "lengths.json").read_text())
    questions = [chat.render(lm, item.question) for item in evaluate.items(task("gsm8k"), "test", len(lengths))]
    rows = chat.tokenize(lm, questions)
    found = {}

    def ours():
        for done in complete(lm, rows, lengths, options=CompleteOptions(eos_ids=(), title="sva")):
            found[done.prompt] = done.tokens

    times = {"sva": [seconds(ours), seconds(ours)], "transformers": []}
    theirs = {}
    for start in range(0, len(rows), 32):
        ids, mask = chat.encode(lm, questions[start : start + 32])
        size = max(lengths[start : start + 32])
        began = time.perf_counter()
        with torch.inference_mode():
            out = peer.generate(
                torch.tensor(ids, dtype=torch.long),
                attention_mask=torch.tensor(mask, dtype=torch.long),
                max_new_tokens=size,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        times["transformers"].append(time.perf_counter() - began)
        print(f"transformers {start + len(ids)} of {len(rows)}: {times['transformers'][-1]:.1f} s", flush=True)
        for row, tokens in enumerate(out[:, ids.shape[1] :].numpy()):
            theirs[start + row] = tokens[: lengths[start + row]]
    compared, flips = 0, []
    for row, prompt in enumerate(rows):
        differ = np.flatnonzero(found[row] != theirs[row])
        compared += int(differ[0]) if differ.size else len(theirs[row])
        if differ.size:
            step = int(differ[0])
            with torch.inference_mode():
                text = torch.tensor([[*prompt, *theirs[row][:step].tolist()]], dtype=torch.long)
                top = torch.topk(peer(text).logits[0, -1], 2).values
            flips.append({"prompt": row, "step": step, "margin": float(top[0] - top[1])})
    total = sum(times["transformers"])
    return {
        "prompts": len(rows),
        "prompt_tokens": sum(map(len, rows)),
        "new_tokens": sum(lengths),
        "seconds": times,
        "tokens_per_second": {"sva": sum(lengths) / times["sva"][1], "transformers": sum(lengths) / total},
        "ratio": total / times["sva"][1],
        "tokens_compared": compared,
        "flips": flips,
        "flips_in_1000_tokens": 1000 * len(flips) / compared,
        "largest_margin_of_a_flip": max((flip["margin"] for flip in flips), default=0.0),
        "torch": torch.__version__,
    }


def labels(lm) -> dict:
    """The first pass beside the questions' own prefill."""
    questions = sorted((item.question for item in evaluate.items(task("gsm8k"), "test", 256)), key=len)
    many = (
        "numbers, letters, words, lists, dates, places, people, animals, plants, weather, music, sport, food, travel, "
        "history, money, health, law, science, space, tools, games, books, films, maps, names, colours, shapes"
    )
    names = [Label(name, f"{name} questions, which may be about {many}") for name in ("sums", "spelling", "sorting")]
    names = [*names, Label("other", f"anything else, {many} among it")]
    first = dispatch.prepare(lm, names)
    form = dispatch.template(lm, names)
    batches = [
        dispatch.encode(lm, form, questions[start : start + 32])  # the shortest first, as `AdaptiveLM.choose` has them
        for start in range(0, len(questions), 32)
    ]

    @jax.jit
    def prefill(params, asked):
        positions, valid = positions_of(asked.mask)
        collections, last = variables(lm.model, params, None), asked.ids.shape[1] - 1
        hidden, part = apply(
            lm.model, collections, asked.ids, positions, valid, token_indices=asked.places, output_start=last
        )
        return hidden[:, 0], part

    score = jax.jit(dispatch.label_scores, static_argnames=("model",))
    runs = {
        "first pass": lambda: [score(lm.model, lm.params, first, batch).block_until_ready() for batch in batches],
        "plain prefill": lambda: [jax.block_until_ready(prefill(lm.params, batch)) for batch in batches],
    }
    times, medians = in_turn(runs, rounds=3)  # half a minute each
    return {
        "questions": len(questions),
        "instruction_tokens": int(first.prefix.valid.sum()),
        "label_tokens": len(first.label_ids),
        "widths": [batch.ids.shape[1] for batch in batches],
        "seconds": times,
        "ratio": medians["first pass"] / medians["plain prefill"],
    }


def experts(lm) -> dict:
    """Rows on experts of their own beside rows on one merged expert."""
    files = sorted((resources.files("sva") / "assets").iterdir(), key=lambda path: path.name)
    found = [Expert.load(str(path)) for path in files if path.name.endswith(".safetensors")]
    names = list(dict.fromkeys(name for expert in found for name in expert.names))
    spectra = spectra_of(lm, names)
    zs = [expert.z(spectra) for expert in found] * 2
    questions = [chat.render(lm, item.question) for item in evaluate.items(task("other"), "test", 32)]
    rows = chat.tokenize(lm, questions)
    alphas = np.zeros((32, len(zs) + 1), np.float32)
    alphas[np.arange(32), 1 + np.arange(32) % len(zs)] = 1
    merged = merge(lm, spectra, found[0].z(spectra))

    def decode(lm, mixtures=None, tokens=64):
        return list(complete(lm, rows, tokens, options=CompleteOptions(eos_ids=(), mixtures=mixtures)))

    runs = {"one expert, merged": partial(decode, merged)}
    forms = {}
    for tolerance in (0.0, 1e-2):
        plans = serving_plan.plan(
            spectra, zs, tolerance, exact_base=False, kind=lambda name: shared_form(lm.model, name)
        )
        nested = lm.model.nest(slots(spectra, bank(zs, spectra, len(zs) + 1), plans))
        name = f"experts by row, tolerance {tolerance:g}"
        runs[name] = partial(decode, lm, Mixtures(nested, alphas))
        forms[name] = serving_plan.summary(plans)
    times, medians = in_turn(runs | {f"{name}, 16 tokens": partial(run, tokens=16) for name, run in runs.items()})
    last = {name: medians[name] - medians[f"{name}, 16 tokens"] for name in runs}
    return {
        "experts": [path.name for path in files],
        "slots": len(zs) + 1,
        "forms": forms,
        "seconds": times,
        "speed_of_merged": {name: medians["one expert, merged"] / medians[name] for name in runs},
        "speed_of_merged_in_the_last_48_tokens": {name: last["one expert, merged"] / last[name] for name in runs},
    }


def long(lm) -> dict:
    """Programs and memory over a long job."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **about: (
            compiled.append(about.get("fun_name", "")) if "backend_compile" in event else None
        )
    )
    forced = json.loads((HERE / "lengths.json").read_text())
    questions = [chat.render(lm, item.question) for item in evaluate.items(task("gsm8k"), "test", 1000)]
    rows = chat.tokenize(lm, questions)
    lengths = [forced[i % len(forced)] // 8 for i in range(len(rows))]
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    some = [*by_length[::16], *by_length[::-16]]  # short ones first, then long ones, then short ones again
    list(complete(lm, [rows[i] for i in some], [lengths[i] for i in some], options=CompleteOptions(eos_ids=())))
    warm = len(compiled)
    compiled.clear()
    held = []
    started = time.perf_counter()
    for done, _ in enumerate(complete(lm, rows, lengths, options=CompleteOptions(eos_ids=(), title="long")), 1):
        if done % 100 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            held.append(pages * os.sysconf("SC_PAGESIZE") / 2**20)
            print(f"{done}: {held[-1]:.0f} MiB, {len(compiled)} programs", flush=True)
    return {
        "prompts": len(rows),
        "prompt_tokens": sum(map(len, rows)),
        "new_tokens": sum(lengths),
        "seconds": time.perf_counter() - started,
        "programs_compiled_before": warm,
        "programs_compiled": compiled,
        "resident_mebibytes_after_each_hundred": held,
    }


def main() -> None:
    runtime.start()
    lm = load("smollm2-135m-instruct-q4_1")
    parts = {"job": job, "labels": labels, "experts": experts, "long": long}
    path = HERE / "result.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    for name in sys.argv[1:] or parts:
        result[name] = parts[name](lm) | {"versions": versions(), "command": command()}
        write_json(path, result)
        print(json.dumps({name: result[name]}, indent=2))


if __name__ == "__main__":
    main()
