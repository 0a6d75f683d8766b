"""What is compared: each method's settings, and the three learning rates that its own is chosen from.

The matrices are the mlp's (gate, up, down) unless a title says otherwise: "attention" means q and v, as the paper's
counts imply, "all" all seven of a layer, and IA3 has its own (k, v and the input of down), as in PEFT.
"""

from typing import Any, NamedTuple


class Method(NamedTuple):
    """One line of a table."""

    title: str
    parametrisation: str
    targets: str
    rates: tuple[float, float, float]  # tried on validation, the same number for each method
    more: tuple[tuple[str, Any], ...] = ()  # other settings
    rate_of: str = ""  # in the study of SVF's settings: the method whose chosen rate is kept

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of `sva.train`, by dotted name."""
        return {"parametrisation": self.parametrisation, "targets": self.targets, **dict(self.more)}


_Z, _LOW_RANK, _FEW, _FULL = (3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3), (1e-2, 3e-2, 1e-1), (1e-5, 3e-5, 1e-4)
_NEXT_TOKEN = (("train.method", "next_token"), ("rollout.prompts", 32), ("train.micro_batch", 32))


def _lora(rank: int, targets: str, rates: tuple[float, float, float] = _LOW_RANK, *, name: str = "lora", **of: Any):
    title = {"lora": "LoRA", "dora": "DoRA"}[name]
    where = {"mlp": "mlp", "attention": "attention", "all": "all"}[targets]
    return Method(f"{title}, rank {rank} ({where})", f"{name}:r={rank},alpha={2 * rank}", targets, rates, **of)


def _svf(what: str, parametrisation: str, targets: str = "mlp", rates: tuple[float, float, float] = _Z, **of: Any):
    return Method(f"SVF{what}", parametrisation, targets, rates, **of)


MAIN = ("svf", "lora", "ia3")

METHODS = {
    "svf": _svf(" (mlp)", "sigmoid_nuclear"),
    "lora": _lora(16, "mlp"),
    "ia3": Method("IA3", "ia3", "ia3", _Z),
    # Near SVF's number of parameters or far below it.
    "lora_r1_attention": _lora(1, "attention", (1e-3, 3e-3, 1e-2)),
    "projected": _svf(", projected to 13", "projected:n=13,r=2", rates=_FEW),
    "lora_r1": _lora(1, "mlp", (1e-3, 3e-3, 1e-2)),
    "lora_r4": _lora(4, "mlp"),
    "svf_attention": _svf(" (attention)", "sigmoid_nuclear", "attention"),
    "svf_all": _svf(" (all)", "sigmoid_nuclear", "all"),
    "top_k": _svf(", 64 largest", "top_k:k=64"),
    "tail_only": _svf(", 64 smallest", "tail_only:k=64", rates=_FEW),
    "banded": _svf(", banded", "banded:width=2", rates=(1e-3, 3e-3, 1e-2)),
    "core": _svf(", core of rank 16", "core:r=16", rates=(1e-3, 3e-3, 1e-2)),
    "linear": _svf(", z itself not rescaled", "linear"),
    "dora": _lora(16, "mlp", name="dora"),
    "lora_attention": _lora(16, "attention"),
    "lora_all": _lora(16, "all"),
    "full": Method("full fine-tuning (mlp)", "full", "mlp", _FULL),
    # By next-token prediction on the tasks' own answers.
    "svf_next": _svf(" (mlp), next token", "sigmoid_nuclear", more=_NEXT_TOKEN),
    "svf_attention_next": _svf(" (attention), next token", "sigmoid_nuclear", "attention", more=_NEXT_TOKEN),
    "lora_next": _lora(16, "mlp", more=_NEXT_TOKEN)._replace(title="LoRA, rank 16 (mlp), next token"),
    "lora_attention_next": _lora(16, "attention", more=_NEXT_TOKEN)._replace(
        title="LoRA, rank 16 (attention), next token"
    ),
    "lora_all_next": _lora(16, "all", more=_NEXT_TOKEN)._replace(title="LoRA, rank 16 (all), next token"),
    "ia3_next": Method("IA3, next token", "ia3", "ia3", _Z, _NEXT_TOKEN),
    "full_next": Method("full fine-tuning (mlp), next token", "full", "mlp", _FULL, _NEXT_TOKEN),
    # SVF with other settings, most with its learning rate (experiments/paper/fidelity.py).
    "svf_bfloat16": _svf(", z and Adam in bfloat16", "sigmoid_nuclear", more=(("train.param_dtype", "bfloat16"),)),
    "svf_public": _svf(
        ", bfloat16 at lr 2e-3 as the public code",
        "sigmoid_nuclear",
        rates=(2e-3, 2e-3, 2e-3),
        more=(("train.param_dtype", "bfloat16"),),
    ),
    "svf_greedy": _svf(
        ", greedy: 64 prompts a step, one answer each, no baseline",
        "sigmoid_nuclear",
        more=(
            ("rollout.temperature", 0),
            ("rollout.samples", 1),
            ("rollout.prompts", 64),
            ("train.micro_batch", 64),
            ("reinforce.baseline", "none"),
        ),
    ),
    "svf_no_baseline": _svf(", no baseline", "sigmoid_nuclear", more=(("reinforce.baseline", "none"),)),
    **{
        f"svf_kl_{coefficient}": _svf(
            f", KL {coefficient}", "sigmoid_nuclear", more=(("reinforce.kl_coef", coefficient),)
        )
        for coefficient in (0.1, 0.2, 0.3)
    },
    "svf_no_clip": _svf(", no clip", "sigmoid_nuclear", more=(("train.clip_norm", 1e9),)),
}
FIDELITY = tuple(name for name in METHODS if list(METHODS).index(name) > list(METHODS).index("full_next"))
METHODS |= {name: METHODS[name]._replace(rate_of="svf") for name in FIDELITY if name != "svf_public"}
