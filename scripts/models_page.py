"""Writes docs/models.md from the table of architectures: `python scripts/models_page.py`; a test holds it current."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from sva.models.architectures import TABLE
from sva.models.fields import REQUIRED, Field, Only, Sets, Unused
from sva.models.gguf import KINDS
from sva.models.rope import KINDS as ROPES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"

_TOP = """# Models

<!-- Written by scripts/models_page.py from sva/models/architectures.py; change those. -->

A model is a path, a hub id or a known name (`sva fetch MODEL` prints where it is). Which network a `config.json`
describes is read by the table below, from Hugging Face directories and hub ids alike. **No key is passed over in
silence**: a key sets something, or other values of it are refused by name, or it is listed here as without effect,
with the reason; a key that the architecture does not know, which transformers does not read either, is named on
stderr. Tests change every key of every architecture and compare with transformers, but for those that choose a class,
a kernel, a dtype or the type of what is returned; others hold the list against what transformers' own code asks of a
config.

"""
_ROPES = """
## Rope types

{names}, wherever transformers reads them.
`dynamic` and `longrope` turn all positions of a row anew once it is longer than the length that the model was first
trained with. sva does so row by row, where transformers takes the longest row of a batch. Keys in a cache were turned
already, so a prompt and its answer that are longer together are refused, before any work. In the `rope_scaling` of
Gemma 3 and OLMo 3 `type` names the rope type as it did in transformers 4; transformers 5 reads `rope_type` alone there.

"""
_GGUF = """## GGUF files

Read are the architectures {names}, in every packed type
that the `gguf` package unpacks, with their vocabularies: byte-level BPE (`gpt2`) and SentencePiece (`llama`), as
llama.cpp cuts them. Metadata that scales or clamps what these architectures do not is refused by name.

`smollm2-135m-instruct` and `gemma-3-270m` come from packages on the Python index where the hub is out of reach; the
names `smollm2-135m-instruct-q4_1` and `gemma-3-270m-q4_k_m` mean those packed weights everywhere.
Gemma's terms of use are put beside the file first; set `SVA_ACCEPT_LICENCES=gemma` once to acknowledge them and fetch
it. gemma-3-270m is a base model: ask it with worked examples (`shots=`), not in a chat.

Beside llama.cpp, on the same Q4_K_M file (`experiments/studies/gemma/perplexity.py`): of GSM8K's {questions} test
questions {equal} have the same token ids; the perplexity of the first {texts} is {ours:.2f} here and {theirs:.2f}
there, {apart:.2%} apart. SVF takes it from {before:.0%} to {after:.0%} of {prompts} test prompts of `list_last`, the
mean of {seeds} seeds, in ten steps (`sva sweep configs/sweeps/gemma3-270m.yaml`; answers in
`experiments/studies/gemma/records`).

"""


def page() -> str:
    """The whole text of docs/models.md."""
    common = _common()
    parts = [_TOP, _table(("`model_type`", "models", "GGUF"), (_row(kind) for kind in TABLE))]
    parts += [_ROPES.format(names=", ".join(f"`{name}`" for name in ROPES))]
    parts += [_GGUF.format(names=", ".join(f"`{name}`" for name in KINDS), **_beside_llama_cpp(), **_trained())]
    parts += ["## Keys\n\nWhat an absent key means stands in the second column.\n", _section("Every model", common)]
    for kind, architecture in TABLE.items():
        own = {key: field for key, field in architecture.fields.items() if key not in common}
        parts.append(_section(f"`{kind}`", own, architecture.fixed))
    return "".join(parts).rstrip() + "\n"


def _beside_llama_cpp() -> dict[str, Any]:
    found = _result("result.json")
    return {
        "questions": f"{found['questions']:,}",
        "equal": f"{found['questions_with_equal_ids']:,}",
        "texts": found["texts"],
        "ours": found["perplexity"]["sva"],
        "theirs": found["perplexity"]["llama.cpp"],
        "apart": abs(found["relative_difference"]),
    }


def _trained() -> dict[str, Any]:
    cells = _result("svf.json")["cells"]
    before, after = (mean(cell[name]["mean"] for cell in cells) for name in ("before", "after"))
    return {"before": before, "after": after, "prompts": cells[0]["n"], "seeds": len(cells)}


def _result(name: str) -> Any:
    return json.loads((PAGE.parents[1] / "experiments" / "studies" / "gemma" / name).read_text("utf-8"))


def _row(kind: str) -> tuple[str, str, str]:
    files = [name for name, file in KINDS.items() if file.model_type == kind or (name, kind) == ("llama", "mistral")]
    return f"`{kind}`", TABLE[kind].names, ", ".join(f"`{name}`" for name in files)


def _common() -> dict[str, Field]:
    """The keys that mean the same, by default too, for every architecture."""
    first, *others = (architecture.fields for architecture in TABLE.values())
    return {key: field for key, field in first.items() if all(each.get(key) == field for each in others)}


def _section(title: str, fields: Mapping[str, Field], fixed: Mapping[str, Any] | None = None) -> str:
    lines = [f"\n### {title}\n\n"]
    if fixed:
        lines.append(f"Whatever the config says: {', '.join(f'{name} {_value(v)}' for name, v in fixed.items())}.\n\n")
    rows = [(f"`{key}`", *_meaning(field)) for key, field in fields.items()]
    return "".join(lines) + _table(("key", "absent", "meaning"), rows)


def _meaning(field: Field) -> tuple[str, str]:
    match field:
        case Sets(sets, default, _):
            return "required" if default is REQUIRED else _value(default), "sets " + ", ".join(f"`{n}`" for n in sets)
        case Only(values, why):
            return _value(values[0]), f"refused unless {' or '.join(map(_value, values))}: {why}"
        case Unused(why):
            return "", f"no effect: {why}"


def _value(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
