"""Whether sva computes what transformers computes of a checkpoint: weights, token ids, logits and greedy answers.

Token ids and weights are equal or not. Logits of the same tokens may differ by rounding, and so may greedy answers from
the first step on at which the two likeliest tokens are nearly as likely as each other: `Tolerance`.
"""

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from sva.generation import chat
from sva.generation.lm import LM
from sva.interop.transformers_run import Run, Text, padded
from sva.models.fingerprint import digest

NEW_TOKENS = 32  # of each answer
MOST_TOKENS = 512  # of each text


class Tolerance(NamedTuple):
    """What rounding may do to logits: in float32, and in bfloat16, whose numbers have 8 bits.

    Rounding is larger at few places by far, next to tokens that all others attend to: hence two bounds.
    """

    typical: float  # difference at half of the places
    largest: float  # anywhere, as a part of the text's largest logit
    margin: float  # below it, between the two likeliest tokens, either may be chosen


TOLERANCES = {"float32": Tolerance(3e-4, 1e-4, 1e-3), "bfloat16": Tolerance(0.5, 0.1, 1.0)}


class Part(NamedTuple):
    """One thing that was compared."""

    name: str
    equal: bool
    summary: str
    differing: list[str]  # a line each
    near: list[str] = []  # steps of answers where rounding chose, which are no difference


def texts() -> list[Text]:
    """The 50 built-in texts: chats, prose, numbers, code, mathematics, other scripts, symbols, whitespace."""
    lines = resources.files("sva").joinpath("assets/verify.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [Text(each["kind"], tuple(each["turns"])) for each in found]


def run(lm: LM, asked: Sequence[Text], theirs: Run) -> Run:
    """The results of sva for these texts; logits and answers are of transformers' token ids."""
    rendered = [chat.render_turns(lm, text.messages) if text.is_chat else "\n\n".join(text.turns) for text in asked]
    rows = [row[:MOST_TOKENS] for row in theirs.ids]
    logits, answers = [], []
    for numbers, ids, mask in padded(rows, "right"):
        found = np.asarray(lm.logits(ids, mask))
        logits += [found[place, : len(rows[number])].copy() for place, number in enumerate(numbers)]
    for numbers, ids, mask in padded(rows, "left"):
        answers.append(lm.generate(ids, mask, NEW_TOKENS).tokens[: len(numbers)])
    weights = {name: digest(np.asarray(x, np.float32)) for name, x in lm.named_params().items()}
    return Run(weights, chat.tokenize(lm, rendered), logits, np.concatenate(answers))


def compare(asked: Sequence[Text], ours: Run, theirs: Run, margins: np.ndarray, tolerance: Tolerance) -> list[Part]:
    """What was compared, in the order in which a difference explains those after it.

    Args:
      margins: [N, M], as `transformers_run.run` gives them.
    """
    names = [f"text {number} ({text.kind})" for number, text in enumerate(asked, 1)]
    return [
        _weights(ours, theirs),
        _ids(names, ours, theirs),
        _logits(names, ours, theirs, tolerance),
        _answers(names, ours, theirs, margins, tolerance),
    ]


def _weights(ours: Run, theirs: Run) -> Part:
    differing = [name for name, value in ours.weights.items() if theirs.weights.get(name) != value]
    equal = len(ours.weights) - len(differing)
    return Part("weights", not differing, f"{equal} of {len(ours.weights)} equal, bit for bit", differing)


def _ids(names: Sequence[str], ours: Run, theirs: Run) -> Part:
    differing = []
    for name, a, b in zip(names, ours.ids, theirs.ids, strict=True):
        if a != b:
            place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            differing.append(f"{name}: token {place} is {a[place : place + 1]} here, {b[place : place + 1]} there")
    equal = len(names) - len(differing)
    return Part("token ids", not differing, f"those of {equal} of {len(names)} texts equal", differing)


def _logits(names: Sequence[str], ours: Run, theirs: Run, tolerance: Tolerance) -> Part:
    differing, errors, parts = [], [], []
    for name, a, b in zip(names, ours.logits, theirs.logits, strict=True):
        error = np.where(np.isfinite(a) & np.isfinite(b), np.abs(a - b), np.inf).max(axis=1)
        half, part = float(np.median(error)), float(error.max() / np.abs(b).max())
        errors.append(error)
        parts.append(part)
        if not (half <= tolerance.typical and part <= tolerance.largest):
            place = int(error.argmax())
            differing.append(f"{name}: by {error[place]:.2g} at token {place}, by {half:.2g} at half of its tokens")
    every = np.concatenate(errors)
    summary = (
        f"differ by at most {np.median(every):.2g} at half of {len(every):,} tokens (tolerance {tolerance.typical:g}), "
        f"and by at most {max(parts):.2g} of a text's largest logit (tolerance {tolerance.largest:g})"
    )
    return Part("logits", not differing, summary, differing)


def _answers(names: Sequence[str], ours: Run, theirs: Run, margins: np.ndarray, tolerance: Tolerance) -> Part:
    differing, near = [], []
    for name, a, b, margin in zip(names, ours.answers, theirs.answers, margins, strict=True):
        steps = np.flatnonzero(a != b)
        if steps.size:
            step = int(steps[0])
            what = f"{name}: step {step} is token {a[step]} here, {b[step]} there, margin {margin[step]:.2g}"
            (near if margin[: step + 1].min() < tolerance.margin else differing).append(what)
    count = len(names)
    summary = (
        f"{count - len(differing)} of {count} equal over {ours.answers.shape[1]} tokens, up to a step whose margin is "
        f"under {tolerance.margin:g}"
    )
    return Part("answers", not differing, summary, differing, near)


def as_text(parts: Sequence[Part], most: int = 10) -> str:
    """The comparison in lines; of what differs the first `most` of each part."""
    lines = []
    for part in parts:
        lines.append(f"{part.name:10} {'equal  ' if part.equal else 'DIFFERS'}  {part.summary}")
        lines += [f"    {line}" for line in part.differing[:most]]
        if len(part.differing) > most:
            lines.append(f"    and {len(part.differing) - most} more")
        lines += [f"    near: {line}" for line in part.near]
    different = [part.name for part in parts if not part.equal]
    lines.append(f"different from transformers: {', '.join(different)}" if different else "equal to transformers")
    return "\n".join(lines)


def as_json(parts: Sequence[Part]) -> dict[str, Any]:
    """The comparison as plain data."""
    return {"equal": all(part.equal for part in parts), "parts": [part._asdict() for part in parts]}
