"""What people write in settings, and what each setting makes of it: `utils.settings` through `config.load`."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sva.cli.main import main
from sva.training import config
from sva.training.config import SETTINGS, Config, load
from sva.utils.errors import UserError
from sva.utils.remote import local_path, to_path
from sva.utils.settings import override
from sva.utils.trees import nearest


def read(text, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return load(path)


def value(cfg, name):
    for part in name.split("."):
        cfg = getattr(cfg, part)
    return cfg


READ = [  # name, as it is written, what it is
    *(("wandb", text, None) for text in ("false", "False", "no", "off", "OFF", "none", "None", "null", "~", "")),
    *(("wandb", text, text.strip("\"'")) for text in ("mine", "'off'", '"false"', "2024")),
    *(("task", text, text) for text in ("010", "1e-3", "1:30", "2024-01-01", "2024-99-99", "1_000", "0x10", "1.50")),
    ("task", '"no"', "no"),
    ("task", "!!str no", "no"),
    ("task", "|\n  gsm8k\n", "gsm8k"),
    ("reinforce.baseline", "none", "none"),
    ("reinforce.baseline", "null", None),
    *(("train.lr", text, 1e-3) for text in ("1e-3", "'1e-3'", "1E-3", "0.001", ".001", "1.e-3", "+1e-3")),
    ("train.lr", "1", 1.0),
    ("train.clip_norm", ".inf", float("inf")),
    *(("seed", text, 1000) for text in ("1000", "'1000'", "1_000", "+1000", "0x3e8", "!!int 1000")),
    ("seed", "${train.steps}", 12),
    *(("rollout.score_eos", text, True) for text in ("true", "yes", "on", "1", "TRUE", "'true'", "Yes")),
    *(("rollout.score_eos", text, False) for text in ("false", "no", "off", "0", "'false'", "'no'")),
    ("routes", "[a, '1', 2024-01-01, 010]", ("a", "1", "2024-01-01", "010")),
    ("routes", "[]", ()),
    ("rollout.max_new_tokens", "null", None),
]


@pytest.mark.parametrize(("name", "text", "expected"), READ)
def test_a_value_is_read_by_its_settings_type_in_files_and_overrides(name, text, expected, tmp_path):
    assert value(read(f"{name}: {text}", tmp_path), name) == expected
    assert value(read(f"# why\n{name}: {text}\n", tmp_path), name) == expected
    assert value(load(overrides=[f"{name}={text}"]), name) == expected


REFUSED = [
    *(("task", text, "true or false") for text in ("no", "false", "on", "yes", "True", "off")),
    *((name, "no", "quote it") for name in ("model", "targets", "run_dir", "dtype", "reinforce.baseline", "kl")[:5]),
    ("wandb", "true", "needs text"),
    ("routes", "[gsm8k, no]", "true or false"),
    ("task", "null", "nothing is given"),
    ("task", "''", "empty"),
    ("task", "???", "not a value"),
    ("task", "[a]", "not a list"),
    ("task", "{a: b}", "not a mapping"),
    ("task", "*a", "undefined alias"),
    ("task", "@a", "in quotes"),
    ("model", "!!python/object:os.system x", "the tag"),
    ("routes", "a", r"write routes: \[a, b\]"),
    ("seed", "", "nothing is given"),
    ("seed", "010", "base eight"),
    ("seed", "1:30", "'1:30' is not a whole number"),
    ("seed", "1.0", "write 1$"),
    ("train.steps", "1e3", "write 1000"),
    ("seed", "true", "'true' is not a whole number"),
    ("seed", "[1]", "not a list"),
    ("train.examples", "None", "write null"),
    ("train.lr", "1/3", "not a number"),
    ("train.lr", "'1,5'", "not a number"),
    ("train.lr", "yes", "not a number"),
    ("train.lr", "010", "base eight"),
    ("train.lr", ".nan", "must be above 0"),
    ("train.lr", ".inf", "not finite"),
    ("guards.max_kl", ".nan", "no bound"),
    ("rollout.temperature", "inf", "finite"),
    ("rollout.temperature", "1e-9", "finite number of at least 1e-06"),
    ("rollout.score_eos", "2", "not true or false"),
    ("rollout.score_eos", "null", "nothing is given"),
    ("train", "false", "holds settings of its own"),
    ("train", "[1]", "a list"),
]


@pytest.mark.parametrize(("name", "text", "reason"), REFUSED)
def test_a_value_of_another_type_is_one_line_with_its_name(name, text, reason, tmp_path):
    for act in (lambda: read(f"{name}: {text}", tmp_path), lambda: load(overrides=[f"{name}={text}"])):
        with pytest.raises(UserError, match=reason) as caught:
            act()
        assert "\n" not in str(caught.value)
        assert name in str(caught.value) or "not readable as YAML" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed: 1\nseed: 2", "seed is set twice, in lines 1 and 2"),
        ("train: {lr: 1}\ntrain.lr: 2", r"train\.lr is set twice, once nested"),
        ("train:\n\tlr: 1", "line 2.*spaces, not tabs"),
        ("seed: 1\n---\nseed: 2", "another document"),
        ("hello", "one value; write one `name: value` a line"),
        ("- seed: 1", "a list; write one `name: value` a line"),
        ("? [a]\n: 1", "line 1: a name must be text"),
        ("<<: 3", "followed by a mapping"),
        ("[" * 3000, "not readable"),
        ("seed: \x00", "not readable"),
    ],
)
def test_a_file_that_is_no_list_of_settings_is_one_line_with_its_place(text, reason, tmp_path):
    with pytest.raises(UserError, match=reason) as caught:
        read(text, tmp_path)
    assert "c.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_files_and_sections_are_the_defaults_and_anchors_are_followed(tmp_path):
    for text in ("", "# nothing\n", "\ufeff# a byte-order mark\n", "train:\n  # lr: 1\nrollout:\n"):
        assert read(text, tmp_path) == Config(run_dir="runs/last_letter-0")
    assert read("train: &t {lr: 2, steps: 5}\n", tmp_path).train.lr == 2
    assert read("train: {<<: {lr: 2, steps: 5}, steps: 6}\n", tmp_path).train.steps == 6


@pytest.mark.parametrize(
    ("name", "hint"),
    [("train.lrr", "train.lr"), ("Train.lr", "train.lr"), ("lr", "train.lr"), ("train.train.lr", "train.lr")],
)
def test_an_unknown_name_is_told_of_with_the_nearest(name, hint, tmp_path):
    with pytest.raises(UserError, match=rf"unknown setting '{name}' \(did you mean.*{hint}"):
        read(f"{name}: 1", tmp_path)


def _values(setting):
    """What a setting of this type may hold, ranges apart."""
    if setting.words:
        return st.sampled_from(setting.words)
    texts = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)
    texts |= st.sampled_from(
        ["no", "off", "true", "010", "1e-3", "null", "~", "a: b", "a #b", "*x", "[a]", "'", "1:30"]
    )
    texts = texts.filter(lambda text: "$" not in text and "?" not in text)
    return {
        str: texts,
        int: st.integers(-(2**70), 2**70),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        tuple: st.lists(texts, max_size=3),
    }[setting.kind]


def _pick(names):
    return st.fixed_dictionaries({}, optional={name: _values(SETTINGS[name]) for name in names})


@settings(max_examples=150, deadline=None)
@given(_pick(sorted(SETTINGS)), st.randoms())
def test_what_is_written_nested_dotted_or_as_overrides_reads_the_same(tree, chance):
    mixed, nested = {}, {}
    for name, x in tree.items():
        section, _, last = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[last] = x
        if section and chance.random() < 0.5:
            mixed.setdefault(section, {})[last] = x
        else:
            mixed[name] = x
    found = []
    for written in (tree, nested, mixed):
        node = config.parse(yaml.safe_dump(written, allow_unicode=True), "here")
        leaves = config.leaves(config.pairs(node, "here"), SETTINGS, "here")
        found.append({name: config.value_of(x, SETTINGS[name], name, "here") for name, x in leaves})
    assert found == [tree] * 3
    for name, x in tree.items():
        assert config._of_override(override(name, x)) == {name: x}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(SETTINGS)) | st.text(min_size=1, max_size=12), st.text("_. aelrtz", max_size=3))
def test_suggestions_never_hold_the_refused_name(name, more):
    for refused in (name, name + more):
        hint = nearest(refused, SETTINGS)
        assert refused not in hint.removeprefix(" (did you mean ").removeprefix(" (known: ").rstrip("?)").split(", ")
        try:
            load(overrides=[f"{refused}=1"])
        except UserError as error:
            _, hinted, said = str(error).partition("(did you mean ")
            assert not hinted or refused.strip() not in said.rstrip("?)").split(", ")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory, and an empty one to work in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def test_a_tilde_is_the_home_directory_in_every_path(home, monkeypatch):
    assert to_path("~/a") == local_path("~/a", "x") == home / "a"
    assert to_path("a/~/b") == Path("a/~/b")
    assert to_path("~no_such_user/a") == Path("~no_such_user/a")  # as a shell has it
    from sva.utils import paths

    for name, where in (
        ("SVA_CACHE", paths.cache_dir),
        ("SVA_SPECTRA", paths.spectra_dir),
        ("SVA_DATA", paths.data_dir),
    ):
        monkeypatch.setenv(name, "~/there")
        (home / "there").mkdir(exist_ok=True)
        assert where() == home / "there"
    monkeypatch.setenv("SVA_CACHE", "gs://bucket/cache")
    with pytest.raises(UserError, match=r"gs://bucket/cache: \$SVA_CACHE must be on this machine"):
        paths.cache_dir()


def test_settings_files_run_directories_and_sweeps_are_found_at_home(home):
    (home / "c.yaml").write_text("run_dir: ~/runs/x\ntask: ~/q.jsonl\n")
    assert to_path(load("~/c.yaml").run_dir) == home / "runs/x"
    assert load(overrides=["task=~/data/q.jsonl"]).run_dir == "runs/data/q.jsonl-0"
    (home / "s.yaml").write_text("config: ~/c.yaml\ndir: ~/cells\ngrid: {seed: [0, 1]}\n")
    from sva.cli import sweep_file

    cells = sweep_file.read(Path("~/s.yaml"))
    assert [cell.run_dir for cell in cells] == [home / "cells/seed=0", home / "cells/seed=1"]
    assert load(cells[0].config, cells[0].words[2:]).run_dir == str(home / "cells/seed=0")


def test_every_path_option_takes_a_tilde_and_refuses_an_address(home, capsys):
    from sva.cli.main import parse

    _, parsed = parse(["evaluate", "largest", "--out=~/r.jsonl", "--expert=~/e", "--alphas=~/a"])
    assert (parsed.out, parsed.expert, parsed.alphas) == (home / "r.jsonl", (home / "e",), home / "a")
    _, parsed = parse(["expert", "export", "~/e", "--format=peft", "--out=~/o", "--rank=1"])
    assert (parsed.expert, parsed.out) == (home / "e", home / "o")
    (home / "p.txt").write_text("")
    assert main(["generate", "--file=~/p.txt"]) == 2
    assert "holds no prompt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(["adapt", "largest", "--out=gs://b/a.json"])
    assert "must be on this machine" in capsys.readouterr().err
    assert not list(Path.cwd().iterdir())


def test_every_setting_has_a_type_that_is_read():
    assert {setting.kind for setting in SETTINGS.values()} == {str, int, float, bool, tuple}
    flat = json.loads(json.dumps(dataclasses.asdict(Config())))
    assert sum(len(x) if isinstance(x, dict) else 1 for x in flat.values()) == len(SETTINGS)
