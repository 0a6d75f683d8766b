"""`sva serve` as a process: its mistakes, its caches, and its end."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading

import openai
import pytest
from served import toy_expert

from sva import load
from sva.cli.main import main


@pytest.fixture(scope="module")
def folder(toy, tmp_path_factory):
    found = tmp_path_factory.mktemp("serve")
    toy.save(found / "toy")
    toy_expert(load(str(found / "toy"), progress=False), 1, label="colour").save(found / "red.safetensors")
    return found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "99999"], "--port=99999 is not a port"),
        (["--rows", "0"], "--rows=0 must be at least 1"),
        (["--expert", "nowhere.safetensors"], "no expert file at nowhere.safetensors"),
        (["--token-file", "nowhere"], "--token-file nowhere cannot be read"),
        (["--host", "203.0.113.7"], "cannot listen on 203.0.113.7"),
    ],
)
def test_a_users_mistake_is_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr("sva.parallel.compile_cache.start", lambda: None)
    assert main(["serve", "--model", "./nowhere", "--port", "0", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_port_in_use_is_told_before_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("sva.parallel.compile_cache.start", lambda: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--model", "./nowhere", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


def test_sigterm_finishes_what_runs_and_refuses_what_comes(folder):
    arguments = ["--model", folder / "toy", "--expert", folder / "red.safetensors", "--port", "0", "--rows", "2"]
    command = [sys.executable, "-m", "sva.cli", "serve", *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "SVA_COMPILED": os.environ["JAX_COMPILATION_CACHE_DIR"]}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout is not None
        first = process.stdout.readline().split()
        assert first[:3] == ["serving", "toy", "at"]
        answers = []
        with openai.OpenAI(base_url=first[3], api_key="none", max_retries=0, timeout=60) as client:
            ask = dict(model="red", prompt="what", max_tokens=200, logit_bias={"1": -100}, n=8)
            thread = threading.Thread(target=lambda: answers.append(client.completions.create(**ask)))
            thread.start()
            stream = client.completions.create(stream=True, **ask | dict(n=1))
            next(iter(stream))
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            while "finishing what runs" not in process.stderr.readline():
                pass
            with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
                client.completions.create(model="red", prompt="what")
            assert list(stream)[-1].choices[0].finish_reason == "length"
            thread.join()
        assert len(answers[0].choices) == 8
        log = [json.loads(line) for line in process.stderr.read().splitlines() if line.startswith("{")]
        assert process.wait(timeout=30) == 0
    told = [line for line in log if line.get("path") == "/v1/completions"]
    assert {line["status"] for line in told} >= {200}
    assert all("what" not in json.dumps(line) for line in told)
