"""The lengths in tokens that rollouts are timed with, so that every machine and every commit draws the same rows.

    python experiments/benchmarks/rollout/lengths.py        # writes lengths.json beside this file

`prompts` are those of the first 256 training questions of GSM8K under sva's own prompt, as SmolLM2 reads them.
`answers` are drawn: round(exp(N(log 150, 0.5))), kept within 16 and 512, of four samples a prompt, seed 0; their mean
is 164. That of SmolLM2's own greedy answers is 245, as a quarter of them never ends (experiments/studies/base_scores).
"""

import json
from pathlib import Path

import numpy as np

from sva.generation import chat
from sva.generation.load import load
from sva.tasks import task

PLACE = Path(__file__).with_name("lengths.json")
PROMPTS, SAMPLES = 256, 4


def main() -> None:
    lm, gsm8k = load("smollm2-135m-instruct-q4_1"), task("gsm8k")
    source = gsm8k.source("train")
    texts = [chat.render_example(lm, gsm8k, source[i]) for i in range(PROMPTS)]
    drawn = np.exp(np.random.default_rng(0).normal(np.log(150), 0.5, (PROMPTS, SAMPLES)))
    answers = np.clip(np.round(drawn), 16, 512).astype(int)
    lengths = {"prompts": [len(ids) for ids in chat.tokenize(lm, texts)], "answers": answers.tolist()}
    PLACE.write_text(json.dumps(lengths) + "\n")
    print(np.mean(lengths["prompts"]), max(lengths["prompts"]), answers.mean(), answers.max())


if __name__ == "__main__":
    main()
