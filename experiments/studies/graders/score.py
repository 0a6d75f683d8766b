"""How often the strict graders agree with a careful reader on completions that they were not made for.

    python experiments/studies/graders/score.py [--out experiments/studies/graders/before.json]

Over tests/completions/unseen: 75 completions each for GSM8K, ARC, MATH and programs (which are run in the sandbox),
written down before the graders were mended. Prints the share of right verdicts and every wrong one, by file and line.
"""

import argparse
import sys
from pathlib import Path

from sva.training.run import command, versions
from sva.utils.files import write_json

sys.path.append(str(Path(__file__).parents[3] / "tests"))
import unseen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    out = parser.parse_args().out
    files = {}
    for file in unseen.FILES:
        total, wrong = len(unseen.rows(file)), unseen.wrong(file)
        right = total - len(wrong)
        files[file] = {"n": total, "right": right, "percent": round(100 * right / total, 1), "wrong": wrong}
        print(f"{file}: n {total}, right {right}, {100 * right / total:.1f} %")
        for row in wrong:
            print(f"  {file}.jsonl:{row['line']}: expected {row['expected']}, got {row['got']} ({row['why']})")
    total, right = (sum(part[field] for part in files.values()) for field in ("n", "right"))
    print(f"all: n {total}, right {right}, {100 * right / total:.1f} %")
    if out:
        summary = {"n": total, "right": right, "percent": round(100 * right / total, 1), "files": files}
        write_json(out, summary | {"command": command(), "versions": versions()})


if __name__ == "__main__":
    main()
