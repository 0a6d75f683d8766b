import pytest

from sva import config
from sva.errors import UserError


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
        ("reinforce.baseline=mean", "none or group"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(override, reason):
    with pytest.raises(UserError, match=reason) as caught:
        config.load(overrides=[override])
    assert "\n" not in str(caught.value)


def test_broken_or_absent_files_are_named(tmp_path):
    (tmp_path / "b.yaml").write_text("a: [1")
    for name in ("b.yaml", "none.yaml"):
        with pytest.raises(UserError, match=name):
            config.load(tmp_path / name)


def test_every_shipped_config_loads():
    from pathlib import Path

    for path in sorted(Path("configs").glob("*.yaml")):
        assert config.load(path).model == "smollm2-135m-instruct-q4_1"
