from pathlib import Path

import pytest

from sva.models.hub import KNOWN
from sva.training import config
from sva.utils.errors import UserError


def test_overrides_win_over_the_file_and_defaults_fill_the_rest(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("task: sum2\ntrain: {steps: 3}\n")
    settings = config.load(path, ["train.steps=5", "seed=7"])
    assert (settings.task, settings.train.steps, settings.seed, settings.train.lr) == ("sum2", 5, 7, 1e-2)
    assert settings.run_dir == "runs/sum2-7"


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("train.stepz=3", "did you mean train.steps"),
        ("train.steps=many", "train.steps"),
        ("train.steps", "write name=value"),
        ("=3", "write name=value"),
        ("seed=[1", "'seed=.1' is not readable"),
        ("train=3", "train=3: "),
        ("task=${tsk}", "'task'.*tsk"),
        ("reinforce.baseline=median", "none, leave_one_out, mean, group, batch"),
        ("reinforce.kl_coef=-1", "must be at least 0"),
        ("parametrisation=sigmoid", "linear, sigmoid_nuclear"),
        ("parametrisation=core", "does not say r; write e.g. core:r=16"),
        ("parametrisation=core:r=0", "core:r=0 must be at least 1"),
        ("parametrisation=projected:n=13,k=2", "'k' is unknown"),
        ("train.param_dtype=float16", "train.param_dtype='float16' is not known; use float32 or bfloat16"),
        ("train.bound=0", "train.bound=0.0 must be above 0"),
        ("rollout.prompts=0", "rollout.prompts=0 must be at least 1"),
        ("rollout.samples=0", "rollout.samples=0 must be at least 1"),
        ("rollout.max_new_tokens=0", "rollout.max_new_tokens=0 must be at least 1"),
        ("rollout.temperature=-1", "rollout.temperature=-1.0 must be at least 0"),
        ("rollout.temperature=0", "greedy completions of one prompt are all the same"),
        ("train.steps=-1", "train.steps=-1 must be at least 0"),
        ("train.lr=0", "train.lr=0.0 must be above 0"),
        ("train.clip_norm=nan", "train.clip_norm=nan must be above 0"),
        ("train.micro_batch=0", "train.micro_batch=0 must be at least 1"),
        ("train.micro_batch=3", "no multiple of train.micro_batch=3"),
        ("evaluate.size=0", "evaluate.size=0 must be at least 1"),
        ("evaluate.batch_size=0", "evaluate.batch_size=0 must be at least 1"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(override, reason):
    with pytest.raises(UserError, match=reason) as caught:
        config.load(overrides=[override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"task: [1", b"- task", b"train: 3", b"\xff\xfe", None])
def test_broken_or_absent_files_are_named(content, tmp_path):
    path = tmp_path / "b.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"b\.yaml") as caught:
        config.load(path)
    assert "\n" not in str(caught.value)


def test_resolved_settings_read_back_as_the_same(tmp_path):
    settings = config.load(overrides=["task=routing", "routes=[sum3,other]", "train.lr=3e-3", "rollout.samples=2"])
    (tmp_path / "c.yaml").write_text(config.to_yaml(settings))
    assert config.load(tmp_path / "c.yaml") == settings
    assert settings.routes == ("sum3", "other")


def test_every_shipped_config_loads_and_names_weights_that_are_the_same_everywhere():
    for path in sorted(Path("configs").glob("*.yaml")):
        model = config.load(path).model
        is_packaged = model in KNOWN and KNOWN[model].hub_id is None
        assert is_packaged or (Path(model) / "config.json").is_file(), path


def test_weights_are_trained_on_in_float32_or_bfloat16():
    for dtype in ("float16", "int8"):
        with pytest.raises(UserError, match=f"dtype='{dtype}' is not for training; use float32 or bfloat16"):
            config.Config(dtype=dtype)


def test_a_configuration_made_directly_has_its_run_dir_too():
    assert config.Config(task="capitals", seed=3).run_dir == "runs/capitals-3"
    assert config.Config(task="~/rows.jsonl").run_dir == "runs/rows.jsonl-0"
    assert config.Config(run_dir="runs/${train.lr}").run_dir == f"runs/{config.Config().train.lr}"
    with pytest.raises(UserError, match="no_such"):
        config.Config(run_dir="runs/${no_such}")
