"""One generation of the few-shot search, 32 mixtures x 10 shots, beside one member after another in transformers.

    python experiments/benchmarks/few_shot/speed.py gsm8k --new 128      # one round; extra `bench`
    python experiments/benchmarks/few_shot/speed.py gsm8k --new 128 --summary

A round times sva's generation once and, before and after it, a few members the public way: compose
W' = U diag(s z) V^T for every target, load it into the transformers model, let that generate for the 10 shots as one
batch (greedy, until all have ended), grade. The next round takes the next members; every round is a line of
rounds.jsonl, and the summary holds medians and, member by member, the verdicts that differ. Beside it, `merged`:
sva.merge and LM.generate, one member after another. Same weights, mixtures, prompts and graders. Compilation is
outside the times. `products` is what the generation cannot do without: the bare matrix products of the layers' factors
and weights with every token, what the shots share counted once a member, at the rate of 1,024 rows together.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import sva
from sva.adaptation import few_shot
from sva.cli.throughput import products, step_matrices
from sva.generation import chat
from sva.parallel import compile_cache
from sva.tasks import task as make_task
from sva.training.search import CEM
from sva.utils.files import write_json
from sva.utils.padding import common_prefix
from sva.utils.provenance import command, versions

HERE = Path(__file__).parent
EXPERTS = ("capitals", "list_last")
SHOTS = 10
ROWS = 1024  # of the bare products


def timed(run: Any) -> tuple[float, Any]:
    """(seconds, what it returned)."""
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found


class Public:
    """The transformers model, and the spectra in torch."""

    def __init__(self, lm: sva.LM, pool: few_shot.Pool):
        with tempfile.TemporaryDirectory() as directory:
            lm.save(Path(directory) / "model")
            peer = transformers.AutoModelForCausalLM.from_pretrained(Path(directory) / "model", dtype=torch.float32)
        self.lm, self.model = lm, peer.eval()
        self.weights = dict(self.model.named_parameters())
        self.spectra = {
            name: [torch.tensor(np.asarray(x)) for x in spectrum] for name, spectrum in pool.spectra.items()
        }
        self.zs = [{name: torch.tensor(np.asarray(x)) for name, x in z.items()} for z in pool.vectors]

    @torch.inference_mode()
    def member(self, alphas: np.ndarray, ids: np.ndarray, mask: np.ndarray, new: int) -> tuple[float, list[str]]:
        """(seconds of composing, answers) under one mixture."""
        started = time.perf_counter()
        for name, (u, s, vt) in self.spectra.items():
            z = 1 + sum(float(a) * (z[name] - 1) for a, z in zip(alphas, self.zs, strict=True) if name in z)
            self.weights[name].copy_((u * (s * z)) @ vt)
        composed = time.perf_counter() - started
        out = self.model.generate(
            torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=list(chat.end_tokens(self.lm)),
        )
        rows = out[:, ids.shape[1] :]
        return composed, [self.lm.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def seconds_a_token(lm: sva.LM, pool: few_shot.Pool) -> float:
    """Of the bare products, of 1,024 tokens together."""
    targets = {x.shape for x in (lm.named_params()[name] for name in pool.spectra)}
    others = [w for w in step_matrices(lm) if w.shape not in targets]
    matrices = [w for w in others if w is not max(others, key=lambda w: w.size)]  # but for the head: few need it
    matrices += [factor for spectrum in pool.spectra.values() for factor in (spectrum.u, spectrum.vt)]
    run = products(matrices, ROWS, jnp.float32)
    jax.block_until_ready(run())
    return statistics.median(timed(lambda: jax.block_until_ready(run()))[0] for _ in range(3)) / ROWS


def one_round(arguments: argparse.Namespace, done: int) -> dict[str, Any]:
    """What one round measured."""
    lm = sva.load("smollm2-135m-instruct-q4_1", progress=False)
    experts = [sva.Expert.load(f"sva/assets/{name}.safetensors") for name in EXPERTS]
    pool = few_shot.pool(lm, experts, progress=False)
    shots = few_shot.draw(make_task(arguments.task), "train", SHOTS, 0)
    cfg = few_shot.FewShotConfig(max_new_tokens=arguments.new, rows=arguments.rows)
    search, key = CEM(low=0.0, high=1.0), jax.random.key(0)
    population = np.asarray(search.ask(search.init(pool.start()), key))
    encoded = chat.encode(lm, [chat.render(lm, shots.task.question(example)) for example in shots.examples])
    public = Public(lm, pool)
    members = [(done * arguments.members + i) % len(population) for i in range(arguments.members)]

    def theirs(member: int) -> dict[str, Any]:
        seconds, (composed, texts) = timed(lambda: public.member(population[member], *encoded, arguments.new))
        right = shots.right(texts, range(SHOTS)).tolist()
        return {"member": member, "seconds": seconds, "composing": composed, "right": right}

    def merged(member: int) -> dict[str, Any]:
        def run() -> Any:
            adapted = few_shot.mixed(lm, pool, population[member])
            return adapted.generate(*encoded, arguments.new, chat.end_tokens(lm))

        seconds, out = timed(run)
        texts = chat.decode(lm, out.tokens, out.lengths)
        return {"member": member, "seconds": seconds, "right": shots.right(texts, range(SHOTS)).tolist()}

    few_shot.score(lm, pool, population, shots, cfg, key)  # compiles
    few_shot.mixed(lm, pool, population[0]).generate(*encoded, arguments.new, chat.end_tokens(lm))
    public.member(population[0], *encoded, 2)
    half = len(members) // 2
    found = [theirs(member) for member in members[:half]]
    seconds, scores = timed(lambda: few_shot.score(lm, pool, population, shots, cfg, key))
    found += [theirs(member) for member in members[half:]]
    ours = {"seconds": seconds, "tokens": scores.tokens, "right": scores.right.tolist()}
    prompts = chat.tokenize(lm, [chat.render(lm, shots.task.question(example)) for example in shots.examples])
    shared = common_prefix(prompts)
    ours["tokens_computed"] = len(population) * (sum(map(len, prompts)) - (SHOTS - 1) * shared) + scores.tokens
    ours["products"] = ours["tokens_computed"] * seconds_a_token(lm, pool)
    return {"sva": ours, "public": found, "merged": [merged(member) for member in members[:2]]}


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, the ratios, and the scores that differ."""
    size = len(rounds[0]["sva"]["right"])
    right = np.asarray(rounds[0]["sva"]["right"])
    result: dict[str, Any] = {"rounds": len(rounds), "members": size, "shots": SHOTS}
    result["sva_seconds"] = statistics.median(one["sva"]["seconds"] for one in rounds)
    result["sva_tokens"] = rounds[0]["sva"]["tokens"]
    if limits := [one["sva"]["products"] for one in rounds if "products" in one["sva"]]:
        result["products_seconds"] = statistics.median(limits)
    for name in ("public", "merged"):
        rows = [row for one in rounds for row in one[name]]
        seconds = size * statistics.median(row["seconds"] for row in rows)
        other = [
            {"member": row["member"], "shots": np.flatnonzero(right[row["member"]] != row["right"]).tolist()}
            for row in rows
            if right[row["member"]].tolist() != row["right"]
        ]
        result[name] = {
            "members_timed": len({row["member"] for row in rows}),
            "seconds_a_generation": seconds,
            "ratio": seconds / result["sva_seconds"],
            "verdicts": SHOTS * len(rows),
            "verdicts_unlike_sva": other,
        }
    result["public"]["composing_share"] = statistics.median(
        row["composing"] / row["seconds"] for one in rounds for row in one["public"]
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("--new", type=int, required=True, help="tokens of an answer at most")
    parser.add_argument("--members", type=int, default=4, help="timed the public way a round")
    parser.add_argument("--rows", type=int, default=320, help="of sva's batch")
    parser.add_argument("--summary", action="store_true", help="no round; write result.json from all so far")
    arguments = parser.parse_args()
    compile_cache.start()
    path = HERE / "rounds.jsonl"
    rounds = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    setting = f"{arguments.task}, at most {arguments.new} tokens"
    mine = [one for one in rounds if one["setting"] == setting]
    if not arguments.summary:
        made = {"setting": setting, **one_round(arguments, len(mine)), "command": command(), "versions": versions()}
        made["versions"] |= {"torch": torch.__version__, "transformers": transformers.__version__}
        with path.open("a") as file:
            file.write(json.dumps(made) + "\n")
        rounds.append(made)
    settings = dict.fromkeys(one["setting"] for one in rounds)
    result = {setting: summary([one for one in rounds if one["setting"] == setting]) for setting in settings}
    result["versions"] = rounds[-1]["versions"] | {"threads": torch.get_num_threads()}
    write_json(HERE / "result.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
