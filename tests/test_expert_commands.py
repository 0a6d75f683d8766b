"""`sva expert ...` end to end, on tiny checkpoints."""

import json
import re

import numpy as np
import pytest
import tiny
import torch

import sva
from sva.cli.main import main
from sva.spectral.expert import Expert

IDS = np.random.default_rng(0).integers(3, tiny.VOCAB, (2, 20))
MASK = np.ones_like(IDS)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, a larger one, a smaller one, and an expert of the first; the cache is its own."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVA_CACHE", str(folder / "cache"))
        patch.setattr("sva.parallel.compile_cache.start", lambda: None)  # would move JAX's cache under this module's
        tiny.make("llama", folder / "base")
        tiny.make("llama", folder / "large", seed=1, num_hidden_layers=4, intermediate_size=80, hidden_size=72)
        tiny.make("llama", folder / "small", seed=2, num_hidden_layers=2)
        lm = sva.load(str(folder / "base"), progress=False)
        rng = np.random.default_rng(0)
        raw = {name: rng.normal(0.1, 0.5, x.s.shape) for name, x in sva.decompose(lm, progress=False).items()}
        about = {"base": lm.name, "fingerprint": lm.fingerprint, "targets": "mlp", "task": "colours", "label": "hue"}
        Expert(raw, "sigmoid_nuclear", about).save(folder / "e.safetensors")
        (folder / "e.pt").write_bytes(b"no archive")
        yield folder


@pytest.fixture
def run(world, capsys, monkeypatch):
    """Runs `sva expert ...` with paths below the world's folder written as @name; gives (exit code, out, err)."""

    def command(*arguments):
        words = [str(word).replace("@", f"{world}/") for word in arguments]
        code = main(["expert", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return command


@pytest.fixture(scope="module")
def base(world):
    lm = sva.load(str(world / "base"), progress=False)
    expert = Expert.load(world / "e.safetensors")
    return lm, expert, expert.z(sva.decompose(lm, progress=False))


def test_every_action_explains_itself(capsys):
    for action in ("show", "relabel", "import", "export", "transfer"):
        with pytest.raises(SystemExit) as stop:
            main(["expert", action, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        assert f"sva expert {action}" in text
        assert len(text.splitlines()) > 8


def test_an_expert_takes_another_label_and_keeps_the_rest(run, world, tmp_path):
    out = tmp_path / "other.safetensors"
    code, said, _ = run("relabel", "@e.safetensors", "--label", "tint", "--description", "shades", "-o", out)
    assert (code, said) == (0, f"{out}: tint, which was hue; shades\n")
    was, now = Expert.load(world / "e.safetensors"), Expert.load(out)
    assert dict(now.metadata) == {**was.metadata, "label": "tint", "description": "shades"}
    assert all(np.array_equal(now.raw[name], raw) for name, raw in was.raw.items())
    code, _, err = run("relabel", "@e.safetensors", "--label", "tint", "-o", out)
    assert code == 2
    assert "exists; give another path" in err
    for label in ("", "two words", "other"):
        code, _, err = run("relabel", "@e.safetensors", "--label", label, "-o", tmp_path / "no.safetensors")
        assert (code, "must be one word" in err) == (2, True)


def test_an_exported_checkpoint_is_the_adapted_model_in_transformers(run, world, base, tmp_path):
    lm, _, z = base
    code, out, _ = run("export", "@e.safetensors", "--model", "@base", "--format", "hf", "-o", tmp_path / "hf")
    assert code == 0
    assert "30 weights" in out
    model = tiny.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    ours = np.asarray(lm.logits(IDS, MASK, z))
    assert np.abs(tiny.logits(model, IDS, MASK) - ours).max() < 3e-4
    assert np.abs(np.asarray(lm.logits(IDS, MASK)) - ours).max() > 0.1
    run(
        "export", "@e.safetensors", "--model", "@base", "--format", "hf", "-o", tmp_path / "half", "--dtype", "bfloat16"
    )
    half = tiny.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert half.dtype == torch.bfloat16
    for name, weight in model.named_parameters():
        assert torch.equal(half.get_parameter(name), weight.bfloat16()), name


def test_an_exported_gguf_file_is_the_adapted_model(run, base, tmp_path):
    lm, _, z = base
    code, out, _ = run("export", "@e.safetensors", "--model", "@base", "--format", "gguf", "-o", tmp_path / "x.gguf")
    assert code == 0
    assert "without a tokenizer" in out
    again = sva.load(str(tmp_path / "x.gguf"), progress=False)
    assert np.abs(np.asarray(again.logits(IDS, MASK)) - np.asarray(lm.logits(IDS, MASK, z))).max() < 3e-4


def test_an_exported_adapter_states_its_error(run, base, tmp_path):
    code, out, _ = run(
        "export", "@e.safetensors", "--model", "@base", "--format", "peft", "--rank", 5, "-o", tmp_path / "peft"
    )
    assert code == 0
    assert "9 matrices, rank 5 to 5 of 64; largest error of a matrix " in out
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 5
    assert "# colours" in (tmp_path / "peft" / "README.md").read_text()


def test_an_expert_of_lora_goes_to_pefts_files_as_it_is_and_comes_back(run, world, base, tmp_path):
    lm, rng = base[0], np.random.default_rng(0)
    name = "model.layers.1.mlp.up_proj.weight"
    raw = {name: {"a": rng.normal(size=(2, 64)).astype("f4"), "b": rng.normal(size=(96, 2)).astype("f4")}}
    about = {"base": lm.name, "fingerprint": lm.fingerprint}
    Expert(raw, "lora:r=2,alpha=4", about).save(tmp_path / "e.safetensors")
    export = ("export", tmp_path / "e.safetensors", "--model", "@base")
    code, out, _ = run(*export, "--format", "peft", "-o", tmp_path / "peft")
    assert (code, "LORA, 1 matrices, lora:r=2,alpha=4" in out) == (0, True)
    code, out, _ = run("import", tmp_path / "peft", "--model", "@base", "-o", tmp_path / "back.safetensors")
    assert (code, "PEFT LORA, 1 weights, lora:r=2,alpha=4" in out) == (0, True)
    assert Expert.load(tmp_path / "back.safetensors").digest == Expert.load(tmp_path / "e.safetensors").digest
    code, out, _ = run("show", tmp_path / "back.safetensors")
    assert (code, "1 weights, 320 values, lora:r=2,alpha=4" in out) == (0, True)
    for words, arguments in (
        ("this expert is of lora; leave them out", (*export, "--format", "peft", "--rank", 2, "-o", tmp_path / "x")),
        (
            "has no z, one number for",
            ("transfer", tmp_path / "e.safetensors", "--model", "@small", "-o", tmp_path / "x"),
        ),
        ("was trained on .*base", (*export[:3], "@small", "--format", "peft", "-o", tmp_path / "x")),
    ):
        code, _, err = run(*arguments)
        assert (code, bool(re.search(words, err))) == (2, True), err


def test_showing_an_expert_on_its_model_gives_tables_numbers_and_a_picture(run, base, tmp_path):
    lm, _, z = base
    code, out, _ = run("show", "@e.safetensors", "--model", "@base", "--plot", tmp_path / "x.png")
    assert code == 0
    assert '"task": "colours"' in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("mlp.")}
    assert rows.keys() == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert sum(map(float, rows["mlp.up_proj"][-3:])) == pytest.approx(100, abs=0.2)
    assert [line.split()[0] for line in out.splitlines()[-6:-2]] == ["layer", "0", "1", "2"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

    code, out, _ = run("show", "@e.safetensors", "--model", "@base", "--json")
    result = json.loads(out)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = np.asarray(lm.named_params()[name], "f8")
    change = np.asarray(sva.merge(lm, lm.spectra, z).named_params()[name], "f8") - weight
    assert result["weights"][name]["frobenius"] == pytest.approx(
        np.linalg.norm(change) / np.linalg.norm(weight), rel=1e-4
    )
    kind = [x["frobenius"] for key, x in result["weights"].items() if "up_proj" in key]
    assert result["kinds"]["mlp.up_proj"]["frobenius"] == pytest.approx(np.mean(kind))
    assert result["parametrisation"] == "sigmoid_nuclear"


def test_an_expert_moves_to_another_model_by_index(run, world, base, tmp_path):
    _, expert, z = base
    code, out, _ = run("transfer", "@e.safetensors", "--model", "@large", "-o", tmp_path / "t.safetensors")
    assert code == 0
    assert "9 weights" in out
    assert "9 of another length" in out
    large = sva.load(str(world / "large"), progress=False)
    moved = Expert.load(tmp_path / "t.safetensors", fingerprint=large.fingerprint)
    assert moved.parametrisation == "linear"
    for name, vector in z.items():
        np.testing.assert_array_equal(moved.raw[name], np.concatenate([vector, np.ones(8, "f4")]))
    assert moved.metadata["transferred_from"] == {
        "base": str(world / "base"),
        "fingerprint": expert.metadata["fingerprint"],
        "digest": expert.digest,
        "parametrisation": "sigmoid_nuclear",
        "shuffle": None,
    }
    assert {key: moved.metadata[key] for key in ("task", "label", "targets")} == {
        "task": "colours",
        "label": "hue",
        "targets": "mlp",
    }
    assert np.isfinite(np.asarray(large.logits(IDS, MASK, moved.z(sva.decompose(large, progress=False))))).all()

    run("transfer", "@e.safetensors", "--model", "@large", "-o", tmp_path / "s.safetensors", "--shuffle", 3)
    control = Expert.load(tmp_path / "s.safetensors")
    name = next(iter(z))
    assert not np.array_equal(control.raw[name], moved.raw[name])
    np.testing.assert_array_equal(np.sort(control.raw[name]), np.sort(moved.raw[name]))
    assert control.metadata["transferred_from"]["shuffle"] == 3


def test_a_pt_file_becomes_an_expert(run, world, tmp_path):
    lm = sva.load(str(world / "base"), progress=False)
    names = list(sva.decompose(lm, progress=False))
    torch.save(
        {name: torch.nn.Parameter(torch.randn(64).bfloat16()) for name in names}, tmp_path / "learnable_params.pt"
    )
    code, out, _ = run("import", tmp_path / "learnable_params.pt", "--model", "@base", "--label", "math")
    assert code == 0
    assert "learnable_params, 9 weights, sigmoid_nuclear" in out
    expert = Expert.load(tmp_path / "learnable_params.safetensors", fingerprint=lm.fingerprint)
    assert expert.metadata["label"] == "math"
    assert set(expert.raw) == set(names)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("show @none.safetensors", "no expert file at"),
        ("show @e.safetensors --plot x.png", "--plot needs the spectra"),
        ("show @e.safetensors --model @base --plot @e.safetensors", "exists"),
        ("show @e.safetensors --model @small", "was trained on"),
        ("import @none.pt --model @base", "cannot be read"),
        ("import @e.safetensors --model @base", "an expert of sva needs no import"),
        ("import @e.pt --model @base", "exists"),
        ("import @e.pt --model @base -o @new.safetensors", "not a file that torch.save wrote"),
        ("export @e.safetensors --model @base --format hf -o @base", "exists"),
        ("export @e.safetensors --model @base --format gguf -o @e.safetensors", "exists"),
        ("export @e.safetensors --model @small --format hf -o @new", "was trained on"),
        ("export @e.safetensors --model @base --format peft -o @new", "needs --rank or --tolerance"),
        ("export @e.safetensors --model @base --format hf -o @new --rank 3", "are for --format peft"),
        ("export @e.safetensors --model @base --format peft -o @new --rank 0", "--rank 0 must be at least 1"),
        ("export @e.safetensors --model @base --format peft -o @new --tolerance -1", "--tolerance -1.0 must be"),
        (
            "export @e.safetensors --model @base --format peft -o @new --tolerance 0.99",
            "nothing of this expert is left",
        ),
        ("transfer @e.safetensors --model @large -o @e.safetensors", "exists"),
        ("transfer @e.safetensors --model @large -o @new --shuffle -1", "--shuffle=-1 is not a seed"),
        ("transfer @e.safetensors --model @large -o @new --base @small", "was trained on"),
        ("transfer @e.safetensors --model @small -o @new", "lacks 3 of the expert's 9 weights: model.layers.2.mlp"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, words, run, world):
    code, _, err = run(*arguments.split())
    lines = [line for line in err.splitlines() if line.startswith("sva: ")]
    assert code == 2
    assert len(lines) == 1
    assert words in lines[0]
    assert not list(world.glob("new*"))


@pytest.mark.parametrize(("value", "words"), [(np.ones(5), r"\b5\b"), (np.full(64, np.nan), "NaN")])
def test_an_expert_that_does_not_fit_is_one_line(value, words, run, world, base, tmp_path):
    lm, expert, _ = base
    raw = dict(expert.raw) | {"model.layers.1.mlp.up_proj.weight": value}
    Expert(raw, "linear", expert.metadata).save(tmp_path / "bad.safetensors")
    for action in (["export", "--format", "hf", "-o", tmp_path / "new"], ["show"]):
        code, _, err = run(action[0], tmp_path / "bad.safetensors", "--model", "@base", *action[1:])
        assert code == 2
        assert re.search(words, err.splitlines()[-1])
        assert "model.layers.1.mlp.up_proj.weight" in err.splitlines()[-1]
