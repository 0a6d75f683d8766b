"""The public code's way of a training step in torch, on a part of the batch; run by paper_step.py."""

import time
from typing import Any

import numpy as np
import torch
import transformers
from shape import Lengths, config_of, lengths_of, targets_of

from sva.models.config import to_hf

PROMPTS, NEW, SEQUENCES, WARM = 8, 64, 4, 1  # that are generated from at once; tokens each; sequences of the update


def run(arguments: Any) -> dict[str, Any]:
    """Times of composition, generation and update, scaled to the whole step by tokens where that is said."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths, model = lengths_of(arguments), _model(arguments, device)
    targets = targets_of(dict(model.named_parameters()))
    spectra = {name: _spectrum(model.get_parameter(name)) for name in targets}
    raw = {name: torch.full_like(s, 0.1, requires_grad=True) for name, (_, s, _) in spectra.items()}
    adam = torch.optim.Adam(raw.values(), lr=2e-3)
    with torch.no_grad():
        _, composing = timed(lambda: _install(model, _compose(spectra, raw)))
        _, composing = timed(lambda: _install(model, _compose(spectra, raw)))
        drawn, generating = _generate(model, lengths, device)
    for count in (WARM, SEQUENCES):
        _, updating = timed(lambda count=count: _update(model, spectra, raw, adam, lengths, count, device))
    answers, real = int(lengths.answers.sum()), int(lengths.prompts.sum() + lengths.answers.sum())
    took = int(lengths.prompts[:SEQUENCES].sum() + lengths.answers[:SEQUENCES].sum())
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "compose_and_copy_seconds": composing,
        "generate": {
            "prompts": PROMPTS,
            "new_tokens": drawn // PROMPTS,
            "seconds": generating,
            "tokens_per_second": drawn / generating,
        },
        "update": {"sequences": SEQUENCES, "tokens": took, "seconds": updating, "tokens_per_second": took / updating},
        "scaled_to_the_step": {
            "rollout_seconds": composing + generating * answers / drawn,
            "update_seconds": updating * real / took,
        },
        "gigabytes_at_most": peak,
    }


def timed(call: Any) -> tuple[Any, float]:
    """(what it returns, seconds), the device having finished."""
    started = time.perf_counter()
    found = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, time.perf_counter() - started


def _model(arguments: Any, device: str) -> Any:
    config = transformers.AutoConfig.for_model(**to_hf(config_of(arguments)))
    dtype = torch.float32 if arguments.toy else torch.bfloat16
    with torch.device(device):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False).eval()


def _spectrum(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U [out, R], s [R], V [in, R]), drawn at random."""
    (out, into), rank = weight.shape, min(weight.shape)
    u = torch.randn(out, rank, dtype=weight.dtype, device=weight.device) * out**-0.5
    v = torch.randn(into, rank, dtype=weight.dtype, device=weight.device) * into**-0.5
    return u, torch.linspace(1.5, 0.1, rank, dtype=weight.dtype, device=weight.device), v


def _compose(spectra: Any, raw: Any) -> dict[str, torch.Tensor]:
    """{name: W'} as the public code writes it: two products and the rescaling."""
    composed = {}
    for name, (u, s, v) in spectra.items():
        z = torch.sigmoid(raw[name])
        composed[name] = (u @ torch.diag_embed(s * z) @ v.T) * (s.sum() / (s * z).sum())
    return composed


def _install(model: Any, composed: dict[str, torch.Tensor]) -> None:
    for name, weight in composed.items():
        model.get_parameter(name).data.copy_(weight.detach())


def _generate(model: Any, lengths: Lengths, device: str) -> tuple[int, float]:
    """(tokens, seconds) of a batch of prompts of one length, their mean."""
    size, new = int(lengths.prompts.mean()), min(NEW, lengths.new)
    ids = torch.randint(0, model.config.vocab_size, (PROMPTS, size), device=device)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}

    def run(tokens: int) -> Any:
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, **settings)

    timed(lambda: run(2))
    out, seconds = timed(lambda: run(new))
    return int(out.shape[0] * (out.shape[1] - size)), seconds


def _update(model: Any, spectra: Any, raw: Any, adam: Any, lengths: Lengths, count: int, device: str) -> None:
    """One clipped Adam step on so many sequences, one at a time, with dense gradients.

    The base's own pass, for the KL, runs on these weights as well: it costs the same, and no second model is held.
    """
    adam.zero_grad()
    composed = _compose(spectra, raw)
    for name, weight in composed.items():
        parameter = model.get_parameter(name)
        parameter.data.copy_(weight.detach())
        parameter.requires_grad_(True)
        parameter.grad = None
    rng = np.random.default_rng(0)
    for row in range(count):
        prompt, answer = int(lengths.prompts[row]), int(lengths.answers[row])
        ids = torch.tensor(rng.integers(0, model.config.vocab_size, (1, prompt + answer)), device=device)
        with torch.no_grad():
            reference = torch.log_softmax(model(ids).logits[:, prompt - 1 : -1].float(), dim=-1)
        found = torch.log_softmax(model(ids).logits[:, prompt - 1 : -1].float(), dim=-1)
        chosen = found.gather(-1, ids[:, prompt:, None])[..., 0]
        kl = (reference.exp() * (reference - found)).sum()
        (-(chosen.sum()) + 0.1 * kl).div(count).backward()
    for name, weight in composed.items():
        parameter = model.get_parameter(name)
        weight.backward(parameter.grad)
        parameter.requires_grad_(False)
        parameter.grad = None
    torch.nn.utils.clip_grad_norm_(raw.values(), 1e-3)
    adam.step()
