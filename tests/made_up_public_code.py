"""A small directory of the public code's form, with words of our own: what $SVA_PUBLIC_CODE names in tests."""

from pathlib import Path

CODE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}\n<answer>\n"


def write(directory: Path, code: str = CODE, classification: str = "Sort it: code, math, reasoning, other.") -> Path:
    """The directory, with its two files; importing either would raise."""
    (directory / "tasks").mkdir(parents=True)
    half = len(code) // 2
    (directory / "tasks" / "base.py").write_text(
        f"import nothing_of_this_name\nLLAMA = 'x'\nCODE_PROMPT = (\n    {code[:half]!r}\n    {code[half:]!r}\n)\n"
    )
    (directory / "utils.py").write_text(
        f"raise SystemExit\n\ndef ask():\n    CLASSIFICATION_PROMPT = {classification!r}.strip() + ''\n"
    )
    return directory
