"""Programs in completions: the case of code at top level, and a table of completions with their verdicts."""

import ast
import dataclasses
import random
from pathlib import Path
from typing import NamedTuple

import pytest

import sva.tasks
from sva.sandbox import Job
from sva.tasks import code
from sva.tasks.grading import programs, python_text
from sva.utils import paths

LEVEL = "best-effort"  # what CI's machine can do is for test_sandbox.py to say
TABLE = Path(__file__).parent / "completions" / "programs.txt"
PROMPT = 'from typing import List\n\ndef helper(a):\n    return a\n\n\ndef add(a, b):\n    """Add."""\n'


ADD = "def add(a, b):\n    return a + b"
COMPLETIONS = [
    f"```python\n{ADD}\n```",
    f"Sure! Here is the function:\n\n```python\n{ADD}\n```\n\nIt adds two numbers.",
    f"```\n{ADD}\n```",
    f"```py\n{ADD}\n```",
    f"~~~python\n{ADD}\n~~~",
    f"```Python\r\n{ADD}\r\n```\r\n".replace("\n    ", "\r\n    "),
    ADD,
    f"Here you go:\n\n{ADD}\n\nThis returns the sum of both.",
    f"{ADD}\n\nprint(add(1, 2))  # 3\nassert add(1, 1) == 3",
    f"```python\n{ADD}\n\nif __name__ == '__main__':\n    print(add(int(input()), 1))\n```",
    f"```python\n{ADD}\n\nassert add(2, 2) == 5\n```",
    f"```python\nimport math\n\n{ADD}\n```\n\nExample:\n```python\nprint(add(1, 2))\n```",
    f"First try:\n```python\ndef add(a, b):\n    return a - b\n```\nThat is wrong. Corrected:\n```python\n{ADD}\n```",
    f"```python\n{ADD}\n```\nOr, cut off:\n```python\ndef add(a, b):\n    return (a +",
    f"```bash\npip install numpy\n```\n```python\n{ADD}\n```",
    "1. Write it:\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n2. Done.",
    "```python\nadd = lambda a, b: a + b\n```",
    "```python\nfrom operator import add as plus\nadd = plus\n```",
    "```python\nclass Adder:\n    def __call__(self, a, b):\n        return a + b\n\nadd = Adder()\n```",
    "```python\nimport functools\n\n@functools.cache\ndef add(a, b):\n    return a + b\n```",
    "```python\ndef add(a, b):\n\treturn a + b\n```",
    f"\x07\x1b[1m{'word ' * 50}\n```python\n{ADD}\n```",
    f"```python\n{ADD}",
    "```python\ndef add(a, b):\n    words = 'one\x0ctwo\u2028three'\n    return a + b\n\nprint(add(1, 2))\n```",
    "```python\nimport math; print(1)\ndef add(a, b): return a + b\n```",
    f"def unrelated():\n    pass\n\nand then\n\n{ADD}\n\nthat is all: the (sum of both.",
    "```python\nOFFSET = 0\ndef add(a, b):\n    return a + b + OFFSET\n```",
]  # fmt: skip

with_data = pytest.mark.skipif(
    paths.data_dir() is None, reason="no folder of benchmark data (../shared/data or $SVA_DATA)"
)


class Row(NamedTuple):
    title: str
    completion: str
    name: str
    prompt: str
    test: str
    is_right: bool


def rows() -> list[Row]:
    """The table; a name with a plus continues `PROMPT`."""
    made = []
    for part in TABLE.read_text().removeprefix("#### ").split("\n#### "):
        head, _, completion = part.partition("\n")
        verdict, name, test, title = head.split(" | ")
        assert verdict in ("passed", "failed")
        prompt = PROMPT if name.endswith("+") else ""
        made.append(Row(title, completion.removesuffix("\n"), name.rstrip("+"), prompt, test, verdict == "passed"))
    return made


def verdicts(table: list[Row]):
    """Whether each program passes, and why not, run as the tasks run theirs."""
    found = [programs.extract(row.completion, row.name, row.prompt) for row in table]
    jobs = [
        Job(program or "", f"{row.name} = lambda *args: call_within(5, {row.name!r}, *args)\nassert {row.test}")
        for program, row in zip(found, table, strict=True)
    ]
    return code.shared_sandbox(LEVEL).run(jobs, dataclasses.replace(code.LIMITS, load_secs=4.0))


def wrong(table: list[Row]) -> list[tuple[str, str]]:
    """The rows whose verdict is not theirs."""
    ran = verdicts(table)
    return [(row.title, v.reason or "passed") for row, v in zip(table, ran, strict=True) if v.passed != row.is_right]


def test_every_completion_of_the_table_gets_its_verdict():
    table = rows()
    assert len(table) >= 140
    assert sum(not row.is_right for row in table) >= 20
    assert wrong(table) == []


def test_damaged_completions_raise_nothing_and_programs_are_python():
    draw, num_programs = random.Random(0), 0
    for row in rows():
        lines = row.completion.split("\n")
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(lines))
            cut = draw.randint(0, len(lines[place]))
            lines[place : place + 1] = draw.choice(
                ([], [lines[place]] * 2, [lines[place][:cut]], ["  " + lines[place]], ["```"], ['"""', lines[place]])
            ) or [""]
        program = programs.extract("\n".join(lines), row.name, row.prompt)
        if program is not None:
            num_programs += 1
            assert isinstance(python_text.parse(program), ast.Module), lines
    assert num_programs > 100


CASE = {
    "a loop fills a table": (
        "fact = [1]\nfor i in range(1, 20):\n    fact.append(fact[-1] * i)\ndef factorial(n):\n    return fact[n]\n",
        "factorial(5) == 120",
    ),
    "try and except around an import": (
        "try:\n    from math import isqrt\nexcept ImportError:\n    isqrt = None\ndef root(n):\n    return isqrt(n)\n",
        "root(17) == 4",
    ),
    "sys.setrecursionlimit": (
        "import sys\nsys.setrecursionlimit(100000)\ndef depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)\n",
        "depth(5000) == 5000",
    ),
    "a call that fills a table": (
        "NAMES = {}\nNAMES.update({1: 'one'})\ndef name(n):\n    return NAMES[n]\n",
        "name(1) == 'one'",
    ),
    "imports in a block of their own": (
        "from collections import Counter\n```\nand then\n```python\ndef count(xs):\n    return dict(Counter(xs))\n",
        "count('aab') == {'a': 2, 'b': 1}",
    ),
}


def fenced(source: str, language: str = "python") -> str:
    return f"Here it is:\n```{language}\n{source}```\n"


def test_code_at_top_level_stays():
    table = [
        Row(title, fenced(source), test.partition("(")[0], "", test, is_right=True)
        for title, (source, test) in CASE.items()
    ]
    assert wrong(table) == []


@pytest.mark.parametrize("language", ["", "py", "python3", "Python", " python", '{.python title="a.py"}'])
def test_blocks_of_python_are_known_by_any_of_its_names(language):
    source = "import math\nTWO = 1\nTWO += 1\n\ndef double(n):\n    return TWO * n\n"
    for text in (fenced(source, language), fenced(source, language).replace("```", "~~~").replace("\n", "\r\n")):
        assert programs.extract("\ufeff" + text, "double") == source.replace("\n\n", "\n")


def test_a_byte_order_mark_in_a_block_is_skipped():
    assert programs.extract("```python\n\ufeffdef f(): return 1\n```", "f") == "def f(): return 1\n"


def test_lines_keep_their_blanks():
    source = "TEXT = '''a\n    \n  b'''\ndef f(): return TEXT\n"
    assert programs.extract(f"```python\n{source}```", "f") == source


def test_what_is_for_show_is_left_out_wherever_it_stands():
    source = """
import sys; print("é", 1); A = 1
for i in "é☃": print(i,
    "☃"); A += 1
if A:
    assert A == 9
else:
    sys.exit("no")
def f():
    print(A)
    assert A
    return A
print(f())
"""
    assert programs.extract(f"```python{source}```", "f") == (
        'import sys\nA = 1\nfor i in "é☃": pass; A += 1\nif A:\n    pass\nelse:\n    pass\n'
        "def f():\n    print(A)\n    assert A\n    return A\n"
    )


def test_other_blocks_give_what_is_used_and_no_more():
    blocks = [
        "import re\nimport heapq as hq\nHEAP = []\nhq.heappush(HEAP, 1)\nOTHER = undefined",
        "def f(): return 0",
        "HEAP = [2]\ndef helper(): return HEAP",
        "def f(): return helper() + late()",
        "def late(): return []\nboom()",
    ]
    text = "".join(f"```python\n{block}\n```\nand\n" for block in blocks)
    assert programs.extract(text, "f") == (
        "HEAP = [2]\ndef helper(): return HEAP\ndef late(): return []\ndef f(): return helper() + late()\n"
    )


def body(source: str) -> list[str]:
    """The statements of a program, each once, without texts that stand alone."""
    tree = python_text.parse(source)
    assert isinstance(tree, ast.Module)
    parts = [part for part in tree.body if not isinstance(getattr(part, "value", None), ast.Constant)]
    return list(dict.fromkeys(map(ast.dump, parts)))


@with_data
@pytest.mark.parametrize("name", ["mbpp", "mbpp_0.1.0", "humaneval"])
def test_canonical_solutions_come_out_as_they_went_in(name):
    task = sva.tasks.task(name, "strict", sandbox=LEVEL)
    assert isinstance(task, code.CodeTask)
    for split in ("test",) if name == "humaneval" else sva.tasks.SPLITS:
        for row in task.source(split):
            whole = row["prompt"] + row["canonical_solution"]
            completions = [task.answer(row)]
            if task.is_continued:
                behind = row["canonical_solution"]
                completions += [behind, behind.strip(), f"```python\n{behind}\n```", behind + "\n\nprint(1)\n"]
            for completion in completions:
                assert body(task.program(completion, row) or "") == body(whole), row["task_id"]


def test_programs_are_found_in_whatever_completions_they_come_in():
    found = [programs.extract(text, "add") for text in COMPLETIONS]
    assert None not in found
    verdicts = code.shared_sandbox(LEVEL).run([Job(p or "", "assert call('add', 2, 3) == 5") for p in found])
    assert [(text, v.reason) for text, v in zip(COMPLETIONS, verdicts, strict=True) if not v.passed] == []


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "I cannot help with that.",
        "```python\n```",
        "def subtract(a, b): return a - b",
        "def add(a, b:\n  return",
        "\0",
        "```",
    ],
)
def test_where_there_is_no_program_there_is_none(completion):
    assert programs.extract(completion, "add") is None


@pytest.mark.parametrize(
    "completion", ["    return a + b\n", "    c = a + b\n    return c\n\nprint(add(1, 2))", COMPLETIONS[0]]
)
def test_a_completion_may_go_on_where_the_prompt_ends(completion):
    program = programs.extract(completion, "add", PROMPT)
    assert program is not None
    assert "def helper" in program
    assert "print" not in program
    names: dict = {}
    exec(program, names)
    assert names["add"](2, 3) == 5


@pytest.mark.parametrize(
    "text",
    ["(" * 90_000, "-" * 90_000 + "1", "[" * 5_000, "lambda:" * 10_000 + "1", "not " * 20_000 + "1",
     "x." * 40_000 + "x", "f(" * 5_000, "if 1:\n" + " " * 4_000, "1+" * 40_000 + "1", "é" * 90_000, "\ud800",
     "```python\n" * 9_000],
    ids=lambda text: text[:4],
)  # fmt: skip
def test_no_text_brings_the_parser_down(text):
    assert programs.extract(text, "add") is None
    program = f"def add(a): return {text}\n"
    assert programs.extract(f"```python\n{program}```", "add") in (None, program)
