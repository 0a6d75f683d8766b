"""`sva generate` end to end, on a toy model."""

import io
import json

import numpy as np
import pytest
import spoken

import sva
from sva.cli.main import main
from sva.generation.testing import toy_lm
from sva.utils.jsonl import RecordFile, read_prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVA_CACHE", str(folder / "cache"))
        patch.setattr("sva.parallel.compile_cache.start", lambda: None)  # would move JAX's cache under this module's
        toy_lm().save(folder / "toy")
        yield str(folder / "toy")


@pytest.fixture
def run(model, capsys):
    """Runs `sva generate ...` on the toy; gives (exit code, out, err without the bars)."""

    def command(*arguments):
        code = main(["generate", *map(str, arguments), "--model", model])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def _prompts(path, count):
    words = ("red", "green", "blue", "apple", "boat", "cloud", "door", "flag")
    lines = [json.dumps({"prompt": f"what {words[i % 8]} {words[i // 8 % 8]}"}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def _records(path):
    _, *records = (json.loads(line) for line in path.read_text().splitlines())
    return sorted(records, key=lambda record: (record["line"], record["sample"]))


def test_answers_come_in_order_and_a_single_one_as_it_is_written(run):
    prompts = ["what red boat", "name green", "the blue lamp", "of kite"]
    code, out, _ = run(*prompts, "--max-new-tokens", 6)
    lines = out.splitlines()
    assert (code, len(lines)) == (0, 4)
    for prompt, line in zip(prompts, lines, strict=True):
        assert run(prompt, "--max-new-tokens", 6)[1] == line + "\n"


def test_a_log_holds_lines_and_no_carriage_return(run, tmp_path):
    code, out, err = run("what red boat", "name green", "--max-new-tokens", 4, "--out", tmp_path / "answers.jsonl")
    assert (code, out) == (0, "")
    assert "\r" not in err
    assert "sva: generate: 2 of 2 rows after " in err


def test_samples_are_repeatable_and_differ_and_a_seed_moves_them(run):
    asked = ["what red boat", "--samples", 3, "--temperature", 1, "--max-new-tokens", 8, "--json"]
    first, again, other = (run(*asked, "--seed", seed)[1].splitlines() for seed in (1, 1, 2))
    first, again, other = ({json.loads(x)["sample"]: json.loads(x)["text"] for x in y} for y in (first, again, other))
    assert sorted(first) == [0, 1, 2]
    assert first == again
    assert len(set(first.values())) == 3
    assert first != other


def test_a_stop_string_ends_an_answer_and_is_said(run):
    free = json.loads(run("what red boat", "--max-new-tokens", 12, "--json")[1])
    word = free["text"].split()[3]
    cut = json.loads(run("what red boat", "--max-new-tokens", 12, "--json", "--stop", word)[1])
    assert (cut["reason"], free["reason"]) == ("stop", "length")
    assert cut["text"] == free["text"][: free["text"].index(word)]


def test_a_job_that_is_killed_goes_on_and_ends_with_what_one_run_gives(run, tmp_path, monkeypatch):
    asked = ["--file", _prompts(tmp_path / "p.jsonl", 20), "--max-new-tokens", 8, "--temperature", 0.8, "--rows", 4]
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    assert run(*asked, "--out", whole)[0] == 0
    add = RecordFile.add

    def interrupt(self, record):
        written = add(self, record)
        if len(parts.read_text().splitlines()) == 8:
            raise KeyboardInterrupt
        return written

    with monkeypatch.context() as patch:
        patch.setattr(RecordFile, "add", interrupt)
        code, _, err = run(*asked, "--out", parts)
    assert (code, len(_records(parts))) == (1, 7)
    assert "run the same command to resume from what is finished" in err
    with parts.open("a") as file:
        file.write('{"line": 9, "sam')  # as a kill leaves it
    assert run(*asked, "--out", parts)[0] == 0
    assert _records(parts) == _records(whole)
    assert [record["line"] for record in _records(whole)] == list(range(1, 21))
    assert run(*asked, "--out", parts)[0] == 0  # nothing left to do
    code, _, err = run(*asked, "--seed", 5, "--out", parts)
    assert code == 2
    assert "parts.jsonl was begun with other settings (seed: 0 there, 5 asked for)" in err
    (tmp_path / "notes.txt").write_text("mine\n")
    code, _, err = run(*asked, "--out", tmp_path / "notes.txt")
    assert (code, (tmp_path / "notes.txt").read_text()) == (2, "mine\n")


def test_answers_to_prompts_that_were_edited_since_are_not_kept(run, tmp_path):
    path, out = tmp_path / "p.txt", tmp_path / "out.jsonl"
    asked = ["--file", path, "--max-new-tokens", 2, "--out", out]
    path.write_text("what red\nwhat blue\n")
    assert run(*asked)[0] == 0
    path.write_text("what red\nwhat blue\nwhat green\n")
    assert run(*asked)[0] == 0
    before = out.read_text()
    assert [record["line"] for record in _records(out)] == [1, 2, 3]
    for edited in ("what red\nwhat door\nwhat green\n", "what red\nwhat blue\n"):
        path.write_text(edited)
        line = 2 if "door" in edited else 3
        code, _, err = run(*asked)
        assert (code, out.read_text()) == (2, before)
        assert f"out.jsonl answers another prompt than line {line} of {path}; choose another --out or delete it" in err


def test_answers_of_another_expert_at_the_same_path_are_not_kept(run, model, tmp_path):
    lm = sva.load(model, progress=False)
    about = {"fingerprint": lm.fingerprint, "base": "toy", "label": "red", "description": "what is red"}
    path, out = tmp_path / "e.safetensors", tmp_path / "out.jsonl"

    def saved(start, **more):
        names = sva.decompose(lm, "mlp", progress=False)
        raw = {name: np.full(len(x.s), start, np.float32) for name, x in names.items()}
        sva.Expert(raw, "linear", about | more).save(path)

    asked = ["what red", "--max-new-tokens", 2, "--expert", path, "--out", out]
    saved(1.1)
    assert run(*asked)[0] == 0
    moved = path.rename(tmp_path / "moved.safetensors")
    assert run(*asked[:-3], moved, *asked[-2:])[0] == 0  # nothing left to do
    for start, more in ((1.2, {}), (1.1, {"description": "what is blue"})):
        saved(start, **more)
        code, _, err = run(*asked)
        assert code == 2
        assert "out.jsonl was begun with other settings (experts: [{'label': 'red', " in err


def test_broken_lines_are_numbered_and_the_others_answered(run, tmp_path):
    path, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    long = json.dumps({"prompt": "red " * 300})
    path.write_bytes(
        b'{"prompt": "what red"}\n\n{"prompt": 3}\n{"pro\n\xff\xfe\n' + long.encode() + b'\n{"prompt": "blue"}'
    )
    code, _, err = run("--file", path, "--out", out, "--max-new-tokens", 4)
    assert code == 2
    for words in ("line 3 has no", "line 4 is not JSON", "line 5 is not UTF-8", "line 6 has 302 tokens"):
        assert words in err
    assert "4 of 6 lines were skipped" in err
    assert [record["line"] for record in _records(out)] == [1, 7]


def test_plain_lines_are_prompts():
    prompts, faults = read_prompts(io.BytesIO(b"one\r\n\n{two}\n"), "stdin", jsonl=False)
    assert [tuple(prompt) for prompt in prompts] == [(1, "one"), (3, "{two}")]
    assert faults == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--stop", ""], "--stop is empty"),
        (["x", "--top-p", "0"], "top_p=0.0 is outside"),
        (["x", "--top-p", "0.5", "--top-k", "3"], "top_k and top_p are two ways"),
        (["x", "--temperature", "-1"], "temperature=-1.0 must be above 0, or 0"),
        (["x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["x", "--max-new-tokens", "9000"], "context is 256"),
        ([" "], "prompt is empty"),
        ([], "give prompts as arguments or with --file"),
        (["x", "--file", "-"], "and not both"),
        (["--file", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["x", "--classifier", "c"], "--classifier chooses between experts"),
        (["x", "--choice", "soft"], "--choice is between experts"),
        (["x", "--expert", "e", "--choice", "sofd"], "--choice sofd is not known; use hard, soft or"),
        (["x", "--expert", "e", "--choice", "2"], "--choice 2 is not known; use hard, soft or a probability"),
    ],
)
def test_a_users_mistake_is_one_line(arguments, words, run):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("sva: ")]
    assert words in line


@pytest.fixture
def spoken_model(tmp_path, monkeypatch, capsys):
    """Saves a model of `spoken`; gives a function that runs `sva generate` on it, as (exit code, out)."""
    monkeypatch.setenv("SVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sva.parallel.compile_cache.start", lambda: None)

    def save(lm):
        folder = tmp_path / f"spoken{len(list(tmp_path.glob('spoken*')))}"
        lm.save(folder)

        def command(*arguments):
            code = main(["generate", *map(str, arguments), "--model", str(folder), "--raw"])
            return code, capsys.readouterr().out

        return command

    return save


def test_a_stop_that_is_a_special_token_ends_the_row_by_its_id(spoken_model):
    run = spoken_model(spoken.saying(spoken.byte_level(), "P", "a", "r", "i", "s", "<turn>", "u"))
    record = json.loads(run("ask", "--max-new-tokens", 24, "--json", "--stop", "<turn>")[1])
    assert {name: record[name] for name in ("text", "tokens", "reason")} == {
        "text": "Paris",
        "tokens": 6,
        "reason": "stop",
    }
    assert run("ask", "--max-new-tokens", 24, "--stop", "<turn>") == (0, "Paris\n")


def test_a_stop_that_no_text_can_hold_is_refused_before_the_results_are_begun(spoken_model, tmp_path):
    run = spoken_model(spoken.saying(spoken.byte_level(), "P", "<turn>"))
    assert run("ask", "--stop", "<turn>\n", "--out", tmp_path / "o.jsonl")[0] == 2
    assert not (tmp_path / "o.jsonl").exists()


def test_invalid_bytes_are_shown_as_they_decode_and_a_job_of_them_resumes(spoken_model, tmp_path):
    tokenizer = spoken.byte_fallback()
    run = spoken_model(spoken.saying(tokenizer, "<0x0A>", "<0xF0>", "c", "<end>", ends=(len(tokenizer) - 4,)))
    assert tokenizer.eos_token_id == len(tokenizer) - 4
    text = "\N{REPLACEMENT CHARACTER}" * 2 + "c"
    (tmp_path / "p.txt").write_text("ab\nab\n")
    for more in ((), ("--stop", "Q:"), ("--stop", "c!")):
        assert run("ab", "--max-new-tokens", 8, *more) == (0, text + "\n")
        code, out = run("ab", "--max-new-tokens", 8, "--json", *more)
        assert (code, json.loads(out)["text"], json.loads(out)["reason"]) == (0, text, "end")
        job = (
            "--file",
            tmp_path / "p.txt",
            "--max-new-tokens",
            8,
            "--out",
            tmp_path / f"o{len(more)}{more[-1:]}.jsonl",
        )
        for _ in range(2):
            assert run(*job, *more)[0] == 0
            assert [record["text"] for record in _records(job[-1])] == [text, text]


def test_text_that_a_stop_held_back_and_unfinished_characters_are_shown_when_the_row_ends(spoken_model):
    run = spoken_model(spoken.saying(spoken.byte_level(), "P", "Q", "âĺ", "<end>"))
    assert run("x", "--max-new-tokens", 2, "--stop", "Q:") == (0, "PQ\n")
    assert run("x", "--max-new-tokens", 3, "--stop", "Q:") == (0, "PQ\N{REPLACEMENT CHARACTER}\n")
    run = spoken_model(spoken.saying(spoken.byte_fallback(), "a", "<0x0A>", "b"))
    assert run("x", "--max-new-tokens", 2) == (0, "a\n\n")
    assert run("x", "--max-new-tokens", 9, "--stop", "\n") == (0, "a\n")
