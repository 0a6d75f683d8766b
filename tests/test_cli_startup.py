"""Help and a user's mistakes are answered before JAX is imported, and files that are missing before a model is read."""

import json
import os
import subprocess
import sys

import pytest

_PROGRAM = """
import sys
from sva.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
import json
import os
print(json.dumps([code, [name for name in ("jax", "flax", "transformers") if name in sys.modules]]))
"""


def run(*words):
    """(exit code, which of the large libraries were imported, stderr) of a command in a process of its own."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM, *words], capture_output=True, text=True, check=True)
    return *json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bogus"], "invalid choice: 'bogus'"),
        (["train", "configs/smollm2-largest.yaml", "train.step=3"], "train.steps"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["evaluate", "largst"], "did you mean largest"),
        (["generate", "hello", "--classifier", "c.safetensors"], "name them with --expert"),
        (["decompose", "--share", "x"], "must be I/N"),
        (["sweep", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_is_answered_without_jax(words, told):
    code, imported, err = run(*words)
    assert (code, imported) == (2, [])
    assert told in err


def test_the_module_ends_with_the_commands_exit_code():
    done = subprocess.run([sys.executable, "-m", "sva.cli", "train", "nowhere.yaml"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere.yaml" in done.stderr


def test_help_is_shown_without_jax():
    assert run("--help") == (0, [], "")
    assert run("generate", "--help") == (0, [], "")


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "hello", "--expert"],
        ["generate", "hello", "--expert", "{expert}", "--alphas"],
        ["evaluate", "largest", "--expert"],
        ["evaluate", "largest", "--expert", "{expert}", "--classifier"],
        ["adapt", "largest", "--expert"],
        ["expert", "show", "--model", "toy"],
        ["expert", "export", "--format", "hf", "-o", "{new}"],
        ["expert", "transfer", "--model", "toy", "-o", "{new}"],
    ],
)
def test_a_missing_expert_or_mixture_is_told_before_a_model_is_loaded(words, tmp_path, monkeypatch, capsys):
    import numpy as np

    from sva.cli.main import main
    from sva.spectral.expert import Expert

    monkeypatch.setattr("sva.parallel.compile_cache.start", lambda: None)
    monkeypatch.setattr("sva.generation.load.load", lambda *_, **__: pytest.fail("a model was loaded"))
    expert = tmp_path / "e.safetensors"
    Expert({"a.weight": np.ones(3)}, "linear", {"task": "colours"}).save(expert)
    filled = [word.format(expert=expert, new=tmp_path / "new") for word in words]
    assert main([*filled, str(tmp_path / "none.safetensors")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "none.safetensors" in line


@pytest.mark.parametrize("words", [["--help"], ["sweep", "configs/sweeps/smollm2-procedural.yaml", "--dry-run"]])
def test_a_command_whose_reader_has_gone_ends_without_a_word(words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "sva.cli.main", *words], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode in (0, 1)  # argparse, which prints the help, passes over what it cannot write
