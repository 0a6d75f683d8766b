"""examples/colab.ipynb: committed without outputs, and run from top to bottom by a real kernel."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import sva
from sva.training.metrics import read

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "colab.ipynb"
SMALL = "steps, prompts, samples, held_out = 2, 4, 4, 8\nfolder = {!r}"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(cell):
    """What a cell wrote to standard output."""
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


def test_no_output_is_committed(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_pages_that_it_names_are_there(notebook):
    links = re.findall(r"\]\(([^)]+)\)", "".join(cell.source for cell in notebook.cells))
    assert links
    assert [link for link in links if not (NOTEBOOK.parent / link).is_file()] == []


def test_its_settings_are_in_one_cell_that_names_what_the_test_changes(notebook):
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    names = set(re.findall(r"^([\w, ]+) = ", cell.source, re.MULTILINE))
    assert {"steps", "prompts, samples", "held_out", "folder"} <= names


@pytest.mark.slow
def test_every_cell_runs_in_a_kernel(notebook, tmp_path, monkeypatch):
    try:
        sva.load("smollm2-135m-instruct-q4_1", progress=False)
    except sva.UserError as error:
        pytest.skip(f"the model is not here: {error}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", "")  # a real model runs long in the tests' unoptimised programs
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    cells = list(notebook.cells)
    cells.insert(place + 1, nbformat.v4.new_code_cell(SMALL.format(str(tmp_path / "bus"))))
    made = nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)
    # The kernel is this Python's own, whatever kernels the machine has.
    done = NotebookClient(made, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    by_id = {cell.id: cell for cell in done.cells}
    assert "The capital of Switzerland is Bern.   (countries," in printed(by_id["two"]).replace("\n  ", "\n")
    assert re.search(r"before: \d+% right.*\nafter: \d+% right.*n = 8", printed(by_id["train"]))
    assert any("image/png" in output.get("data", {}) for output in by_id["plot"].outputs)
    assert len(re.findall(r"\(\w+, \d+%\)", printed(by_id["use"]))) == 3
    (run,) = (tmp_path / "bus").glob("run-*")
    assert len(read(run / "metrics.jsonl")) == 2
    assert json.loads((run / "result.json").read_text())["n"] == 8
    assert sva.Expert.load(run / "expert.safetensors").metadata["label"] == "buses"
