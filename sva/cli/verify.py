"""`sva verify`: whether a checkpoint gives here what it gives in transformers."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from sva.cli.command_line import Command, argument, option
from sva.cli.options import print_result, start_jax
from sva.utils.errors import UserError

_MOST = 200  # texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Compare a checkpoint's weights, token ids, logits and greedy answers with transformers (extra `verify`: torch).

    Exit code 0: equal, but for what rounding does; 1: different, and the output says what is. Both programs load the
    checkpoint, one after the other.
    """

    model: str = argument("path of a Hugging Face directory, hub id or known name")
    dtype: Literal["float32", "bfloat16"] = option("of the weights in both (default: %(default)s)", "float32")
    file: Path | None = option(
        'texts, one a line, instead of the 50 built-in ones; of .jsonl the "prompt" of each', None
    )
    json: bool = option("print the result as JSON", False)


def run(arguments: Verify) -> int:
    """Runs the command."""
    from sva.interop import transformers_run

    transformers_run.require_torch()
    from sva.models.hub import resolve

    path = resolve(arguments.model)
    if not path.is_dir():
        raise UserError(
            f"{path} is a GGUF file, which transformers reads in a way of its own; name a Hugging Face directory or id"
        )
    start_jax()
    from sva.evaluation import verify
    from sva.generation.load import load

    asked = _texts(arguments.file) if arguments.file else verify.texts()
    limits = {"new_tokens": verify.NEW_TOKENS, "most_tokens": verify.MOST_TOKENS}
    theirs, margins = transformers_run.run(path, asked, arguments.dtype, **limits)
    lm = load(arguments.model, arguments.dtype)
    parts = verify.compare(asked, verify.run(lm, asked, theirs), theirs, margins, verify.TOLERANCES[arguments.dtype])
    print_result({"model": lm.name} | verify.as_json(parts), arguments.json, verify.as_text(parts))
    return int(not all(part.equal for part in parts))


def _texts(file: Path) -> list[Any]:
    """The texts of --file."""
    from sva.interop.transformers_run import Text
    from sva.utils.jsonl import read_prompts

    try:
        with file.open("rb") as opened:
            prompts, faults = read_prompts(opened, str(file), jsonl=file.suffix == ".jsonl")
    except OSError as error:
        raise UserError(f"--file {file} cannot be read: {error.strerror}") from None
    if faults or not prompts:
        raise UserError(faults[0] if faults else f"--file {file} holds no text")
    if len(prompts) > _MOST:
        raise UserError(
            f"--file {file} has {len(prompts)} texts; give at most {_MOST}, whose logits are held in memory"
        )
    return [Text(f"line {prompt.line}", (prompt.text,)) for prompt in prompts]


COMMAND = Command("verify", Verify, run)
