"""The rows of GSM8K (Cobbe et al., arXiv 2110.14168), as published."""

from sva.tasks.sources import upstream

LICENCE = "MIT"
FIELDS = ("question", "answer")
FILES = {
    "train": upstream.File("gsm8k_train", "9556bf9d7dba73d7fcaaeff6ca814c71684db1d8e8d485d83ec62f1c428b888d"),
    "test": upstream.File("gsm8k_test", "51b901a6559b123df91167acbe3ed6d6d5d404ee6fa0773a4da19fd9d44c767a"),
}
_PUBLISHED = (
    "https://raw.githubusercontent.com/openai/grade-school-math/"
    "3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data/{split}.jsonl"
)


def upstream_rows(split: str) -> list[upstream.Row]:
    """All rows of upstream's train or test file, in its order."""
    url = _PUBLISHED.format(split=split)
    return upstream.read(FILES[split], FIELDS, "github.com", lambda: upstream.json_lines(url))
