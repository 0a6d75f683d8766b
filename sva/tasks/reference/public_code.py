"""Texts that are read from the user's own copy of the public code and of which sva holds none.

A copy is a checkout of SakanaAI/self-adaptive-llms (commit 03a41ae), named by $SVA_PUBLIC_CODE. Its files are parsed
(`ast`), never imported or run; only a constant string that a module or a class binds is taken from them.
"""

import ast
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from sva.utils.errors import UserError
from sva.utils.remote import local_path

VARIABLE = "SVA_PUBLIC_CODE"
_GET = "git clone https://github.com/SakanaAI/self-adaptive-llms && git -C self-adaptive-llms checkout 03a41ae"


def directory() -> Path:
    """The user's copy of the public code.

    Raises:
      UserError: none is named, or what is named is not one.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        raise UserError(
            f"prompt=reference reads this prompt from your copy of the public code: {_GET}, then set ${VARIABLE} to it"
        )
    path = local_path(named, f"${VARIABLE}")
    if not (path / "tasks" / "base.py").is_file() or not (path / "utils.py").is_file():
        raise UserError(
            f"${VARIABLE}={named} is not a copy of the public code (no tasks/base.py or no utils.py); get one: {_GET}"
        )
    return path


def code_prompt() -> str:
    """The template around the questions of MBPP and HumanEval."""
    return constant(directory() / "tasks" / "base.py", "CODE_PROMPT")


def classification_prompt() -> str:
    """The system message of the first pass."""
    return constant(directory() / "utils.py", "CLASSIFICATION_PROMPT")


@lru_cache(maxsize=8)
def constant(path: Path, name: str) -> str:
    """The string that a Python file binds to `name`; literals joined by juxtaposition or + count.

    Raises:
      UserError: the file is not Python, or binds no constant string to that name.
    """
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(f"{path} is not readable as Python ({error}); get the public code anew: {_GET}") from error
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            text = _text(node.value)
            if text is not None:
                return text
    raise UserError(f"{path} binds no constant text {name}, so it is not of the public code's commit 03a41ae: {_GET}")


def _text(node: ast.expr) -> str | None:
    """The string of an expression of literals: one, a sum, or one that is stripped or dedented; else None."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None or right is None else left + right
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "strip":
        inner = _text(node.func.value)
        return None if inner is None or node.args or node.keywords else inner.strip()
    return None


def filled(template: str, turns: Sequence[Mapping[str, str]]) -> str:
    """The text that a template makes of a chat, up to where the answer starts: no newline at its end.

    A template is a chat template of Jinja, rendered as transformers renders one (in Jinja's sandbox), or a text with
    one field in braces, which the system message and the question fill.

    Raises:
      UserError: it is neither, or leaves the question out.
    """
    if "{{" in template or "{%" in template:
        text = _rendered(template, turns)
    else:
        content = "\n\n".join(turn["content"] for turn in turns)
        before, opened, rest = template.partition("{")
        _, closed, after = rest.partition("}")
        if not opened or not closed:
            raise UserError(f"CODE_PROMPT of the public code has no place for the question; get it anew: {_GET}")
        text = before + content + after
    if turns[-1]["content"] not in text:
        raise UserError(f"CODE_PROMPT of the public code leaves the question out; get it anew: {_GET}")
    return text.removesuffix("\n")


def _rendered(template: str, turns: Sequence[Mapping[str, str]]) -> str:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)
        return made.render(
            messages=[dict(turn) for turn in turns], bos_token="", eos_token="", add_generation_prompt=True
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(
            f"CODE_PROMPT of the public code is not a chat template ({error}); get it anew: {_GET}"
        ) from error
