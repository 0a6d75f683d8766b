"""What a run would take, said before anything is fetched."""

import json
from pathlib import Path

import huggingface_hub
import pytest

from sva.cli import dry_run
from sva.cli.main import main
from sva.generation.testing import toy_config
from sva.models import hub, packaged
from sva.models.config import to_hf
from sva.models.shape import SHIPPED, model_config
from sva.training import config
from sva.utils.errors import UserError

CONFIGS = Path(__file__).parent.parent / "configs" / "paper"
REPORTS = Path(__file__).parent.parent / "experiments" / "benchmarks" / "compile"
MODELS = ("llama3-8b", "mistral-7b", "llama3-70b")
TASKS = ("gsm8k", "mbpp", "arc_easy")


@pytest.fixture(autouse=True)
def _counted_offline(monkeypatch, tmp_path):
    """No libtpu, whose compiler takes minutes; no network; nothing in any cache."""
    monkeypatch.setattr(dry_run.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("SVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_in_hub_cache", lambda hub_id: None)

    def refuse(*arguments, **_):
        raise AssertionError(f"a dry run fetched {arguments}")

    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    monkeypatch.setattr(packaged, "_download", refuse)


def estimate(name, topology="v5e:4x4", *overrides):
    return dry_run.estimate(config.load(CONFIGS / f"{name}.yaml", overrides), topology=topology, prompt_tokens=255)


def test_there_is_a_file_for_each_model_task_and_source():
    wanted = {f"{model}-{task}{kind}.yaml" for model in MODELS for task in TASKS for kind in ("", "-public")}
    assert {path.name for path in CONFIGS.iterdir()} == wanted
    for path in CONFIGS.iterdir():
        cfg = model_config(config.load(path).model)
        assert cfg.num_layers == (80 if "70b" in path.name else 32)
        assert f"sva compile configs/paper/{path.name} " in path.read_text()


def test_the_papers_settings_are_those_of_its_table_6():
    for model in MODELS:
        for task in TASKS:
            found = config.load(CONFIGS / f"{model}-{task}.yaml")
            assert (found.train.lr, found.train.clip_norm, found.rollout.prompts) == (2e-3, 1e-3, 256)
            assert (found.train.optimizer, found.train.schedule, found.parametrisation) == ("adamw", "cosine", "linear")
            assert found.layers == ("0-39" if model == "llama3-70b" else None)
            public = config.load(CONFIGS / f"{model}-{task}-public.yaml")
            assert (public.grader, public.splits, public.train.param_dtype) == ("reference", "reference", "bfloat16")
            assert (public.rollout.temperature, public.rollout.score_eos) == (0, False)


# The others of a model are these with another task: see the next test.
@pytest.mark.parametrize("name", ["gsm8k", "mbpp-public"])
@pytest.mark.parametrize("model", MODELS)
def test_every_file_fits_its_pod(model, name):
    for topology in ("v5e:4x4", "v5p:2x2x4") if model == "llama3-70b" else ("v5e:4x4",):
        result = estimate(f"{model}-{name}", topology)
        assert result["memory"]["run"]["fits"]
        assert result["steps"] == 100
        assert result["fetch"].keys() >= {"model", "spectra"}


@pytest.mark.parametrize("model", MODELS)
def test_files_of_one_model_hold_the_same(model):
    def held(name):
        found = config.load(CONFIGS / f"{model}-{name}.yaml")
        return found.model, found.dtype, found.targets, found.layers, found.rollout, found.train, found.mesh

    assert held("gsm8k") == held("mbpp") == held("arc_easy")
    assert held("gsm8k-public") == held("arc_easy-public")


def test_what_is_counted_is_what_the_compiler_was_given():
    counted = estimate("llama3-8b-gsm8k")["memory"]
    compiled = json.loads((REPORTS / "paper-llama3-8b-gsm8k-update.json").read_text())
    assert counted["run"]["resident"] == compiled["run"]["resident"]
    for name in ("update", "rollout"):
        compiled = json.loads((REPORTS / f"paper-llama3-8b-gsm8k-{name}.json").read_text())
        memory = compiled["programs"][name]["memory"]
        del memory["temporaries"]
        assert counted["programs"][name]["memory"] == memory


def test_half_of_the_layers_takes_half_of_the_spectra():
    half, whole = (estimate("llama3-70b-gsm8k", "v5p:2x2x4", *more) for more in ((), ["layers=null"]))
    sizes = [each["memory"]["run"]["resident"]["spectra"] for each in (half, whole)]
    assert sizes[0] * 2 == sizes[1]
    with pytest.raises(UserError, match="layers=0-80: the model has 80 layers, 0 to 79"):
        estimate("llama3-70b-gsm8k", "v5e:4x4", "layers=0-80")


def test_tokens_are_counted_whole():
    found = dry_run.tokens(
        config.load(CONFIGS / "llama3-8b-gsm8k.yaml", ["train.steps=10", "validation.every=5"]), 100, 512
    )
    assert found == {
        "read": 10 * 256 * 100,
        "generated": 10 * 256 * 512,
        "trained": 10 * 256 * 612,
        "evaluated": (2 * 1319 + 3 * 128) * 612,
    }


def test_the_command_prints_steps_tokens_memory_and_what_is_to_be_fetched(capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "data_dir", lambda: None)
    command = ["train", str(CONFIGS / "llama3-8b-gsm8k.yaml"), "--dry-run", "--topology", "v5e:4x4"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "gsm8k on meta-llama/Meta-Llama-3-8B-Instruct: 100 steps, 256 completions a step" in printed
    assert "13,107,200 generated in rollouts" in printed
    assert "model: meta-llama/Meta-Llama-3-8B-Instruct, about 16.1 GB" in printed
    assert "data: gsm8k from github.com/openai/grade-school-math" in printed
    assert "fits" in printed
    assert "temporaries" in printed
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["devices"] == 16


def test_a_run_that_does_not_fit_is_told_in_one_line_with_what_to_change(capsys):
    command = ["train", str(CONFIGS / "llama3-70b-gsm8k.yaml"), "--dry-run", "--topology", "v5e:2x4"]
    command[2:2] = ["train.micro_batch=8"]
    assert main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sva: this run does not fit v5e:2x4: ")
    assert "twice the devices on mesh.fsdp" in error


def test_a_run_that_does_not_fit_is_refused_before_its_model_is_fetched(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(dry_run, "accelerator_bytes", lambda: 24 * 2**30)
    command = ["train", str(CONFIGS / "llama3-8b-gsm8k.yaml"), f"run_dir={tmp_path / 'run'}", "mesh.fsdp=1"]
    assert main(command) == 2
    assert "this run does not fit" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_directory_that_holds_a_config_alone_is_a_shape(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_hf(toy_config())))
    assert model_config(str(tmp_path)) == toy_config()
    assert {path.parent.name for path in SHIPPED.glob("*/config.json")} == {
        "llama-3-8b",
        "llama-3-70b",
        "mistral-7b-v0.3",
        "mixtral-8x7b-v0.1",
        "qwen3-30b-a3b",
    }


def test_an_unknown_pod_is_one_line():
    for topology in ("v9:4x4", "v5e:four"):
        with pytest.raises(UserError, match=f"--topology {topology}"):
            estimate("llama3-8b-gsm8k", topology)


def test_a_populations_answers_are_those_of_all_its_members_and_given_answers_are_not_generated():
    configs = CONFIGS.parent
    searched = config.load(configs / "smollm2-last_letter-es.yaml", ["model=toy"])
    found = dry_run.tokens(searched, 100, 16)
    assert (found["read"], found["generated"]) == (30 * 8 * 16 * 100, 30 * 8 * 16 * 16)
    given = config.load(configs / "smollm2-last_letter-sft.yaml", ["model=toy"])
    assert dry_run.tokens(given, 100, 16) | {"evaluated": 0} == {
        "read": 0,
        "generated": 0,
        "trained": 20 * 32 * 116,
        "evaluated": 0,
    }


def test_what_is_of_a_dry_run_alone_is_refused_without_it(capsys):
    path = str(CONFIGS / "llama3-8b-gsm8k.yaml")
    for words in (["--topology", "v5e:4x4"], ["--prompt-tokens", "9"]):
        assert main(["train", path, *words]) == 2
        assert f"{words[0]} is for --dry-run" in capsys.readouterr().err


def test_one_device_of_several_is_a_mesh_that_is_here(monkeypatch):
    devices = dry_run.jax.devices()
    monkeypatch.setattr(dry_run.jax, "devices", lambda: devices * 4)
    own = ["model=configs/models/llama-3-8b", "train.steps=1"]
    found = dry_run.estimate(
        config.load(CONFIGS.parent / "smollm2-last_letter-sft.yaml", own), topology=None, prompt_tokens=9
    )
    assert found["memory"]["devices"] == 1
    text = dry_run.text(found)
    assert "32 answers a step\n" in text
    assert "32 rows" in text


def test_a_mesh_of_more_devices_than_are_here_is_pointed_to_the_topology(capsys):
    assert main(["train", str(CONFIGS.parent / "llama3-8b-v5e-16.yaml"), "--dry-run"]) == 2
    assert "makes 16 devices, but there are 1: add --topology, e.g. v5e:4x4" in capsys.readouterr().err
