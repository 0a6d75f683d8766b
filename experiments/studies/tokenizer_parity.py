"""Are the token ids of the GGUF tokenizer llama.cpp's own, on GSM8K's 1,319 test questions?

    python experiments/studies/tokenizer_parity.py [MODEL]

MODEL is a GGUF file or a name; default smollm2-135m-instruct-q4_1. Each question is compared bare and inside
the chat template (where control tokens are parsed). Prints equal / total and the first differences; exit status
1 if any differ. Needs llama-cpp-python (extra `bench`) and gsm8k_test.jsonl.gz (in $SVA_DATA or ../shared/data).
The sha256 is what tests/test_tokenizer.py holds the tokenizer to: llama.cpp's ids of the bare questions.
"""

import argparse
import gzip
import hashlib
import json
import sys
from collections.abc import Iterable, Sequence

from sva.models.hub import resolve
from sva.models.tokenizer import load_tokenizer
from sva.utils.paths import data_dir


def questions() -> list[str]:
    """GSM8K's test questions."""
    folder = data_dir()
    if folder is None:
        sys.exit("no data: set SVA_DATA to the folder that holds gsm8k_test.jsonl.gz")
    with gzip.open(folder / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["question"] for line in lines]


def digest(rows: Iterable[Sequence[int]]) -> str:
    """Hexadecimal sha256 of rows of ids, written as decimal numbers with spaces, one row a line."""
    return hashlib.sha256("".join(" ".join(map(str, row)) + "\n" for row in rows).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct-q4_1")
    path = resolve(parser.parse_args().model)
    try:
        from llama_cpp import Llama
    except ImportError:
        sys.exit("llama-cpp-python is not installed; pip install 'sva[bench]'")
    theirs = Llama(str(path), vocab_only=True, verbose=False)
    ours = load_tokenizer(path)
    assert ours is not None, "a GGUF file always has a tokenizer"
    bare = questions()
    chats = [
        str(ours.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True))
        for text in bare
    ]
    expected: list[list[int]] = []
    differ = 0
    for name, texts in {"bare": bare, "chat": chats}.items():
        expected = [theirs.tokenize(t.encode(), add_bos=False, special=name == "chat") for t in texts]
        found = [ours(t, add_special_tokens=False)["input_ids"] for t in texts]
        wrong = [i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b]
        print(f"{name}: {len(texts) - len(wrong)} / {len(texts)} equal, {sum(map(len, expected))} tokens")
        for i in wrong[:3]:
            print(f"  question {i}: llama.cpp {expected[i]}, sva {found[i]}")
        differ += len(wrong)
        if name == "bare":
            print(f"sha256 of llama.cpp's ids: {digest(expected)}")
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
