"""`sva expert push | pull`, cards, and experts of the Hub: the Hub is a folder, called as its library is."""

import functools
import inspect
import json
import shutil
from pathlib import Path

import httpx2
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import ModelInfo

import sva
from sva.adaptation.mixture_file import Alphas, identities
from sva.cli.main import main
from sva.cli.options import ExpertOptions, with_experts_here
from sva.sharing import redact
from sva.sharing.hub import Repo, repo_of
from sva.spectral.expert import Expert
from sva.utils.errors import UserError

CAPITALS = Path(sva.__file__).parent / "assets" / "capitals.safetensors"
REPO = "me/thing"
HOME = "/secret/ann"


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory):
    """A folder with an expert, two experts and their mixture, and a checkpoint with the first merged into it."""
    folder = tmp_path_factory.mktemp("made")
    spectra = sva.decompose(toy, "mlp", progress=False)
    found = []
    for number in (1, 2):
        rng = np.random.default_rng(number)
        raw = {name: rng.uniform(0.5, 1.5, len(x.s)).astype("f4") for name, x in spectra.items()}
        about = {"base": "owner/toy", "fingerprint": toy.fingerprint, "targets": "mlp", "label": f"kind{number}"}
        found.append(Expert(raw, "linear", about))
        found[-1].save(folder / f"e{number}.safetensors")
    record = {"settings": {"task": "copy", "shots": 3, "seed": 7, "experts": ["x"]}, "command": "sva adapt copy"}
    base = {"name": "owner/toy", "fingerprint": toy.fingerprint}
    Alphas([0.25, 0.75], identities(found), base, record=record).save(folder / "mixture.json")
    sva.merge(toy, spectra, found[0].z(spectra)).save(folder / "checkpoint")
    return folder


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs `sva expert ...` in a directory of its own; gives (exit code, out, err)."""
    monkeypatch.setattr("sva.parallel.compile_cache.start", lambda: None)  # would move JAX's cache under these tests
    monkeypatch.chdir(tmp_path)

    def command(*words):
        code = main(["expert", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return command


def pushed(kind, made):
    """The words of `sva expert push` for one of each kind."""
    mixed = [word for number in (2, 1) for word in ("--expert", made / f"e{number}.safetensors")]  # in any order
    return {
        "expert": [made / "e1.safetensors", REPO],
        "mixture": [made / "mixture.json", REPO, *mixed],
        "checkpoint": [made / "checkpoint", REPO, "--expert", made / "e1.safetensors"],
    }[kind]


def same_bytes(kind, made, back):
    """Whether what was pulled is what was pushed, byte for byte."""
    if kind == "expert":
        return back.read_bytes() == (made / "e1.safetensors").read_bytes()
    if kind == "checkpoint":
        pairs = {path.name: path for path in (made / "checkpoint").iterdir()}
    else:
        pairs = {f"expert-{n}.safetensors": made / f"e{n}.safetensors" for n in (1, 2)}
        pairs["alphas.json"] = made / "mixture.json"
    names = {path.name for path in back.iterdir()}
    return names == {*pairs, "README.md"} and all(
        (back / name).read_bytes() == path.read_bytes() for name, path in pairs.items()
    )


KINDS = ("expert", "mixture", "checkpoint")


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_dry_run_writes_is_pulled_bit_for_bit(kind, made, run, tmp_path):
    code, out, _ = run("push", *pushed(kind, made), "--dry-run", "-o", "folder")
    assert code == 0
    assert "nothing was sent" in out
    assert (tmp_path / "folder" / "README.md").is_file()
    code, out, _ = run("pull", "folder", "-o", "back")
    assert (code, out.partition(":")[0]) == (0, "back")
    assert same_bytes(kind, made, tmp_path / "back")
    text = "".join(path.read_text() for path in (tmp_path / "folder").iterdir() if path.suffix != ".safetensors")
    assert str(tmp_path.parent) not in text


def test_names_of_folder_and_file_follow_the_repository(made, run, tmp_path):
    run("push", made / "e1.safetensors", REPO, "--dry-run")
    assert sorted(path.name for path in (tmp_path / "thing").iterdir()) == ["README.md", "expert.safetensors"]
    run("pull", "thing")
    assert same_bytes("expert", made, tmp_path / "thing.safetensors")


def test_a_pulled_mixture_answers_as_the_one_that_was_pushed(toy, made, run, tmp_path):
    from sva.adaptation.mixture_file import load_mixture

    run("push", *pushed("mixture", made), "--dry-run", "-o", "folder")
    run("pull", "folder", "-o", "back")
    theirs = load_mixture(
        toy,
        made / "mixture.json",
        [Expert.load(made / f"e{number}.safetensors") for number in (1, 2)],
        progress=False,
    )
    experts = [Expert.load(tmp_path / "back" / f"expert-{number}.safetensors") for number in (1, 2)]
    ours = load_mixture(toy, tmp_path / "back" / "alphas.json", experts, progress=False)
    for name, weight in theirs.named_params().items():
        np.testing.assert_array_equal(ours.named_params()[name], weight)


# The card.


def card_of(run, *words):
    """(the YAML as the Hub's library reads it, the text) of a dry run's card, and what stderr said."""
    code, _, err = run("push", *words, "--dry-run", "-o", "folder")
    assert code == 0, err
    card = huggingface_hub.ModelCard.load(Path("folder") / "README.md")
    return card.data, card.text, err


def test_a_card_says_what_the_record_says(run):
    front, text, err = card_of(run, CAPITALS, "me/capitals", "--licence", "Apache-2.0")
    assert (front.base_model, front.library_name) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "sva")
    assert front.license == "apache-2.0"
    assert front.tags == ["sva", "singular-value-adaptation", "expert", "sigmoid_nuclear"]
    record = Expert.load(CAPITALS)
    for said in (
        record.metadata["fingerprint"],
        record.digest,
        "90 matrices, targets mlp; 51,840 numbers",
        "*countries and their capitals* (label `countries`)",
        "n = 90 questions of `capitals` (test split), one run (seed 0)",
        "| base | 31.1 % [22.5, 41.3] |",
        "| gain | +27.8 points [+18.9, +37.8] |",
        "its data: Apache-2.0, made by sva from a seed",
        "train: {steps: 16, micro_batch: 4, remat: false}",
        "--model smollm2-135m-instruct-q4_1 --expert capitals.safetensors",
    ):
        assert said in text, said
    assert "runs/" not in text
    assert err == ""


def test_a_card_invents_nothing(made, run):
    front, text, _ = card_of(run, made / "e1.safetensors", REPO)
    assert front.license is None
    for word in ("Results", "seed", "n =", "licence", "How it was made", "%", "None"):
        assert word not in text, word
    assert front.base_model == "owner/toy"


def test_the_card_of_a_mixture_names_its_experts_and_its_search(made, run):
    front, text, _ = card_of(run, *pushed("mixture", made))
    assert front.tags[2:] == ["mixture", "linear"]
    assert "| 1: kind1" in text
    assert "| 0.25 |" in text
    assert "sva adapt copy" in text
    assert "{" not in text.partition("Settings")[2]
    assert "seed: 7" in text


def test_the_card_of_a_checkpoint_is_that_of_the_expert_in_it(made, run):
    front, text, _ = card_of(run, *pushed("checkpoint", made))
    assert (front.library_name, front.pipeline_tag) == ("transformers", "text-generation")
    assert (front.base_model, front.base_model_relation) == ("owner/toy", "finetune")
    assert Expert.load(made / "e1.safetensors").digest in text
    front, text, _ = card_of_bare(made, run)
    assert front.base_model is None
    assert "digest" not in text


def card_of_bare(made, run):
    shutil.rmtree("folder")
    return card_of(run, made / "checkpoint", REPO)


@pytest.fixture
def private_run(made, tmp_path):
    """A run directory whose records are full of places and secrets."""
    config = {"model": f"{HOME}/models/llama", "task": f"{HOME}/my tasks/q.jsonl", "seed": 3}
    config |= {"run_dir": f"{HOME}/my runs/x", "wandb": "ann-private", "mesh": {"data": 4}, "train": {"steps": 5}}
    about = {"base": f"{HOME}/models/llama", "fingerprint": "f" * 64, "task": f"{HOME}/tasks/q.jsonl"}
    about |= {"label": "mine", "description": f"as in {HOME}/notes.txt, or ../other/notes.txt", "config": config}
    folder = tmp_path / "run"
    folder.mkdir()
    Expert(Expert.load(made / "e1.safetensors").raw, "linear", about).save(folder / "expert.safetensors")
    command = (
        f"sva train {HOME}/configs/q.yaml run_dir={HOME}/my runs/x model={HOME}/models/llama wandb=ann-private "
        "seed=3 train.init=gs://ann-bucket/start.safetensors evaluate.note=hf_abcdefghijklmnopqrst"
    )
    result = {"config": config, "fingerprint": "f" * 64, "command": command, "versions": {"jax": "0.10.2"}}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_no_path_of_the_machine_and_no_secret_is_in_a_card(private_run, run):
    front, text, err = card_of(run, private_run, REPO)
    whole = Path("folder/README.md").read_text()
    for word in (HOME, "/secret", "ann", "bucket", "run_dir", "my runs", "hf_", "../", "wandb", "mesh"):
        assert word not in whole, word
    assert "sva train q.yaml model=llama seed=3 train.init=start.safetensors evaluate.note=..." in text
    assert "jax 0.10.2" in text
    assert "as in notes.txt, or notes.txt" in text
    assert front.base_model is None  # a directory of this machine is nothing that the Hub knows
    assert "their records name places of this machine: ../other/notes.txt, /secret/ann/" in err
    assert Path("folder/expert.safetensors").read_bytes() == (private_run / "expert.safetensors").read_bytes()


def test_the_record_of_another_run_is_not_this_experts(private_run, run):
    other = json.loads((private_run / "result.json").read_text())
    other["config"]["seed"] = 4
    (private_run / "result.json").write_text(json.dumps(other))
    _, text, _ = card_of(run, private_run, REPO)
    assert "sva train q.yaml" not in text


def test_of_a_run_from_python_neither_a_command_nor_another_task_is_told(private_run, run):
    record = json.loads((private_run / "result.json").read_text())
    expert = Expert.load(private_run / "expert.safetensors")
    record["command"] = "ipykernel_launcher.py -f kernel.json"
    record["config"]["task"] = "last_letter"
    (private_run / "result.json").write_text(json.dumps(record))
    about = {**expert.metadata, "config": record["config"], "task": "routes"}
    Expert(expert.raw, "linear", about).save(private_run / "expert.safetensors")
    _, text, _ = card_of(run, private_run, REPO)
    assert "jax 0.10.2" in text
    assert "ipykernel" not in text
    assert "last_letter" not in text


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("configs/a.yaml and 1/2 / 3", "configs/a.yaml and 1/2 / 3"),
        ("https://arxiv.org/abs/2501.06252", "https://arxiv.org/abs/2501.06252"),
        ("see https://ann:word@host/x", "see https://host/x"),
        ("'/a/b c' (~/d/e) s3://f/g.h C:\\i\\j", "'b c' (e) g.h j"),
        ("about ~5 % of ..., </s>", "about ~5 % of ..., </s>"),
    ],
)
def test_paths_are_cut_and_other_text_stays(text, left):
    assert redact.public(text) == left


def test_places_below_the_home_directory_are_found_with_their_spaces(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/Ann Lee"))
    assert redact.public("sva train /home/Ann Lee/a.yaml") == "sva train a.yaml"


def test_a_working_directory_is_cut_where_a_path_starts_alone(monkeypatch):
    monkeypatch.setattr(Path, "cwd", lambda: Path("/data"))
    text = "sva train configs/data/q.yaml --to /data/my runs/q, see https://host/data/x"
    assert redact.public(text) == "sva train configs/data/q.yaml --to my runs/q, see https://host/data/x"


# The Hub.


class Hub:
    """A Hub in a folder. Its calls take what the real ones take, by their signatures, and are kept in `calls`."""

    def __init__(self, folder):
        self.folder, self.calls, self.private = folder, [], False

    def create_repo(self, repo_id, **given):
        self.calls.append(("create_repo", repo_id, given))
        if not repo_id.startswith("me/"):
            raise refusal(403)
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, delete_patterns, commit_message):
        self.calls.append(("upload_folder", repo_id, {"commit_message": commit_message}))
        target = self.folder / repo_id
        for pattern in delete_patterns:
            for path in target.glob(pattern):
                path.unlink()
        for path in Path(folder_path).iterdir():
            shutil.copyfile(path, target / path.name)

    def model_info(self, repo_id, *, revision=None, timeout):
        del timeout
        if not (self.folder / repo_id).is_dir():
            raise refusal(404, hub_errors.RepositoryNotFoundError)
        if revision not in (None, "main"):
            raise refusal(404, hub_errors.RevisionNotFoundError)
        names = [{"rfilename": path.name} for path in sorted((self.folder / repo_id).iterdir())]
        card = {"base_model": "owner/toy"}
        return ModelInfo(id=repo_id, sha="0" * 40, private=self.private, siblings=names, cardData=card)

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns, local_files_only=False):
        if local_files_only:
            raise hub_errors.LocalEntryNotFoundError("not here")
        assert revision == "0" * 40
        assert "*.safetensors" in allow_patterns
        return str(self.folder / repo_id)


def refusal(status, kind=hub_errors.HfHubHTTPError):
    return kind(f"{status}\nof the Hub", response=httpx2.Response(status, request=httpx2.Request("POST", "http://hub")))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The Hub of this test, with a token for "me"."""
    here = Hub(tmp_path / "hub")

    def calls(real, fake, skip):
        @functools.wraps(real)
        def call(*given, **named):
            inspect.signature(real).bind(*given, **named)  # raises where the real one would
            return fake(*given[skip:], **named)

        return call

    for name in ("create_repo", "upload_folder", "model_info"):
        real = getattr(huggingface_hub.HfApi, name)
        monkeypatch.setattr(huggingface_hub.HfApi, name, calls(real, getattr(here, name), 1))
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", calls(real, here.snapshot_download, 0))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return here


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_pushed_is_pulled_bit_for_bit(kind, made, run, hub, tmp_path):
    code, out, _ = run("push", *pushed(kind, made))
    assert (code, out.split(": ")[0]) == (0, f"https://huggingface.co/{REPO}")
    assert [name for name, *_ in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.calls[0][1:] == (REPO, {"private": None, "exist_ok": True})
    assert (hub.folder / REPO / "README.md").is_file()
    assert run("pull", f"{REPO}@main", "-o", "back")[0] == 0
    assert same_bytes(kind, made, tmp_path / "back")


def test_a_second_push_replaces_the_first(made, run, hub):
    run("push", *pushed("mixture", made))
    one = [Expert.load(made / "e2.safetensors")]
    base = {"name": "owner/toy", "fingerprint": one[0].metadata["fingerprint"]}
    Alphas([1.0], identities(one), base).save(Path("one.json"))
    assert run("push", "one.json", REPO, "--expert", made / "e2.safetensors")[0] == 0
    names = sorted(path.name for path in (hub.folder / REPO).iterdir())
    assert names == ["README.md", "alphas.json", "expert-1.safetensors"]


def test_a_private_repository_is_asked_for(made, run, hub):
    run("push", *pushed("expert", made), "--private")
    assert hub.calls[0][2]["private"] is True


def test_a_card_that_was_edited_is_sent_as_it_is(made, run, hub):
    run("push", *pushed("expert", made), "--dry-run", "-o", "folder")
    Path("folder/README.md").write_text("mine")
    run("push", "folder", REPO)
    assert (hub.folder / REPO / "README.md").read_text() == "mine"


def test_only_weights_settings_and_licences_of_a_checkpoint_are_sent(made, run, hub):
    shutil.copytree(made / "checkpoint", "mine")
    for name in (".env", "notes.md", "modeling.py", "LICENSE"):
        Path("mine", name).write_text("x")
    _, _, err = run("push", "mine", REPO)
    assert "not sent: .env, modeling.py, notes.md" in err
    assert {"LICENSE", "model.safetensors"} <= {path.name for path in (hub.folder / REPO).iterdir()}
    assert not (hub.folder / REPO / ".env").exists()


def test_an_expert_of_the_hub_is_given_by_its_name(made, run, hub):
    run("push", *pushed("expert", made))
    (file,) = with_experts_here(ExpertOptions(expert=(Path(REPO),))).expert
    assert file.read_bytes() == (made / "e1.safetensors").read_bytes()
    here = (made / "e1.safetensors", Path("not/there.safetensors"), Path("one"))
    assert with_experts_here(ExpertOptions(expert=here)).expert == here


@pytest.mark.parametrize(("text", "repo"), [("a/b", Repo("a/b")), ("a/b@v1", Repo("a/b", "v1"))])
def test_a_revision_follows_the_name(text, repo):
    assert repo_of(text) == repo
    assert str(repo) == text
    assert repo_of("a/b.safetensors") is repo_of("a/b/c") is repo_of("a/b@") is repo_of("a") is None


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("expert", "me/thing holds an sva expert of owner/toy, not a model: give --expert me/thing beside its base"),
        ("mixture", "me/thing holds a mixture of sva experts of owner/toy, not a model: 'sva expert pull me/thing'"),
    ],
)
def test_loading_an_expert_as_a_model_says_what_it_is(kind, words, made, run, hub):
    run("push", *pushed(kind, made))
    with pytest.raises(UserError, match=words) as caught:
        sva.load(REPO)
    assert "\n" not in str(caught.value)


def test_loading_an_experts_folder_or_file_as_a_model_says_what_it_is(made, run):
    run("push", *pushed("expert", made), "--dry-run", "-o", "folder")
    for name, words in (
        ("folder", "folder holds an sva expert, not a model: give --expert folder/expert.safetensors"),
        ("folder/expert.safetensors", "--expert"),
    ):
        with pytest.raises(UserError, match=words):
            sva.load(name)


def test_an_expert_in_the_cache_is_used_and_recognised_without_the_hub(made, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--me--thing" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    shutil.copyfile(made / "e1.safetensors", snapshot / "expert.safetensors")
    monkeypatch.chdir(tmp_path)
    assert with_experts_here(ExpertOptions(expert=(Path(REPO),))).expert == (snapshot / "expert.safetensors",)
    with pytest.raises(UserError, match="me/thing holds an sva expert, not a model"):
        sva.load(REPO)


# Mistakes: one line and exit code 2 each.


def one_line(run, words, *arguments):
    code, _, err = run(*arguments)
    lines = [line for line in err.splitlines() if line.startswith("sva: ")]
    assert code == 2
    assert len(lines) == 1
    assert words in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("push @none.safetensors me/x", "there is nothing at"),
        ("push @mixture.json me/x", "that is not among those given"),
        ("push @mixture.json me/x --expert @e1.safetensors", "that is not among those given"),
        ("push @e1.safetensors me/x --expert @e2.safetensors", "is an expert itself"),
        ("push @checkpoint me/x --expert @e1.safetensors --expert @e2.safetensors", "a checkpoint has one"),
        ("push @checkpoint/config.json me/x", "is not an alphas file"),
        ("push @checkpoint/model.safetensors me/x", "is no sva expert"),
        ("push @ me/x", "holds no expert (expert.safetensors), mixture (alphas.json) or checkpoint"),
        ("push @e1.safetensors x", "'x' is not a name on the Hub; write OWNER/NAME"),
        ("push @e1.safetensors me/x --base x", "--base 'x' is not a name on the Hub"),
        ("push @e1.safetensors me/x --licence a/b", "is not as the Hub spells one"),
        ("push @e1.safetensors me/x -o y", "--out is where --dry-run writes"),
        ("push @e1.safetensors me/x --dry-run -o @checkpoint", "already holds something"),
        ("pull @", "holds no expert"),
        ("pull nothing", "nothing is neither a folder nor OWNER/NAME"),
        ("pull gs://bucket/x", "is neither a folder nor OWNER/NAME"),
        ("pull @checkpoint -o @checkpoint", "exists; give another path with -o"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, run, made, monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    one_line(run, words, *(word.replace("@", f"{made}/") for word in arguments.split()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("push @e1.safetensors they/x", "the Hub does not let you write to they/x: it is someone else's"),
        ("push @e1.safetensors me/checkpoint", "is there already and holds a checkpoint, not an expert"),
        ("push @e1.safetensors me/other", "is there already and holds data.csv, not an expert"),
        ("push @checkpoint me/checkpoint --private", "is there already and public"),
        ("pull me/none", "the Hub has no such repository, or it is private"),
        ("pull me/checkpoint@v9", "has no such revision on the hub"),
        ("pull me/other", "holds no expert, mixture or checkpoint of sva (data.csv)"),
    ],
)
def test_what_the_hub_refuses_is_one_line(arguments, words, run, made, hub):
    shutil.copytree(made / "checkpoint", hub.folder / "me/checkpoint")
    (hub.folder / "me/other").mkdir()
    (hub.folder / "me/other/data.csv").write_text("")
    one_line(run, words, *(word.replace("@", f"{made}/", 1) if word[0] == "@" else word for word in arguments.split()))
    assert "upload_folder" not in [name for name, *_ in hub.calls]


def test_a_checkpoint_that_lacks_a_shard_is_not_sent(made, run):
    shutil.copytree(made / "checkpoint", "mine")
    Path("mine/model.safetensors.index.json").write_text('{"weight_map": {"a": "two.safetensors"}}')
    one_line(run, "lacks two.safetensors", "push", "mine", REPO, "--dry-run")


def test_a_card_of_ones_own_leaves_no_room_for_options(made, run):
    run("push", *pushed("expert", made), "--dry-run", "-o", "folder")
    one_line(run, "is sent as it is; write --licence", "push", "folder", REPO, "--licence", "mit", "--dry-run")


def test_without_a_token_nothing_is_sent(made, run, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    one_line(run, "there is no token for the Hub", "push", *pushed("expert", made))
    assert hub.calls == []


def test_without_the_hub_push_and_pull_say_so(made, run, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    one_line(run, "me/thing: the hub is not asked (HF_HUB_OFFLINE is set)", "push", *pushed("expert", made))
    one_line(run, "me/thing: there is nothing of that name here, and the hub is not asked", "pull", REPO)
    with pytest.raises(UserError, match="me/thing: there is nothing of that name here, and the hub is not asked"):
        with_experts_here(ExpertOptions(expert=(Path(REPO),)))


@pytest.mark.parametrize("given", ["expert", "mixture"])
def test_what_is_no_expert_on_the_hub_is_refused_behind_expert(given, made, run, hub):
    if given == "mixture":
        run("push", *pushed("mixture", made))
    with pytest.raises(UserError, match="holds a mixture, not an expert" if given == "mixture" else "no such repos"):
        with_experts_here(ExpertOptions(expert=(Path(REPO),)))
