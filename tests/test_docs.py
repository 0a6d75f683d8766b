"""README.md and docs/: commands parse, settings exist, code compiles, links lead somewhere. No model is run."""

import ast
import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

import sva
from sva.tasks import SPLITS, from_jsonl, from_python

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_OTHERS = ("source", "export", "pip", "curl", "gcloud")  # commands of other programs


class Block(NamedTuple):
    """A fenced block."""

    page: str
    language: str
    code: str

    @property
    def file(self) -> str:
        """The name in a first line such as `# capitals.yaml`; "" where there is none."""
        first = re.match(r"# ([\w.]+\.(?:yaml|py))\n", self.code)
        return first[1] if first else ""


class Command(NamedTuple):
    """A command line that a page shows."""

    page: str
    words: tuple[str, ...]
    is_inline: bool  # in a sentence, where it may be the command's name alone

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def blocks(language: str) -> list[Block]:
    """Every block of a language, of all pages."""
    found = (Block(page.name, *block) for page in PAGES for block in _BLOCK.findall(page.read_text(encoding="utf-8")))
    return [block for block in found if block.language == language]


def spans(page: Path) -> list[str]:
    """What a page sets as code inside its sentences and tables."""
    return [" ".join(span.split()) for span in _SPAN.findall(_BLOCK.sub("", page.read_text(encoding="utf-8")))]


def commands() -> Iterator[Command]:
    """Every command line of all pages."""
    for block in blocks("sh"):
        for line in block.code.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield Command(block.page, tuple(words), False)
    for page in PAGES:
        for span in spans(page):
            if re.match(r"(?:sva|python) |scripts/\w", span):
                yield Command(page.name, tuple(shlex.split(span)), True)


def of(*programs: str) -> list[Command]:
    """The commands that start with one of these words."""
    return [command for command in commands() if command.words[0] in programs]


def is_understood(words: Sequence[str]) -> bool:
    """Whether `sva` takes these words: they are parsed, or prints the help it is asked for."""
    from sva.cli.main import parse

    try:
        parse(words)
    except SystemExit as stop:
        return not stop.code
    return True


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """A directory with the files that the pages show."""
    for block in [*blocks("yaml"), *blocks("python")]:
        if block.file:
            (tmp_path / block.file).write_text(block.code)
    for block in blocks("json"):
        (tmp_path / "rows.jsonl").write_text(block.code)
    return tmp_path


@pytest.mark.parametrize("command", of("sva"), ids=str)
def test_every_sva_command_parses(command: Command) -> None:
    words = list(command.words[1:])
    tries = [words]
    if command.is_inline:
        tries.append([*words, "X"])  # named with its options, without what it is about
        if not any(word.startswith("-") for word in words):
            tries.append([*words, "--help"])
    assert any(is_understood(words) for words in tries)


def test_every_command_is_of_a_known_program() -> None:
    scripts = {f"scripts/{path.name}" for path in (ROOT / "scripts").iterdir()}
    unknown = [str(command) for command in commands() if command.words[0] not in {"sva", "python", *_OTHERS, *scripts}]
    assert not unknown


def test_every_train_command_has_settings_that_exist(shown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sva.cli.main import parse
    from sva.training import config

    monkeypatch.chdir(ROOT)
    lines = [command.words[command.words.index("train") + 1 :] for command in commands() if "train" in command.words]
    runs = [words for words in lines if words and words[0].endswith(".yaml")]
    assert len(runs) >= 8
    for words in runs:
        _, asked = parse(["train", *words])
        file = str(asked.config)
        place = None if file == "CONFIG.yaml" else shown / file if (shown / file).exists() else ROOT / file
        config.load(place, asked.overrides)


def test_the_papers_runs_are_priced_from_their_own_reports() -> None:
    page = (ROOT / "docs" / "reproducing.md").read_text()
    for report in ("gsm8k-rollout", "gsm8k-update", "lora-update", "ia3-update"):
        file = ROOT / "experiments" / "benchmarks" / "compile" / f"paper-llama3-8b-{report}.json"
        (program,) = json.loads(file.read_text())["programs"].values()
        assert f"{program['bytes'] / 1e12:.3g} TB" in page


def test_settings_in_tables_exist() -> None:
    from sva.training import config

    named = [span for page in PAGES for span in spans(page) if re.fullmatch(r"[a-z_]+(\.[a-z_]+)?=[^ ]+", span)]
    known = config.settings()
    assert named
    assert [span for span in named if span.partition("=")[0] not in known] == []


def test_every_sweep_that_is_shown_has_cells(shown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sva.cli.sweep_file import read

    monkeypatch.chdir(ROOT)
    files = {Path(word) for command in of("sva") if command.words[1] == "sweep" for word in command.words[2:3]}
    own = [shown / block.file for block in blocks("yaml") if "grid:" in block.code]
    assert own
    for path in [*files, *own]:
        assert read(path), path


def test_every_configuration_that_is_shown_loads(shown: Path) -> None:
    from sva.training import config

    files = [shown / block.file for block in blocks("yaml") if "grid:" not in block.code]
    assert files
    for path in files:
        config.load(path)


def test_launchers_dry_runs_start_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    spec = importlib.util.spec_from_file_location("launch", ROOT / "scripts" / "launch.py")
    assert spec is not None
    assert spec.loader is not None
    launch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launch)

    def refuse(*arguments: object, **_: object) -> None:
        raise AssertionError(f"a dry run started {arguments}")

    monkeypatch.setattr(subprocess, "run", refuse)
    launched = [command.words[1:] for command in of("scripts/launch.py") if "--" in command.words]
    assert len(launched) >= 3
    for words in launched:
        cut = words.index("--")
        assert launch.main([*words[:cut], "--dry-run", *words[cut:]]) == 0
        assert "train" in capsys.readouterr().out


@pytest.mark.parametrize("command", of("python"), ids=str)
def test_every_experiment_is_there_with_its_options(command: Command) -> None:
    path, *words = command.words[1:]
    files = [ROOT / path]
    if path == "-m":  # a table of the paper; they share their options
        module, *words = words
        place = ROOT / module.replace(".", "/")
        script = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
        files = [script, ROOT / "experiments/paper/command.py"]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    assert [word for word in words if word.startswith("--") and f'"{word}"' not in text] == []


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: f"{block.page}: {block.file or block.code[:40]}")
def test_python_compiles_and_names_what_sva_has(block: Block) -> None:
    tree = ast.parse(block.code)
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sva"
    }
    assert used <= set(sva.__all__)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sva"):
            assert importlib.util.find_spec(str(node.module)), node.module


def test_the_readmes_python_has_at_most_ten_lines_of_code() -> None:
    (block,) = [block for block in blocks("python") if block.page == "README.md"]
    assert len([line for line in block.code.splitlines() if line.strip()]) <= 10


@pytest.mark.slow
@pytest.mark.network
def test_the_readmes_python_prints_what_the_readme_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        sva.load("smollm2-135m-instruct-q4_1", progress=False)
    except sva.UserError as error:
        pytest.skip(f"the model is not here: {error}")
    monkeypatch.chdir(ROOT)
    (block,) = [block for block in blocks("python") if block.page == "README.md"]
    (output,) = [block for block in blocks("text") if block.page == "README.md"]
    exec(compile(block.code, "README.md", "exec"), {})
    assert re.sub(r"\d+%", "", capsys.readouterr().out) == re.sub(r"\d+%", "", output.code)


def test_the_task_that_is_shown_in_python_grades(shown: Path) -> None:
    task = from_python(shown / "colours.py")
    for split in SPLITS:
        for example in task.source(split):
            assert task.grade(example["colour"].title() + ".", example).correct
            assert not task.grade("I do not know", example).correct


def test_the_rows_that_are_shown_are_a_task(shown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shown)
    exec(compile((shown / "make_rows.py").read_text(), "make_rows.py", "exec"), {})
    made = from_jsonl("first_word.jsonl")
    assert sum(len(made.source(split)) for split in SPLITS) == 336
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    own = from_jsonl("rows.jsonl")
    for task, row in [(own, rows[0]), (own, rows[1]), (made, made.source("test")[0])]:
        assert task.grade(f"It is {row['answer']}.", row).correct


# Links and names.


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings)
    return {re.sub(r"[\s-]+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_to_files_and_headings(page: Path) -> None:
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = page if not name else (page.parent / name).resolve()
        assert path.is_file(), target
        assert not anchor or anchor in slugs(path), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_in_sentences_are_there(page: Path) -> None:
    named = [
        path
        for span in spans(page)
        for path in re.findall(r"(?<![\w./~-])(?:experiments|configs|scripts|docs|tests|sva)/[\w./-]*", span)
    ]
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_readme_has_at_most_150_lines() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readmes_demo_table_is_what_the_result_says() -> None:
    result = json.loads((ROOT / "experiments/studies/demo/result.json").read_text())
    rows = re.findall(r"^\| ([\w -]+) \| ([\d.]+) % \| (.+) \|$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert {"base", "two-pass", "oracle dispatch"} <= {name for name, _, _ in rows}
    for name, everywhere, kinds in rows:
        assert everywhere == f"{100 * result['accuracy'][name]['mean']:.1f}", name
        assert kinds.split(" | ") == [f"{100 * share:.0f}" for share in result["by_kind"][name].values()], name


def test_the_api_page_has_every_public_name() -> None:
    named = re.findall(r"^::: sva\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(sva.__all__)


def test_concepts_says_what_every_package_holds() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8").partition("How the packages fit together")[2]
    packages = [path.parent.name for path in (ROOT / "sva").glob("*/__init__.py")]
    assert sorted(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == sorted(packages)


@pytest.mark.parametrize("name", ["models_page", "settings_page"])
def test_a_written_page_is_what_the_code_says(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), f"run python scripts/{name}.py"
