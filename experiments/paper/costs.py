"""What a cell will take: tokens, minutes and memory, predicted before it is started."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from experiments.paper.cells import Cell
from experiments.paper.methods import METHODS
from experiments.paper.studies import Study

_GENERATED = 0.75  # share of the budget that an answer takes on average
# Seconds a trained and an answered token, and a cell besides: on two quiet cores by experiments/studies/learning; on an
# H100 as each of six processes that share it took (experiments/LOG.md).
_RATES = {"cpu": (4.3e-3, 1.5e-3, 20.0), "gpu": (3e-4, 1e-4, 4.0)}
_WEIGHTS, _MATRICES = 0.135e9, 0.08e9  # numbers in SmolLM2-135M, and in its mlp alone
ANY = "any method"
_STUDIED = {"dispatch": 3600, "search": 7000, "moved": 10_000, "many": 12_000}  # answers of a study
_LAYERS, _WIDTHS, _MODEL_WIDTH = 30, 14, 576  # activations a token: about 14 times the model's width a layer


class Cost(NamedTuple):
    """One cell's, or that of several one after another."""

    tokens: int  # read or generated, training and held-out
    seconds: float
    gib: float  # weights, factors, optimiser and activations


def predicted(cell: Cell | Study, device: str, measured: Mapping[str, float] | None = None) -> Cost:
    """The cost of a cell on a device; its seconds are `measured` ones of its method where there are any."""
    rate = _RATES[_kind(device)]
    trained, answered = tokens(cell)
    if isinstance(cell, Study):
        seconds = _seconds(cell.method, rate[2] + answered * rate[1], measured or {})
        return Cost(answered, seconds, 4 * 3 * _WEIGHTS / 2**30)
    settings = cell.settings
    samples = 1 if settings.get("train.method") == "next_token" else settings["rollout.samples"]
    budget = settings.get("rollout.max_new_tokens", 4)
    seconds = 1.0 if cell.scale.name == "toy" else rate[2] + trained * rate[0] + answered * rate[1]
    rows = settings["train.micro_batch"] * (cell.scale.prompt_tokens + samples * budget)
    copies = 4 if METHODS[cell.method].parametrisation == "full" else 1.3  # weights, merged, gradient, Adam; or factors
    numbers = 2 * _WEIGHTS + copies * _MATRICES + rows * _LAYERS * _WIDTHS * _MODEL_WIDTH
    return Cost(trained + answered, _seconds(cell.method, seconds, measured or {}), 4 * numbers / 2**30)


def tokens(cell: Cell | Study) -> tuple[int, int]:
    """(tokens of training, of held-out questions and their answers), read or generated."""
    prompt, answer = cell.scale.prompt_tokens, cell.scale.answer_tokens
    if isinstance(cell, Study):
        return 0, _STUDIED[cell.method] * (prompt + answer)
    settings = cell.settings
    is_next = settings.get("train.method") == "next_token"
    prompts, samples = settings["rollout.prompts"], 1 if is_next else settings["rollout.samples"]
    budget = settings.get("rollout.max_new_tokens", 4)
    # Sampling and the update each read the prompts and their answers.
    step = (prompts * prompt + prompts * samples * int(budget * _GENERATED)) * (1 if is_next else 2)
    return settings["train.steps"] * step, settings["evaluate.size"] * (prompt + answer)


def _seconds(method: str, guess: float, measured: Mapping[str, float]) -> float:
    """What cells of the method took, else at least what those of others took."""
    return measured.get(method, max(guess, measured.get(ANY, 0.0)))


def measured(records: Iterable[Mapping[str, Any]], device: str) -> dict[str, float]:
    """{method: seconds} of half as much again as the median of its cells on this kind of device.

    Args:
      device: "cpu", "gpu" or an accelerator's own name, as in records.

    The median, because the first cell of a process compiles for all that follow. `ANY` is the median over methods, for
    those without a cell: a guess from tokens alone would start in the last minute what takes several.
    """
    found: dict[str, list[float]] = {}
    for record in records:
        if _kind(record["device"]) == _kind(device):
            found.setdefault(record["method"], []).append(record["seconds"])
    slowed = {method: 1.5 * statistics.median(seconds) for method, seconds in found.items()}
    return slowed | ({ANY: statistics.median(slowed.values())} if slowed else {})


def _kind(device: str) -> str:
    return "cpu" if device == "cpu" else "gpu"


def total(costs: list[Cost]) -> Cost:
    """All of them one after another, and the most memory of any."""
    return Cost(
        sum(cost.tokens for cost in costs),
        sum(cost.seconds for cost in costs),
        max((cost.gib for cost in costs), default=0.0),
    )
