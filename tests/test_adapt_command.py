"""`sva adapt` end to end, and what `sva generate` and `sva evaluate` do with its file, on a toy model."""

import json

import pytest
from test_few_shot import experts

import sva
from sva.cli.main import main
from sva.generation import chat
from sva.generation.testing import COLOURS, THINGS, toy_lm

QUESTIONS = [f"what colour the {thing} of the {other} ?" for thing in THINGS for other in COLOURS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVA_CACHE", str(folder / "cache"))
        patch.setattr("sva.parallel.compile_cache.start", lambda: None)  # would move JAX's cache under this module's
        lm = toy_lm()
        lm.save(folder / "toy")
        lm = sva.load(str(folder / "toy"), progress=False)
        spectra = sva.decompose(lm, "mlp", progress=False)
        made = experts(spectra)
        for name, expert in zip("abc", made, strict=True):
            metadata = {"fingerprint": lm.fingerprint, "base": "toy", "label": name, "description": f"a {name}"}
            sva.Expert(expert.raw, "linear", metadata).save(folder / f"{name}.safetensors")
            sva.Expert(expert.raw, "sigmoid_nuclear", metadata).save(folder / f"{name}{name}.safetensors")
        foreign = {"fingerprint": "f" * 64, "base": "another", "label": "x", "description": "an x"}
        sva.Expert(made[0].raw, "linear", foreign).save(folder / "x.safetensors")
        # What the first expert says is right: some mixtures say it, and some do not.
        merged = sva.merge(lm, spectra, made[0].z(spectra))
        out = merged.generate(*chat.encode(lm, [chat.render(lm, question) for question in QUESTIONS]), 1)
        said = chat.decode(lm, out.tokens, out.lengths)
        for name, answers in (("own", said), ("never", ["engine"] * len(said))):
            pairs = [(question, answer) for question, answer in zip(QUESTIONS, answers, strict=True) if answer.strip()]
            lines = [json.dumps({"prompt": question, "answer": answer}) for question, answer in pairs]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        yield folder


@pytest.fixture
def run(folder, capsys, monkeypatch):
    """Runs `sva ...` in the folder on the toy; gives (exit code, out, err)."""
    monkeypatch.chdir(folder)

    def command(name, *arguments, experts="ab"):
        chosen = [part for expert in experts for part in ("--expert", f"{expert}.safetensors")]
        code = main([name, *map(str, arguments), *chosen, "--model", "toy"])
        return code, *capsys.readouterr()

    return command


ADAPT = ["own.jsonl", "--shots", 4, "--population", 10, "--max-new-tokens", 1, "--rows", 8]


def test_the_command_goes_on_where_it_stopped_and_ends_the_same(run, folder):
    assert run("adapt", *ADAPT, "--iterations", 3, "--out", "whole.json")[0] == 0
    assert run("adapt", *ADAPT, "--iterations", 1, "--out", "parts.json")[0] == 0
    code, out, _ = run("adapt", *ADAPT, "--iterations", 3, "--out", "parts.json")
    whole, parts = (json.loads((folder / f"{name}.json").read_text()) for name in ("whole", "parts"))
    assert {**whole, "command": 0} == {**parts, "command": 0}
    assert len(whole["history"]) == 3
    assert 0 < whole["history"][0]["mean"] < whole["history"][0]["best"]
    assert (code, "3 generations" in out, "alphas: parts.json" in out) == (0, True, True)
    again = run("adapt", *ADAPT, "--iterations", 3, "--out", "parts.json", "--seed", 1)
    assert (again[0], "holds another search" in again[2], "seed: 0 there, 1 asked for" in again[2]) == (2, True, True)


@pytest.mark.parametrize("more", [[], ["--per-matrix"]])
def test_generate_and_evaluate_take_the_file(run, folder, more):
    out = f"alphas{len(more)}.json"
    assert run("adapt", *ADAPT, *more, "--iterations", 2, "--out", out)[0] == 0
    found = json.loads((folder / out).read_text())
    assert isinstance(found["alphas"], dict if more else list)
    lm = sva.load("toy", progress=False)
    zs = [sva.Expert.load(f"{name}.safetensors").z(sva.decompose(lm, "mlp", progress=False)) for name in "ab"]
    merged = sva.merge(lm, sva.decompose(lm, "mlp"), sva.mix(zs, found["alphas"]))
    answered = run("generate", "what red boat", "--max-new-tokens", 6, "--alphas", out, "--json", experts="ba")
    ids, mask = chat.encode(merged, [chat.render(merged, "what red boat")])
    theirs = merged.generate(ids, mask, 6, chat.end_tokens(merged))
    assert json.loads(answered[1])["text"] == chat.decode(merged, theirs.tokens, theirs.lengths)[0]
    asked = ["evaluate", "own.jsonl", "--split", "train", "--size", 99]
    code, text, err = run(*asked, "--alphas", out, "--json", "--out", f"{out}l")
    result = json.loads(text)
    left = int(err.partition(" of ")[0].rpartition(" ")[2])
    whole = json.loads(run(*asked, "--json", experts="")[1])
    assert (code, result["n"], result["alphas"]) == (0, whole["n"] - left, found["alphas"])
    assert left >= 4
    assert f"{left} of {whole['n']} rows are shots that {out} was chosen by: left out, n = {result['n']}" in err
    code, text, _ = run("evaluate", "--compare", f"{out}l", whole["records"], "--json", experts="")
    assert (code, json.loads(text)["n"]) == (0, result["n"])


@pytest.mark.parametrize(
    "how",
    [
        ["gradient"],
        ["gradient", "--objective", "accuracy"],
        ["vote"],
        ["cem", "--temperature", 1],
        ["cem", "--reference"],
        ["cem", "--race", 2],
    ],
)
def test_every_method_goes_on_where_it_stopped(run, folder, how):
    for name, parts in (("a", [3]), ("b", [1, 3])):
        for iterations in parts:
            out = f"{'-'.join(map(str, how))}-{name}.json"
            pair = ("aa", "bb") if "--reference" in how else "ab"
            told = run("adapt", *ADAPT, "--iterations", iterations, "--out", out, "--method", *how, experts=pair)
            assert told[0] == 0, told[2]
    a, b = (json.loads((folder / f"{'-'.join(map(str, how))}-{name}.json").read_text()) for name in "ab")
    assert {**a, "command": 0} == {**b, "command": 0}
    assert a["alphas"] not in ([0.5, 0.5], [0, 0]) or "--reference" in how


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        ("bfloat16", []),
        ("bfloat16", ["--method", "gradient"]),
        ("int8", ["--method", "gradient"]),
        ("int8", ["--kv-dtype", "int8"]),
    ],
)
def test_a_search_in_another_precision_says_so_and_is_another_search(run, folder, dtype, how):
    out = f"{dtype}{how[-1:]}.json"
    asked = [*ADAPT, *how, "--iterations", 1, "--out", out]
    assert run("adapt", *asked, "--dtype", dtype)[0] == 0
    assert json.loads((folder / out).read_text())["settings"]["dtype"] == dtype
    code, _, err = run("adapt", *asked)
    assert (code, f"dtype: {dtype} there, None asked for" in err) == (2, True)


def test_an_expert_of_another_base_is_left_out_where_that_is_asked_for(run, folder):
    code, _, err = run("adapt", *ADAPT, "--iterations", 1, "--out", "left.json", "--skip-foreign", experts="axb")
    assert code == 0
    assert "left out, for they were not trained on toy: x.safetensors (another)" in err
    assert [known["label"] for known in json.loads((folder / "left.json").read_text())["experts"]] == ["a", "b"]


def test_shots_that_no_member_answers_leave_the_base_and_say_so(run, folder):
    code, out, _ = run("adapt", "never.jsonl", *ADAPT[1:], "--iterations", 1, "--out", "never.json")
    assert (code, "no member answered any shot right" in out) == (0, True)
    assert json.loads((folder / "never.json").read_text())["alphas"] == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "names", "words"),
    [
        (["adapt", *ADAPT], "", "name experts with --expert"),
        (["adapt", *ADAPT], "aba", "expert 3 is the same as expert 1"),
        (["adapt", *ADAPT, "--reference"], "a", "name another one"),
        (["adapt", *ADAPT, "--reference", "--method", "gradient"], "ab", "leave it out"),
        (["adapt", *ADAPT], "axb", "x.safetensors (another); leave them out, or pass --skip-foreign"),
        (["adapt", *ADAPT, "--method", "gradient", "--kv-dtype", "int8"], "ab", "use --kv-dtype bfloat16"),
        (
            ["adapt", *ADAPT, "--method", "vote", "--objective", "accuracy"],
            "ab",
            "--objective is for --method gradient",
        ),
        (["adapt", *ADAPT, "--race", 0], "ab", "--race=0 must be at least 1"),
        (["adapt", *ADAPT, "--iterations", 0], "ab", "--iterations=0 must be at least 1"),
        (["adapt", "own.jsonl", "--population", 4], "ab", "--population 4 has no two elites"),
        (["adapt", "own.jsonl", "--shots", 0], "ab", "--shots=0 must be at least 1"),
        (["adapt", "own.jsonl", "--shots", 99], "ab", "shots=99, but train has"),
        (["generate", "what", "--alphas", "none.json"], "ab", "no alphas file at none.json"),
        (["generate", "what", "--alphas", "none.json"], "", "name its experts with --expert"),
        (["evaluate", "own.jsonl", "--alphas", "none.json"], "", "name its experts with --expert"),
    ],
)
def test_bad_input_is_one_line(run, arguments, names, words):
    code, _, err = run(*arguments, experts=names)
    assert code == 2
    said = [line for line in err.splitlines() if line.startswith("sva: ")]
    assert (len(said), words in said[-1]) == (1, True)
