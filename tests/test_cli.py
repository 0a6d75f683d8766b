import pytest

from sva.cli.main import main
from sva.utils.errors import TransientError

COMMANDS = ("demo", "fetch", "decompose", "train", "evaluate", "generate", "serve", "expert", "report")


@pytest.fixture(autouse=True)
def tests_own_cache(monkeypatch):
    """A command moves JAX's compilation cache to the user's, where other processes write; not within the tests."""
    monkeypatch.setattr("sva.parallel.compile_cache.start", lambda: None)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"sva {command}" in text
    assert len(text.splitlines()) > 4


def test_the_overview_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "largst"], "did you mean largest"),
        (["evaluate", "largest", "--size", "0"], "--size=0 must be at least 1"),
        (["evaluate", "largest", "--split", "dev"], "splits are train, validation, test"),
        (["generate", "hello", "  "], "a prompt is empty"),
        (["generate", "hello", "--classifier", "c.safetensors"], "name them with --expert"),
        (["generate", "hello", "--model", "./nothing/here"], "nothing/here"),
        (["train", "no.yaml"], "no.yaml"),
        (["expert", "show", "no.safetensors"], "no expert file at no.safetensors"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, words, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("sva: ")
    assert len(shown.splitlines()) == 1
    assert words in shown


def test_a_fault_that_may_be_gone_at_the_next_try_is_one_line_and_exit_code_1(monkeypatch, capsys):
    def parse(_):
        raise TransientError("gs://bucket/run cannot be reached")

    monkeypatch.setattr("sva.cli.main.parse", parse)
    assert main(["train"]) == 1
    assert capsys.readouterr().err == "sva: gs://bucket/run cannot be reached\n"


def test_a_misspelt_setting_is_answered_with_the_nearest_one(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("task: largest\n")
    assert main(["train", str(path), "train.step=3"]) == 2
    assert "train.steps" in capsys.readouterr().err


def test_an_expert_file_is_shown(tmp_path, capsys):
    import numpy as np

    from sva.spectral.expert import Expert

    Expert({"a.weight": np.ones(3)}, "linear", {"task": "colours"}).save(tmp_path / "e.safetensors")
    assert main(["expert", "show", str(tmp_path / "e.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "1 weights, 3 values, linear" in shown
    assert '"task": "colours"' in shown
